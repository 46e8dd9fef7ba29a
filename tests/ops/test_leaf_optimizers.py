"""Lion, LAMB and Adagrad: their formulas, and the leaf update that the sharding core calls."""

from __future__ import annotations

import pytest
import torch

from deepspeed.errors import ConfigError
from deepspeed.ops import stepping
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
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


MAKE = {
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


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda p: FusedLion(p, lr=-1), "Lion: expected lr"),
        (lambda p: FusedLamb(p, max_grad_norm=1.0), "gradient_clipping"),
        (lambda p: FusedLamb(p, amsgrad=True), "amsgrad"),
        (lambda p: DeepSpeedCPUAdagrad(p, amsgrad=True), "amsgrad"),
    ],
)
def test_what_cannot_be_done_is_refused(make, text):
    with pytest.raises(ConfigError, match=text):
        make([torch.nn.Parameter(torch.ones(1))])


@pytest.mark.parametrize("cls", [FusedLion, DeepSpeedCPUAdagrad])
def test_a_large_leaf_is_updated_in_pieces_with_the_same_result(cls, monkeypatch):
    results = []
    for size in (stepping.PIECE, 5):
        monkeypatch.setattr(stepping, "PIECE", size)
        leaf, low = start((23,)), torch.empty(23, dtype=torch.bfloat16)
        optimizer = cls([torch.nn.Parameter(leaf)], lr=0.1)
        for grad in gradients((23,)):
            optimizer.update_leaf(
                leaf,
                optimizer.param_groups[0],
                grad,
                out=low,
                scale=torch.tensor(0.5),
                found_inf=torch.zeros(()),
            )
        results.append((leaf, low))
    (whole, whole_low), (cut, cut_low) = results
    assert torch.equal(whole, cut)
    assert torch.equal(whole_low, cut_low)
    assert torch.equal(cut_low, cut.bfloat16())
