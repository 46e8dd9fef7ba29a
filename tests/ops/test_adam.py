"""The fused Adam is Adam, on every path."""

from __future__ import annotations

import pytest
import torch

from deepspeed.errors import ConfigError
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.adam import kernel as adam_kernel

STEPS = 5


def reference_class(decoupled):
    return torch.optim.AdamW if decoupled else torch.optim.Adam


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("chunk", [7, 65_536])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_steps_equal_torch(decoupled, chunk, weight_decay, monkeypatch):
    monkeypatch.setattr(adam_kernel, "CHUNK", chunk)
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(5, 6)), torch.nn.Parameter(torch.randn(()))]
    theirs = [torch.nn.Parameter(param.detach().clone()) for param in ours]
    options = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    optimizer = FusedAdam(ours, adam_w_mode=decoupled, **options)
    reference = reference_class(decoupled)(theirs, **options)
    for _ in range(STEPS):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape)
            other.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-6, atol=2e-6)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            torch.testing.assert_close(
                optimizer.state[mine][key], reference.state[other][key], rtol=2e-6, atol=2e-7
            )


@pytest.mark.parametrize("path", ["fused chunks", "plain pass", "compiled"])
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32])
def test_a_leaf_update_scales_writes_the_copy_and_skips(path, decoupled, grad_dtype, monkeypatch):
    torch.manual_seed(0)
    leaf, grads = torch.randn(300), [torch.randn(300).to(grad_dtype) for _ in range(3)]
    expected = torch.nn.Parameter(leaf.clone())
    options = {"lr": 0.02, "weight_decay": 0.1}
    optimizer = FusedAdam([leaf], adam_w_mode=decoupled, **options)
    optimizer._large = path == "compiled"
    if path == "plain pass":
        monkeypatch.setattr(adam_kernel, "chunked_pass", None)
        optimizer._run_compiled = lambda t, numbers, mode: (
            not adam_kernel.adam_pass(t.master, t.exp_avg, t.exp_avg_sq, t.grad, t.out, numbers, mode)
        )
    reference = reference_class(decoupled)([expected], **options)
    out = torch.empty(300, dtype=torch.bfloat16)
    for grad in grads:
        expected.grad = grad.float() * 0.25
        reference.step()
        group = optimizer.param_groups[0]
        update = {"out": out, "scale": torch.tensor(0.25)}
        optimizer.update_leaf(leaf, group, grad, **update, found_inf=torch.tensor(0.0))
        before = leaf.clone(), optimizer.state[leaf]["step"].clone()
        optimizer.update_leaf(
            leaf, group, torch.full_like(grad, float("nan")), **update, found_inf=torch.tensor(1.0)
        )
        assert torch.equal(leaf, before[0])
        assert torch.equal(optimizer.state[leaf]["step"], before[1])
    torch.testing.assert_close(leaf, expected.detach(), rtol=2e-6, atol=2e-6)
    assert torch.equal(out, leaf.bfloat16())


def test_moments_may_be_narrow():
    weight = torch.nn.Parameter(torch.randn(8).bfloat16())
    weight.grad = torch.ones(8).bfloat16()
    optimizer = DeepSpeedCPUAdam([weight], fp32_optimizer_states=False)
    optimizer.step()
    assert optimizer.state[weight]["exp_avg"].dtype == torch.bfloat16


def test_a_non_contiguous_parameter_is_updated():
    weight = torch.nn.Parameter(torch.randn(4, 6).t())
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    FusedAdam([weight], lr=0.1).step()
    torch.testing.assert_close(weight.detach(), before - 0.1)


@pytest.mark.parametrize("bad", [{"lr": -1}, {"betas": (1.0, 0.9)}, {"amsgrad": True}, {"eps": -1e-8}])
def test_bad_numbers_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        FusedAdam([torch.nn.Parameter(torch.ones(1))], **bad)
