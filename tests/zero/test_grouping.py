"""Units respect blocks, kinds and sizes."""

import torch
from torch import nn

from deepspeed.zero import grouping
from deepspeed.zero.grouping import group_parameters


def names(units):
    return [[name for name, _ in unit] for unit in units]


def stack(width, blocks):
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(width, width),
            "h": nn.ModuleList(nn.Linear(width, width) for _ in range(blocks)),
        }
    )


def test_small_neighbours_share_a_unit():
    units = group_parameters(stack(4, 3).named_parameters(), lambda p: p.dtype, 10**9)
    assert len(units) == 1


def test_large_blocks_are_units_of_their_own(monkeypatch):
    monkeypatch.setattr(grouping, "MERGE_NUMEL", 10)
    monkeypatch.setattr(grouping, "TINY_NUMEL", 2)
    units = group_parameters(stack(4, 3).named_parameters(), lambda p: p.dtype, 10**9)
    assert names(units) == [["embed.weight"], *[[f"h.{i}.weight", f"h.{i}.bias"] for i in range(3)]]


def test_a_tiny_neighbour_joins_a_full_unit(monkeypatch):
    monkeypatch.setattr(grouping, "MERGE_NUMEL", 10)
    model = nn.ModuleDict({"h": nn.ModuleList([nn.Linear(4, 4)]), "norm": nn.LayerNorm(4)})
    assert len(group_parameters(model.named_parameters(), lambda p: p.dtype, 10**9)) == 1


def test_no_unit_exceeds_the_bucket_unless_one_parameter_does():
    units = group_parameters(stack(4, 3).named_parameters(), lambda p: p.dtype, 5)
    assert all(len(unit) == 1 or sum(p.numel() for _, p in unit) <= 5 for unit in units)


def test_kinds_never_mix_and_order_is_kept():
    model = stack(4, 3)
    model["h"][1].to(torch.bfloat16)
    units = group_parameters(model.named_parameters(), lambda p: p.dtype, 10**9)
    assert names(units) == [
        ["embed.weight", "h.0.weight", "h.0.bias", "h.2.weight", "h.2.bias"],
        ["h.1.weight", "h.1.bias"],
    ]
