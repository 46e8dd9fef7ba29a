"""Optimizers by name, with errors that help."""

from __future__ import annotations

import pytest
import torch

from deepspeed.errors import ConfigError, NotBuiltError
from deepspeed.ops.adam import FusedAdam
from deepspeed.ops.factory import OPTIMIZER_NAMES, build_optimizer


def groups():
    return [
        {"params": [torch.nn.Parameter(torch.ones(2, 3))], "lr": 0.5},
        {"params": [torch.nn.Parameter(torch.ones(3))]},
    ]


@pytest.mark.parametrize("name", [*OPTIMIZER_NAMES, "adamw", "LAMB", "SGD", "RMSprop"])
def test_every_name_builds_and_groups_keep_their_own_settings(name):
    optimizer = build_optimizer(name, {"lr": 0.01}, groups())
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_adam_is_decoupled_unless_told_otherwise():
    assert build_optimizer("Adam", {}, groups()).adam_w_mode
    assert not build_optimizer("Adam", {"adam_w_mode": False}, groups()).adam_w_mode


def test_torch_adam():
    assert type(build_optimizer("Adam", {"torch_adam": True}, groups())) is torch.optim.AdamW
    assert (
        type(build_optimizer("Adam", {"torch_adam": True, "adam_w_mode": False}, groups()))
        is torch.optim.Adam
    )


def test_lists_become_tuples():
    optimizer = build_optimizer("AdamW", {"betas": [0.8, 0.99]}, groups())
    assert isinstance(optimizer, FusedAdam)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.99)


@pytest.mark.parametrize(
    ("name", "params", "text"),
    [
        ("AdmW", {}, r"optimizer\.type.*'AdmW'.*AdamW"),
        ("functional", {}, r"optimizer\.type"),
        ("Optimizer", {}, r"optimizer\.type"),
        ("Sgd", {}, "did you mean 'SGD'"),
        ("AdamW", {"weigth_decay": 1}, r"optimizer\.params\.weigth_decay.*did you mean 'weight_decay'"),
        ("SGD", {"momentun": 1}, "did you mean 'momentum'"),
        ("Muon", {"ns_method": "exact"}, r"optimizer\.params\.ns_method: expected"),
        ("Muon", {"nesterov": True}, r"optimizer\.params\.nesterov"),
        ("AdamW", {"state_dtype": "bf16"}, r"optimizer\.params\.state_dtype"),
        ("AdamW", {"lr": -1}, r"optimizer\.params\.lr: expected a number of at least 0, got -1"),
        ("AdamW", {"lr": "1e-3"}, r"optimizer\.params\.lr: expected a number, got '1e-3'"),
        ("AdamW", {"lr": None}, r"lr: expected a number, got None"),
        ("SGD", {"lr": True}, r"lr: expected a number, got True"),
        ("AdamW", {"betas": 0.9}, r"betas: expected a list of 2 numbers, got 0\.9"),
        ("AdamW", {"betas": [0.9]}, r"betas: expected a list of 2 numbers"),
        ("AdamW", {"betas": [0.9, "x"]}, r"betas: expected a list of 2 numbers"),
        ("AdamW", {"adam_w_mode": "no"}, r"adam_w_mode: expected true or false, got 'no'"),
        ("AdamW", {"torch_adam": "yes"}, r"torch_adam: expected true or false, got 'yes'"),
        ("AdamW", {"amsgrad": True}, r"amsgrad.*torch_adam"),
        ("SGD", {"nesterov": True}, r"optimizer\.params: SGD refused them: Nesterov"),
        ("Lamb", {"max_grad_norm": 1.0}, r"optimizer\.params\.max_grad_norm.*gradient_clipping"),
    ],
)
def test_mistakes_are_named(name, params, text):
    with pytest.raises(ConfigError, match=text):
        build_optimizer(name, params, groups())


@pytest.mark.parametrize("name", ["OneBitAdam", "OneBitLamb", "ZeroOneAdam", "MuAdam", "MuAdamW", "MuSGD"])
def test_what_is_known_and_missing_says_so(name):
    with pytest.raises(NotBuiltError, match=f"{name} is not built yet"):
        build_optimizer(name, {}, groups())


def test_a_clipping_norm_of_zero_asks_for_nothing():
    build_optimizer("Lamb", {"max_grad_norm": 0}, groups())


def test_torchs_adam_takes_amsgrad():
    assert build_optimizer("AdamW", {"torch_adam": True, "amsgrad": True}, groups()).defaults["amsgrad"]


def test_numbers_may_be_integers_and_nulls_stand_where_torch_has_them():
    build_optimizer("AdamW", {"lr": 1, "weight_decay": 0}, groups())
    build_optimizer("Adafactor", {"eps": [None, 1e-3]}, groups())


def test_narrow_moments():
    one = [{"params": [torch.nn.Parameter(torch.ones(2).bfloat16())]}]
    assert build_optimizer("Adam", {"fp32_optimizer_states": False}, one).state_dtype is torch.bfloat16
