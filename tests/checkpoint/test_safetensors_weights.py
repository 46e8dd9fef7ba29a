"""Saved weights are complete at every stage, and transformers reads them back to the byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from checkpoint_runs import make_engine, train
from harness import run_on_ranks
from safetensors import safe_open
from safetensors.torch import load_file
from test_damage import flip, on_first, refusal

import deepspeed
from deepspeed.checkpoint.records import Room
from deepspeed.checkpoint.safetensors_file import SafetensorsWriter
from deepspeed.checkpoint.weight_files import WeightFiles, size_in_bytes
from deepspeed.errors import CheckpointError, UsageError
from deepspeed.offload.disk import Disk


def in_folder(count, body, *args):
    with tempfile.TemporaryDirectory() as folder:
        run_on_ranks(count, body, folder, *args)


CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 29,
    "tie_word_embeddings": True,
}

READ_BACK = """
import sys, torch, transformers
folder, expected = sys.argv[1:]
model, found = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.bfloat16, output_loading_info=True
)
assert not any(found.values()), found
state, expected = model.state_dict(), torch.load(expected, weights_only=True)
assert state.keys() == expected.keys(), state.keys() ^ expected.keys()
for name, value in expected.items():
    assert value.dtype == state[name].dtype and torch.equal(value, state[name]), name
assert "deepspeed" not in sys.modules
"""


def read_back(folder, expected, config):
    """Compare, in a process that knows nothing of this package, what transformers reads."""
    config.save_pretrained(folder)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", READ_BACK, str(folder), str(expected)]
    ran = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr


def llama(folder, stage):
    config = transformers.LlamaConfig(**CONFIG)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    engine = deepspeed.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "checkpoint": {"save_safetensors": True},
        },
    )[0]
    tokens = torch.randint(0, 29, (1, 6), generator=torch.Generator().manual_seed(dist.get_rank()))
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
    place = Path(folder)
    engine.save_checkpoint(folder, tag="tag")
    engine.save_checkpoint(folder, tag="tag")
    engine.save_16bit_model(place / "one", "model.safetensors")
    engine.save_16bit_model(place / "cut", "model.safetensors", max_shard_size="1KB")
    engine.save_16bit_model(place / "torch", "pytorch_model.bin", max_shard_size="5KB")
    expected = {name: value.clone() for name, value in engine.module_state_dict().items()}
    if dist.get_rank() == 0:
        torch.save(expected, place / "expected.pt")
        for name in ("tag", "one", "cut", "torch"):
            read_back(place / name, place / "expected.pt", config)
        assert len(list((place / "cut").glob("*.safetensors"))) > 5
        with safe_open(place / "tag" / "model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert "lm_head.weight" not in file.keys()  # noqa: SIM118
        index = json.loads((place / "cut" / "model.safetensors.index.json").read_text())
        total = sum(value.nbytes for name, value in expected.items() if name != "lm_head.weight")
        assert index["metadata"] == {"total_size": total}
    dist.barrier()
    assert engine.load_checkpoint(folder)[0] == str(place / "tag")
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 3])
def test_transformers_reads_saved_weights_in_a_fresh_process(stage):
    in_folder(2, llama, stage)


def verified(folder):
    engine = make_engine(3, "bf16", model={"tied": True, "frozen": True})
    engine.settings.checkpoint.save_safetensors = True
    train(engine, [0])
    engine.save_checkpoint(folder, exclude_frozen_parameters=True)
    path = Path(folder) / "global_step1" / "model.safetensors"
    names = set(engine.module_state_dict(exclude_frozen_parameters=True)) - {"head.weight"}
    assert set(load_file(path)) == names
    dist.barrier()
    on_first(lambda: flip(path, path.stat().st_size - 1))
    assert "model.safetensors: damaged" in refusal(engine, folder)
    on_first(path.unlink)
    assert "model.safetensors: missing" in refusal(engine, folder)
    engine.destroy()


def test_safetensors_in_a_checkpoint_are_verified_with_it():
    in_folder(2, verified)


def full(folder):
    engine = make_engine(3)
    append = WeightFiles.append

    def fails(self, name, values):
        if name == "gain":
            raise OSError(28, "No space left on device")
        append(self, name, values)

    WeightFiles.append = fails
    try:
        with pytest.raises(CheckpointError, match=r"save_16bit_model: OSError: .*No space left"):
            engine.save_16bit_model(folder, "model.safetensors")
        engine.settings.checkpoint.save_safetensors = True
        with pytest.raises(CheckpointError, match="No space left"):
            engine.save_checkpoint(folder)
    finally:
        WeightFiles.append = append
    dist.barrier()
    assert os.listdir(folder) == []
    engine.destroy()


def test_a_full_disk_is_an_error_on_every_rank_and_leaves_nothing():
    in_folder(2, full)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (None, None),
        (7, 7),
        ("5GB", 5 * 10**9),
        ("200 mb", 2 * 10**8),
        ("1KiB", 1024),
        ("12B", 12),
        ("3k", 3000),
    ],
)
def test_a_size_is_bytes_or_text(text, nbytes):
    assert size_in_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "1.5GB", "-1", 0, "5XB", "5iB"])
def test_another_size_is_refused(text):
    with pytest.raises(UsageError, match=r"max_shard_size: expected bytes or a size"):
        size_in_bytes(text)


def test_any_dtype_and_shape_is_read_as_it_was_written(tmp_path):
    values = {
        "bytes": torch.arange(3, dtype=torch.uint8),
        "half": torch.arange(5).half(),
        "number": torch.tensor(1.5, dtype=torch.float64),
        "none": torch.empty(0, 3),
        "größe": torch.tensor([[True, False]]),
        "brain": torch.randn(2, 3).bfloat16(),
    }
    rooms = {name: Room(tuple(value.shape), value.dtype) for name, value in values.items()}
    writer = SafetensorsWriter(tmp_path / "file.safetensors", rooms, Disk())
    for name, value in values.items():
        writer.append(rooms[name], value)
    entry = writer.close()
    assert entry.size == (tmp_path / "file.safetensors").stat().st_size
    read = load_file(tmp_path / "file.safetensors")
    assert read.keys() == values.keys()
    assert all(
        torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in values.items()
    )
    with pytest.raises(UsageError, match=r"odd: safetensors holds no torch.complex128"):
        SafetensorsWriter(tmp_path / "odd.safetensors", {"odd": Room((1,), torch.complex128)}, Disk())
