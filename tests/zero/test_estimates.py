"""What the estimates say is what an engine holds, and what their formulas say."""

from __future__ import annotations

import pytest
import torch
from harness import on_ranks
from torch import nn

import deepspeed
from deepspeed.errors import ConfigError
from deepspeed.zero.estimates import (
    estimate_zero2_model_states_mem_needs,
    estimate_zero2_model_states_mem_needs_all_cold,
    estimate_zero2_model_states_mem_needs_all_live,
    estimate_zero3_model_states_mem_needs,
    estimate_zero3_model_states_mem_needs_all_cold,
    estimate_zero3_model_states_mem_needs_all_live,
)
from deepspeed.zero.init import Init

WIDTH = 64


class Net(nn.Module):
    """An embedding, two blocks and a head; every size is a multiple of what the layout aligns to."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, 64)
        if frozen:
            self.blocks.requires_grad_(False)

    def forward(self, tokens):
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden)


BLOCK = 2 * 4 * WIDTH * WIDTH + 5 * WIDTH
TOTAL = 2 * BLOCK + 2 * 64 * WIDTH + 64


def held_bytes(stage: int, *, frozen: bool) -> int:
    """Bytes of this rank's weights, masters, moments and gradients, between backward and step."""
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
    }
    engine, *_ = deepspeed.initialize(model=Net(frozen), config=config)
    tokens = torch.arange(8).view(2, 4)
    for micro in range(4):
        engine.backward(engine(tokens).float().logsumexp(-1).mean())
        if micro < 3:
            engine.step()
    trained = engine.optimizer.units
    params = list(engine.module.parameters())
    units = {id(param.ds_slot.unit): param.ds_slot.unit for param in params if hasattr(param, "ds_slot")}
    held = sum(unit.held.nbytes for unit in units.values())
    tensors = [param for param in params if not hasattr(param, "ds_slot")]
    tensors += [unit.master for unit in trained]
    tensors += [param.ds_slot.gradients.landed.shard for unit in trained for param in unit.params[:1]]
    tensors += [
        value
        for state in engine.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.dim() > 0
    ]
    assert not any(unit.flat.untyped_storage().nbytes() for unit in units.values() if unit.sharding.releases)
    engine.destroy()
    return held + sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("frozen", [False, True])
@on_ranks(2)
def test_stage_2_without_offload_is_what_an_engine_holds(frozen):
    (_, plain) = estimate_zero2_model_states_mem_needs_all_live(Net(frozen), num_gpus_per_node=2)
    assert plain.options == {"offload_optimizer": "none"}
    assert plain.per_gpu == held_bytes(2, frozen=frozen)


@pytest.mark.parametrize("frozen", [False, True])
@on_ranks(2)
def test_stage_3_without_offload_is_what_an_engine_holds_and_the_unit_in_use(frozen):
    *_, plain = estimate_zero3_model_states_mem_needs_all_live(Net(frozen), num_gpus_per_node=2)
    assert plain.options == {"offload_param": "none", "offload_optimizer": "none", "zero_init": False}
    assert plain.per_gpu - 4 * BLOCK == held_bytes(3, frozen=frozen)


@on_ranks(2)
def test_a_sharded_model_measures_like_a_whole_one():
    with Init():
        sharded = Net()
    whole = estimate_zero3_model_states_mem_needs_all_live(Net(), 2)
    assert estimate_zero3_model_states_mem_needs_all_live(sharded, 2) == whole


def test_a_model_on_meta_measures_like_its_numbers():
    with torch.device("meta"):
        model = Net()
    assert estimate_zero2_model_states_mem_needs_all_live(model, 4, 2) == (
        estimate_zero2_model_states_mem_needs_all_cold(TOTAL, 4, 2)
    )
    assert estimate_zero3_model_states_mem_needs_all_live(model, 4, 2) == (
        estimate_zero3_model_states_mem_needs_all_cold(TOTAL, BLOCK, 4, 2)
    )


def test_the_tables_hold_what_the_single_estimates_return():
    needs = estimate_zero3_model_states_mem_needs_all_cold(10**9, 10**7, 4, 2, 1.25)
    assert len(needs) == 6
    for one in needs:
        host, device, in_use = estimate_zero3_model_states_mem_needs(
            10**9,
            10**7,
            4,
            2,
            cpu_offload=one.options["offload_optimizer"] == "cpu",
            cpu_offload_params=one.options["offload_param"] == "cpu",
            zero_init=one.options["zero_init"],
            additional_buffer_factor=1.25,
        )
        assert (host, device, in_use) == (one.per_cpu, one.per_gpu, 4 * 10**7)
    for one in estimate_zero2_model_states_mem_needs_all_cold(10**9, 4, 2, 1.25):
        offload = one.options["offload_optimizer"] == "cpu"
        assert estimate_zero2_model_states_mem_needs(10**9, 4, 2, offload, 1.25) == (one.per_cpu, one.per_gpu)


def test_the_documented_formulas():
    total, largest, ranks, per_node, factor = 10**9, 10**7, 8, 4, 1.5
    two = estimate_zero2_model_states_mem_needs_all_cold(total, per_node, 2, factor)
    assert [(one.per_cpu, one.per_gpu) for one in two] == [
        (factor * max(4 * total * per_node, 16 * total * per_node // ranks), 2 * total),
        (factor * 4 * total * per_node, 2 * total + 16 * total // ranks),
    ]
    three = estimate_zero3_model_states_mem_needs_all_cold(total, largest, per_node, 2, factor)
    assert [(one.per_cpu, one.per_gpu) for one in three if one.options["zero_init"]] == [
        (factor * 18 * total * per_node // ranks, 4 * largest),
        (factor * 16 * total * per_node // ranks, 4 * largest + 2 * total // ranks),
        (0, 4 * largest + 18 * total // ranks),
    ]
    assert {one.per_cpu for one in three if not one.options["zero_init"]} == {factor * 4 * total * per_node}


def test_what_is_printed_is_a_table_with_the_sizes(capsys):
    estimate_zero3_model_states_mem_needs_all_cold(3 * 10**9, 10**8, 8)
    output = capsys.readouterr().out
    assert "3.0B parameters, 100.0M in the largest unit; nodes: 1, ranks on each: 8" in output
    for text in ("per CPU", "per GPU", "offload_param", "offload_optimizer", "zero_init"):
        assert text in output
    assert f"{(4e8 + 18 * 3e9 / 8) / 2**30:.2f} GiB" in output


def test_a_machine_without_ranks_is_refused():
    with pytest.raises(ConfigError, match="num_gpus_per_node: expected 1 or more, got 0"):
        estimate_zero2_model_states_mem_needs(10, num_gpus_per_node=0)
