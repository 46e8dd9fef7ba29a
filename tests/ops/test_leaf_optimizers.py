"""Lion, LAMB and Adagrad: their formulas, and the leaf update that the sharding core calls."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepspeed.errors import ConfigError, UsageError
from deepspeed.ops import pieces as cutting
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from deepspeed.ops.muon import MuonWithAuxAdam

STEPS = 4


def gradients(shape, steps=STEPS):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


def start(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def run(optimizer, param, grads):
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return param.detach()


def lion(weight, grads, lr, betas, weight_decay):
    momentum = torch.zeros_like(weight)
    for grad in grads:
        direction = (betas[0] * momentum + (1 - betas[0]) * grad).sign()
        weight = weight * (1 - lr * weight_decay) - lr * direction
        momentum = betas[1] * momentum + (1 - betas[1]) * grad
    return weight


@pytest.mark.parametrize("cls", [FusedLion, DeepSpeedCPULion])
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_lion(cls, weight_decay):
    param = torch.nn.Parameter(start((5, 6)))
    options = {"lr": 0.02, "betas": (0.8, 0.95), "weight_decay": weight_decay}
    result = run(cls([param], **options), param, gradients((5, 6)))
    torch.testing.assert_close(result, lion(start((5, 6)), gradients((5, 6)), **options))


def lamb(weight, grads, options):
    """One parameter, in fp64."""
    beta1, beta2 = options["betas"]
    m, v, weight = torch.zeros_like(weight).double(), torch.zeros_like(weight).double(), weight.double()
    for number, grad in enumerate(grads, start=1):
        m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad.double() ** 2
        eps = options["eps"]
        root = (v + eps).sqrt() if options["eps_inside_sqrt"] else v.sqrt() + eps
        update = m / root + options["weight_decay"] * weight
        rate = options["lr"]
        if options["bias_correction"]:
            rate *= (1 - beta2**number) ** 0.5 / (1 - beta1**number)
        ratio = 1.0
        if weight.norm() > 0 and update.norm() > 0:
            ratio = (weight.norm() / update.norm()).clamp(options["min_coeff"], options["max_coeff"])
        weight = weight - rate * ratio * update
    return weight.float()


LAMB = {
    "lr": 0.1,
    "betas": (0.8, 0.95),
    "eps": 1e-3,
    "eps_inside_sqrt": False,
    "weight_decay": 0.1,
    "bias_correction": True,
    "max_coeff": 10.0,
    "min_coeff": 0.01,
}


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"eps_inside_sqrt": True},
        {"bias_correction": False},
        {"max_coeff": 0.2},
        {"min_coeff": 5.0},
        {"weight_decay": 0.0},
    ],
    ids=str,
)
def test_lamb_and_each_of_its_options(changed):
    options, grads = {**LAMB, **changed}, gradients((5, 6))
    param = torch.nn.Parameter(start((5, 6)))
    result = run(FusedLamb([param], **options), param, grads)
    torch.testing.assert_close(result, lamb(start((5, 6)), grads, options), rtol=1e-5, atol=1e-6)
    if changed:
        assert not torch.allclose(result, lamb(start((5, 6)), grads, LAMB), rtol=1e-3)


def test_lamb_moves_a_parameter_that_is_zero():
    param, grads = torch.nn.Parameter(torch.zeros(4)), gradients((4,), 1)
    result = run(FusedLamb([param], **LAMB), param, grads)
    torch.testing.assert_close(result, lamb(torch.zeros(4), grads, LAMB))


def test_adagrad_is_torchs_with_the_originals_defaults():
    ours, theirs = (torch.nn.Parameter(start((5, 6))) for _ in range(2))
    result = run(DeepSpeedCPUAdagrad([ours]), ours, gradients((5, 6)))
    reference = run(torch.optim.Adagrad([theirs], lr=1e-2, eps=1e-10), theirs, gradients((5, 6)))
    assert torch.equal(result, reference)


@pytest.mark.parametrize("changed", [{"lr_decay": 0.5}, {"initial_accumulator_value": 2.0}], ids=str)
def test_adagrad_takes_torchs_arguments(changed):
    ours, theirs = (torch.nn.Parameter(start((5, 6))) for _ in range(2))
    options = {"lr": 0.1, "eps": 1e-3, "weight_decay": 0.2, **changed}
    result = run(DeepSpeedCPUAdagrad([ours], **options), ours, gradients((5, 6)))
    reference = run(torch.optim.Adagrad([theirs], **options), theirs, gradients((5, 6)))
    torch.testing.assert_close(result, reference)


MAKE = {
    "adam": lambda params: FusedAdam(params, lr=0.1),
    "adagrad": lambda params: DeepSpeedCPUAdagrad(params, lr=0.1),
    "lion": lambda params: FusedLion(params, lr=0.1),
    "lamb": lambda params: FusedLamb(params, lr=0.1),
    "muon": lambda params: MuonWithAuxAdam([{"params": params, "use_muon": True}], lr=0.1),
    "muon's Adam": lambda params: MuonWithAuxAdam([{"params": params}], lr=0.1),
}


@pytest.mark.parametrize("name", MAKE)
def test_a_leaf_update_scales_writes_the_copy_and_skips(name):
    leaf, expected = start((6, 4)), torch.nn.Parameter(start((6, 4)))
    grads = [grad.bfloat16() for grad in gradients((6, 4), 3)]
    optimizer, reference = MAKE[name]([leaf]), MAKE[name]([expected])
    out = torch.empty(6, 4, dtype=torch.bfloat16)
    update = {"out": out, "scale": torch.tensor(0.25)}
    group = optimizer.param_groups[0]
    for grad in grads:
        given = grad.clone()
        optimizer.update_leaf(leaf, group, given, **update, found_inf=torch.tensor(0.0))
        assert torch.equal(given, grad), "the gradient is only read"
        before = [leaf.clone(), *(value.clone() for value in optimizer.state[leaf].values())]
        broken = torch.full_like(grad, float("inf"))
        optimizer.update_leaf(leaf, group, broken, **update, found_inf=torch.tensor(1.0))
        after = [leaf, *optimizer.state[leaf].values()]
        assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    run(reference, expected, [grad.float() * 0.25 for grad in grads])
    torch.testing.assert_close(leaf, expected.detach(), rtol=1e-6, atol=1e-6)
    assert torch.equal(out, leaf.bfloat16())


@pytest.mark.parametrize("name", MAKE)
def test_a_loaded_state_continues(name):
    grads = gradients((6, 4), 6)
    whole, first, second = (torch.nn.Parameter(start((6, 4))) for _ in range(3))
    run(MAKE[name]([whole]), whole, grads)
    saving, loading = MAKE[name]([first]), MAKE[name]([second])
    run(saving, first, grads[:3])
    second.data.copy_(first.data)
    loading.load_state_dict(saving.state_dict())
    assert torch.equal(run(loading, second, grads[3:]), whole.detach())


@pytest.mark.parametrize("name", MAKE)
def test_a_parameter_that_is_not_contiguous_is_updated_like_one_that_is(name):
    plain, turned = torch.nn.Parameter(start((6, 4))), torch.nn.Parameter(start((6, 4)).t().contiguous().t())
    assert not turned.is_contiguous()
    grads = gradients((6, 4))
    expected = run(MAKE[name]([plain]), plain, grads)
    torch.testing.assert_close(run(MAKE[name]([turned]), turned, grads), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MAKE)
def test_low_precision_parameters_are_updated_in_fp32(name):
    grad = start((6, 4)).bfloat16()
    narrow, wide = torch.nn.Parameter(grad.clone()), torch.nn.Parameter(grad.float())
    run(MAKE[name]([narrow]), narrow, [grad])
    run(MAKE[name]([wide]), wide, [grad.float()])
    torch.testing.assert_close(narrow.detach(), wide.detach().bfloat16(), rtol=2**-8, atol=0)


@pytest.mark.parametrize("name", MAKE)
def test_low_precision_parameters_keep_fp32_state_through_saving(name):
    def make():
        param = torch.nn.Parameter(start((6, 4)).bfloat16())
        return param, MAKE[name]([param])

    (param, optimizer), (other, loaded) = make(), make()
    run(optimizer, param, [grad.bfloat16() for grad in gradients((6, 4))])
    loaded.load_state_dict(optimizer.state_dict())
    assert list(loaded.state[other]) == list(optimizer.state[param])
    for key, value in optimizer.state[param].items():
        assert torch.equal(loaded.state[other][key], value)
        assert loaded.state[other][key].dtype == torch.float32
        assert loaded.state[other][key] is not value


@pytest.mark.parametrize("cls", [FusedAdam, DeepSpeedCPUAdam])
def test_states_of_torchs_optimizer_continue(cls):
    options = {"lr": 0.1, "weight_decay": 0.2}
    theirs = torch.nn.Parameter(start((5, 6)))
    torchs = torch.optim.AdamW([theirs], **options)
    run(torchs, theirs, gradients((5, 6)))
    ours = torch.nn.Parameter(theirs.detach().clone())
    optimizer = cls([ours], **options)
    optimizer.load_state_dict(torchs.state_dict())
    run(torchs, theirs, gradients((5, 6)))
    run(optimizer, ours, gradients((5, 6)))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_states_of_a_step_that_is_another_are_refused(option):
    param = torch.nn.Parameter(start((5, 6)))
    torchs = torch.optim.AdamW([param], **{option: True})
    optimizer = FusedAdam([param])
    with pytest.raises(
        UsageError, match=f"{option}: expected False in the state to load, got True, which FusedAdam"
    ):
        optimizer.load_state_dict(torchs.state_dict())
    assert not optimizer.param_groups[0].get(option)


@pytest.mark.parametrize("name", MAKE)
def test_hooks_of_the_user_have_the_last_word_on_a_loaded_state(name):
    param = torch.nn.Parameter(start((5, 6)))
    optimizer = MAKE[name]([param])
    run(optimizer, param, gradients((5, 6)))
    saved = {"inner": copy.deepcopy(optimizer.state_dict())}
    key = next(key for key, value in optimizer.state[param].items() if value.dim())

    def unwrap(_, given):
        state = given["inner"]["state"]
        return {**given["inner"], "state": {0: {**state[0], key: state[0][key] * 0 + 7, "note": "kept"}}}

    def add_one(given):
        given.state[param][key] += 1

    optimizer.register_load_state_dict_pre_hook(unwrap)
    optimizer.register_load_state_dict_post_hook(add_one)
    optimizer.load_state_dict(saved)
    assert optimizer.state[param][key].eq(8).all()
    assert "note" in optimizer.state[param]
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1


def test_a_loaded_state_lies_beside_its_parameter():
    saved = FusedAdam([param := torch.nn.Parameter(start((6, 4)))])
    run(saved, param, gradients((6, 4)))
    there = torch.nn.Parameter(torch.empty(6, 4, device="meta"))
    loaded = FusedAdam([there])
    loaded.load_state_dict(saved.state_dict())
    assert {value.device.type for value in loaded.state[there].values()} == {"meta"}


@pytest.mark.parametrize("cls", [DeepSpeedCPUAdam, DeepSpeedCPUAdagrad, DeepSpeedCPULion])
@pytest.mark.parametrize("wide", [True, False])
def test_the_host_optimizers_switch_decides_on_the_dtype_of_the_state(cls, wide):
    param = torch.nn.Parameter(start((6, 4)).bfloat16())
    optimizer = copy.deepcopy(cls([param], lr=0.1, fp32_optimizer_states=wide))
    (param,) = optimizer.param_groups[0]["params"]
    run(optimizer, param, [grad.bfloat16() for grad in gradients((6, 4))])
    state = [value for key, value in optimizer.state[param].items() if key != "step"]
    assert {value.dtype for value in state} == {torch.float32 if wide else torch.bfloat16}


MAKERS = {
    "Adam": FusedAdam,
    "Adagrad": DeepSpeedCPUAdagrad,
    "Lamb": FusedLamb,
    "Lion": FusedLion,
    "Muon": MuonWithAuxAdam,
}
NOT_NEGATIVE = {
    "Adam": ("lr", "eps", "weight_decay"),
    "Adagrad": ("lr", "eps", "weight_decay", "lr_decay", "initial_accumulator_value"),
    "Lamb": ("lr", "eps", "weight_decay", "max_coeff", "min_coeff"),
    "Lion": ("lr", "weight_decay"),
    "Muon": ("lr", "muon_lr", "adam_lr", "eps", "weight_decay"),
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in MAKERS for key in NOT_NEGATIVE[name]])
def test_a_negative_number_is_refused(name, key):
    with pytest.raises(ConfigError, match=rf"^{key}: expected a number of at least 0, got -0\.5$"):
        MAKERS[name]([torch.nn.Parameter(torch.ones(1))], **{key: -0.5})


@pytest.mark.parametrize("name", ["Adam", "Lamb", "Lion", "Muon"])
@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, -0.1), (0.9, float("nan")), (0.9,)])
def test_betas_that_are_no_decay_rates_are_refused(name, betas):
    with pytest.raises(ConfigError, match=r"^betas: expected two numbers in \[0, 1\), got \("):
        MAKERS[name]([torch.nn.Parameter(torch.ones(1))], betas=betas)


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("Muon", {"momentum": 1.0}, r"momentum: expected a number in \[0, 1\), got 1\.0"),
        ("Muon", {"ns_steps": 0}, r"ns_steps: expected a number of at least 1, got 0"),
        ("Lamb", {"max_grad_norm": 1.0}, r"max_grad_norm: expected 0, got 1\.0; use gradient_clipping"),
        ("Lamb", {"amsgrad": True}, "amsgrad: expected False"),
        ("Adam", {"amsgrad": True}, "amsgrad: expected False"),
        ("Adagrad", {"amsgrad": True}, "amsgrad: expected False"),
        ("Lion", {"set_grad_none": False}, "set_grad_none: expected True"),
    ],
)
def test_what_cannot_be_done_is_refused(name, options, text):
    with pytest.raises(ConfigError, match=text):
        MAKERS[name]([torch.nn.Parameter(torch.ones(1))], **options)


class LargestResult(TorchDispatchMode):
    """Note the size of the largest tensor that is made."""

    def __init__(self, *known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("name", ["adam", "adagrad", "lion"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_leaf_is_updated_in_small_pieces_with_the_same_result(name, dtype, monkeypatch):
    def update(leaf, optimizer, grad, out):
        flags = {"scale": torch.tensor(0.5), "found_inf": torch.zeros(())}
        optimizer.update_leaf(leaf, optimizer.param_groups[0], grad, out=out, **flags)

    first, second = (grad.bfloat16() for grad in gradients((230,), 2))
    results = []
    for size in (1000, 16):
        monkeypatch.setattr(cutting, "CHUNK", size)
        leaf, out = start((230,)).to(dtype), torch.empty(230, dtype=torch.bfloat16)
        optimizer = MAKE[name]([leaf])
        update(leaf, optimizer, first, out)
        with LargestResult(leaf, second, out, *optimizer.state[leaf].values()) as made:
            update(leaf, optimizer, second, out)
        assert made.numel <= size
        results.append((leaf, out))
    (whole, whole_out), (cut, cut_out) = results
    torch.testing.assert_close(whole, cut, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(whole_out, cut_out)


def test_groups_may_be_added_and_states_read_in_compiled_functions():
    def grow(optimizer, group):
        optimizer.add_param_group(group)
        optimizer.zero_grad()
        return optimizer.state_dict()

    optimizer = FusedAdam([torch.nn.Parameter(torch.ones(3, 3))])
    group = {"params": [torch.nn.Parameter(torch.ones(2, 2))], "lr": 0.5}
    state = torch.compile(grow, backend="eager")(optimizer, group)
    assert [group["lr"] for group in state["param_groups"]] == [1e-3, 0.5]
