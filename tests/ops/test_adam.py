"""The fused Adam is Adam, on every path."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from deepspeed.errors import UsageError
from deepspeed.ops import pieces as cutting
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.adam import kernel as adam_kernel

STEPS = 4
CLOSE = {"rtol": 2e-6, "atol": 2e-6}


def reference_class(decoupled):
    return torch.optim.AdamW if decoupled else torch.optim.Adam


def params_of(dtype):
    torch.manual_seed(0)
    shapes = [(5, 6), (), (40,), (0, 3)]
    made = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    return [*made, torch.nn.Parameter(torch.randn(4, 6, dtype=dtype).t())]


def train(optimizer, params, steps=STEPS):
    """Step on gradients that depend on nothing but the step."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for param in params:
            grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            param.grad = grad.to(param.dtype)
        optimizer.step()


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("chunk", [7, 131_072])  # params longer than this are updated one by one, in pieces
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_equal_torch(decoupled, chunk, weight_decay, dtype, monkeypatch):
    monkeypatch.setattr("deepspeed.ops.adam.optimizer.CHUNK", chunk)
    monkeypatch.setattr(cutting, "CHUNK", chunk)
    ours, theirs = params_of(dtype), params_of(dtype)
    options = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    optimizer = FusedAdam(ours, adam_w_mode=decoupled, **options)
    reference = reference_class(decoupled)(theirs, **options)
    train(optimizer, ours)
    train(reference, theirs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, **CLOSE)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            if mine.numel() > 0:
                torch.testing.assert_close(optimizer.state[mine][key], reference.state[other][key], **CLOSE)


@pytest.mark.parametrize("narrow", [True, False])
def test_without_bias_correction_the_moments_count_as_they_are(narrow):
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    state_dtype = torch.bfloat16 if narrow else None
    optimizer = FusedAdam([weight], lr=0.5, bias_correction=False, eps=0.1, state_dtype=state_dtype)
    weight.grad = torch.tensor([1.0, -2.0])
    optimizer.step()
    step = 0.5 * 0.1 * weight.grad / ((0.001 * weight.grad**2).sqrt() + 0.1)
    torch.testing.assert_close(weight.detach(), torch.tensor([1.0, 2.0]) - step)


PATHS = ["fused kernel", "plain pass"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32])
def test_a_leaf_update_scales_writes_the_copy_and_skips(path, decoupled, grad_dtype, monkeypatch):
    monkeypatch.setattr(cutting, "CHUNK", 77)
    if path == "plain pass":
        monkeypatch.setattr(adam_kernel, "kernel_serves", lambda weights: False)
    torch.manual_seed(0)
    leaf, grads = torch.randn(300), [torch.randn(300).to(grad_dtype) for _ in range(3)]
    expected = torch.nn.Parameter(leaf.clone())
    options = {"lr": 0.02, "weight_decay": 0.1}
    optimizer = FusedAdam([leaf], adam_w_mode=decoupled, compile=False, **options)
    reference = reference_class(decoupled)([expected], **options)
    group, out = optimizer.param_groups[0], torch.empty(300, dtype=torch.bfloat16)
    for grad in grads:
        expected.grad, given = grad.float() * 0.25, grad.clone()
        reference.step()
        update = {"out": out, "scale": torch.tensor(0.25)}
        optimizer.update_leaf(leaf, group, given, **update, found_inf=torch.tensor(0.0))
        assert torch.equal(given, grad), "the gradient is only read"
        before = [leaf.clone(), *(value.clone() for value in optimizer.state[leaf].values())]
        broken = torch.full_like(grad, float("nan"))
        optimizer.update_leaf(leaf, group, broken, **update, found_inf=torch.tensor(2.0))
        after = [leaf, *optimizer.state[leaf].values()]
        assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    torch.testing.assert_close(leaf, expected.detach(), **CLOSE)
    assert torch.equal(out, leaf.bfloat16())


@pytest.mark.parametrize("narrow", [True, False])
def test_an_update_runs_on_fake_tensors(narrow):
    """Nothing is read back from the device, so memory can be simulated."""
    with FakeTensorMode():
        leaf, flag = torch.empty(1000), torch.zeros(())
        optimizer = FusedAdam([leaf], state_dtype=torch.bfloat16 if narrow else None, compile=True)
        group, out = optimizer.param_groups[0], leaf.bfloat16()
        optimizer.update_leaf(leaf, group, leaf.bfloat16(), out=out, scale=flag, found_inf=flag)


def test_moments_may_be_narrow_and_follow_wide_ones():
    torch.manual_seed(0)
    wide, narrow = (torch.nn.Parameter(torch.linspace(-1, 1, 8)) for _ in range(2))
    first, second = FusedAdam([wide], lr=0.1), FusedAdam([narrow], lr=0.1, state_dtype=torch.bfloat16)
    train(first, [wide])
    train(second, [narrow])
    assert second.state[narrow]["exp_avg"].dtype == torch.bfloat16
    torch.testing.assert_close(wide, narrow, rtol=0, atol=0.02)


def test_the_host_optimizers_switch_narrows_moments_to_the_dtype_of_the_weights():
    weight = torch.nn.Parameter(torch.randn(8).bfloat16())
    weight.grad = torch.ones(8).bfloat16()
    optimizer = DeepSpeedCPUAdam([weight], fp32_optimizer_states=False)
    optimizer.step()
    assert optimizer.state[weight]["exp_avg"].dtype == torch.bfloat16


def test_a_copied_optimizer_is_whole():
    weight = torch.nn.Parameter(torch.ones(3))
    given = FusedAdam([weight], lr=0.1, adam_w_mode=False, state_dtype=torch.float64)
    optimizer = copy.deepcopy(given)
    params = optimizer.param_groups[0]["params"]
    train(optimizer, params)
    assert not optimizer.adam_w_mode
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.float64
    assert not torch.equal(params[0], weight)


def test_a_closure_is_run_with_gradients():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = FusedAdam([weight], lr=0.1)

    def closure():
        loss = weight.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.9))


def test_sparse_gradients_are_refused():
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3).to_sparse()
    with pytest.raises(UsageError, match="SparseAdam"):
        FusedAdam([weight]).step()


class Kernels(TorchDispatchMode):
    """Counts the operations that a device would have to start."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bias_correction", [True, False])
def test_what_decides_on_an_update_is_few_operations_on_small_numbers(bias_correction):
    hyper = adam_kernel.AdamHyper(0.1, 0.9, 0.99, 1e-8, 0.01, bias_correction, True)
    control = adam_kernel.Control(torch.tensor(3.0), torch.tensor(0.5), torch.tensor(1.0))
    with Kernels() as kernels:
        found = adam_kernel.numbers(hyper, control)
    first, second = (1 - 0.9**3, 1 - 0.99**3) if bias_correction else (1, 1)
    expected = [0.9, 0.1, 0.99, 0.01, 1e-8, 0.1 / first, second**-0.5, 0.001, 0.5, 1]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert kernels.count <= 12
