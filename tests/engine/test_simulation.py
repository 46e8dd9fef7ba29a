"""An engine runs on tensors without values, as one rank of as many as one likes: no way through it needs a value."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor

import pytest


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Executor]:
    """A process of its own, whose default group is not of the tests."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        yield executor


def simulate(stage: int, ranks: int, precision: dict[str, dict[str, bool]]) -> tuple[int, int, int]:
    """Train on the host; return the steps, the bytes that stay, and the collectives of the last step."""
    import torch
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    import deepspeed
    from deepspeed.comm import comms_logger

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW"},
        **precision,
    }
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    with FakeTensorMode():
        with deepspeed.zero.Init(config_dict_or_path=config, enabled=stage == 3):
            model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(3)))
        engine, *_ = deepspeed.initialize(model=model, config=config)
        comms_logger.configure(enabled=True)
        for _ in range(3):
            comms_logger.reset()
            engine.backward(engine(torch.randn(2, 256)).float().square().mean())
            engine.step()
        calls = sum(tally.count for tally in comms_logger.tallies.values())
        comms_logger.configure(enabled=False)
        result = engine.global_steps, engine.memory_report().persistent, calls
        engine.destroy()
    dist.destroy_process_group()
    return result


@pytest.mark.parametrize("precision", [{}, {"bf16": {"enabled": True}}, {"fp16": {"enabled": True}}])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_any_number_of_ranks_is_simulated_with_plain_fake_tensors(
    elsewhere: Executor, stage, precision
) -> None:
    (steps, few, calls), (_, many, calls_of_many) = (
        elsewhere.submit(simulate, stage, ranks, precision).result() for ranks in (2, 64)
    )

    assert steps == 3
    assert many < few if stage else many == few
    assert calls == calls_of_many
