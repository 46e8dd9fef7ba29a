"""Optimizers by name, with errors that help."""

from __future__ import annotations

import pytest
import torch

from deepspeed.errors import ConfigError
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
        ("AdamW", {"weigth_decay": 1}, r"optimizer\.params\.weigth_decay.*did you mean 'weight_decay'"),
        ("SGD", {"momentun": 1}, r"did you mean 'momentum'"),
        ("AdamW", {"lr": -1}, "lr"),
    ],
)
def test_mistakes_are_named(name, params, text):
    with pytest.raises(ConfigError, match=text):
        build_optimizer(name, params, groups())
