"""Muon is torch's Muon on matrices and Adam on the rest."""

from __future__ import annotations

import pytest
import torch

from deepspeed.errors import ConfigError
from deepspeed.ops.adam import FusedAdam
from deepspeed.ops.muon import MuonWithAuxAdam, orthogonalise, split_muon_groups


def train(optimizer, params, steps=4):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


def weights(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


SHAPES = ((6, 9), (9, 6), (5, 5))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("method", ["gram", "standard"])
def test_matrices_equal_torchs_muon(method):
    """torch multiplies in bf16, so equal means equal to its rounding."""
    ours, theirs = weights(*SHAPES), weights(*SHAPES)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    optimizer = MuonWithAuxAdam([{"params": ours, "use_muon": True}], ns_method=method, **options)
    train(optimizer, ours)
    train(torch.optim.Muon(theirs, **options), theirs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0.02, atol=0.02)


def test_the_rest_equals_adam():
    ours, theirs = weights((4,), (3, 2)), weights((4,), (3, 2))
    train(MuonWithAuxAdam([{"params": ours, "use_muon": False}], lr=0.1, weight_decay=0.1), ours)
    train(FusedAdam(theirs, lr=0.1, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.1), theirs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (8, 5, 2)])
def test_both_methods_give_nearly_orthonormal_rows_or_columns(shape):
    (matrix,) = weights(shape)
    results = [orthogonalise(matrix.detach(), method=method) for method in ("gram", "standard")]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    values = torch.linalg.svdvals(results[0].reshape(shape[0], -1))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_rates_fall_back_from_the_parts_own_to_the_common_to_the_default():
    def rates(**options):
        (matrix,), (vector,) = weights((2, 2)), weights((2,))
        groups = [{"params": [matrix], "use_muon": True}, {"params": [vector], "use_muon": False}]
        return [group["lr"] for group in MuonWithAuxAdam(groups, **options).param_groups]

    assert rates() == [0.02, 3e-4]
    assert rates(lr=0.5) == [0.5, 0.5]
    assert rates(lr=0.5, muon_lr=0.0) == [0.0, 0.5]
    assert rates(adam_lr=0.1) == [0.02, 0.1]


def test_groups_are_split_by_mark_then_by_shape():
    matrix, embedding, bias = weights((2, 2), (4, 2), (2,))
    embedding.use_muon = False
    split = split_muon_groups([{"params": [matrix, embedding, bias], "weight_decay": 0.1}])
    assert [(group["use_muon"], len(group["params"])) for group in split] == [(True, 1), (False, 2)]
    assert all(group["weight_decay"] == 0.1 for group in split)
    marked = [{"params": [matrix, bias], "use_muon": False}]
    assert split_muon_groups(marked) == marked


@pytest.mark.parametrize(
    ("group", "options", "text"),
    [
        (
            {"use_muon": True},
            {},
            r"use_muon: expected parameters of two or more dimensions, got shape \(2,\)",
        ),
        ({}, {"ns_method": "exact"}, 'ns_method: expected "gram" or "standard"'),
    ],
)
def test_mistakes_are_named(group, options, text):
    with pytest.raises(ConfigError, match=text):
        MuonWithAuxAdam([{"params": weights((2,)), **group}], **options)
