"""Train an engine beside plain PyTorch on the same data, and compare everything."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from reference import PlainTrainer
from toys import make_toy, toy_batch, toy_loss

import deepspeed
from deepspeed.zero.access import safe_get_full_fp32_param, safe_get_full_optimizer_state
from deepspeed.zero.gathered import GatheredParameters

STEPS = 4
TOLERANCE = {"fp32": 2e-6, "bf16": 3e-2, "fp16": 4e-3}
STORAGE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ADAMW = {"lr": 0.01, "betas": [0.9, 0.95], "weight_decay": 0.1}


def config_for(stage: int, precision: str, gas: int, clip: float, **zero) -> dict:
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": gas,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **zero},
        "optimizer": {"type": "AdamW", "params": ADAMW},
    }
    if precision != "fp32":
        config[precision] = {"enabled": True}
    if precision == "fp16":
        config["fp16"]["initial_scale_power"] = 8
    return config


def train_both(
    config: dict,
    *,
    precision="fp32",
    model=None,
    steps=STEPS,
    make_reference=None,
    drive=None,
    prepare=None,
    loss_of=toy_loss,
):
    """Train engine and reference on the same data; return them.

    Args:
        drive: trains the engine on a list of micro-batches, and returns their losses.
        prepare: returns what the engine is given, made from a model.
        loss_of: returns the reference's loss of (model, batch).
    """
    gas, clip = config["gradient_accumulation_steps"], config.get("gradient_clipping", 1.0)
    model = model or {}
    make_reference = make_reference or partial(torch.optim.AdamW, **{**ADAMW, "betas": (0.9, 0.95)})
    plain = PlainTrainer(make_toy(**model), make_reference, storage=STORAGE[precision], clip=clip)
    toy = make_toy(seed=dist.get_rank(), **model)
    engine, *_ = deepspeed.initialize(model=prepare(toy) if prepare else toy, config=config)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    drive = drive or drive_engine
    for step in range(steps):
        batches = [toy_batch(step, micro, r) for micro in range(gas) for r in range(ranks)]
        expected = plain.step(batches, loss_of, gas=gas)
        losses = drive(engine, [toy_batch(step, micro, rank) for micro in range(gas)])
        mean = torch.stack(losses).mean()
        dist.all_reduce(mean)
        assert float(mean / ranks) == pytest.approx(expected, rel=5 * TOLERANCE[precision])
        norm = engine.get_global_grad_norm()
        assert norm == pytest.approx(float(plain.grad_norm), rel=5 * TOLERANCE[precision])
    return engine, plain


def drive_engine(engine, batches):
    losses = []
    for batch in batches:
        loss = toy_loss(engine, batch)
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return losses


def assert_equal_training(engine, plain, tolerance: float, states=("exp_avg", "exp_avg_sq")) -> None:
    """Master weights, stored weights and optimizer moments equal the reference's."""
    expected = dict(plain.master.named_parameters())
    for name, param in engine.module.named_parameters():
        reference = expected[name.removeprefix("_orig_mod.")]
        with GatheredParameters(param):
            torch.testing.assert_close(
                param.float(),
                reference,
                rtol=max(tolerance, 8e-3 if param.dtype != torch.float32 else 0),
                atol=tolerance,
                msg=name,
            )
        if not param.requires_grad or param.numel() == 0:
            continue
        torch.testing.assert_close(
            safe_get_full_fp32_param(param),
            reference.detach(),
            rtol=tolerance,
            atol=tolerance,
            msg=f"master {name}",
        )
        for key in states:
            ours, theirs = (
                safe_get_full_optimizer_state(param, key),
                plain.optimizer.state[reference].get(key),
            )
            if theirs is None:
                assert ours is None or not ours.any(), f"{key} of {name}: reference has none"
            else:
                scale = float(theirs.abs().max()) if theirs.numel() else 0.0
                torch.testing.assert_close(
                    ours, theirs, rtol=tolerance, atol=tolerance * scale, msg=f"{key} {name}"
                )
