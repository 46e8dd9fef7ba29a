"""Runs that stop and go on, compared with runs that do not."""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.distributed as dist
from toys import make_toy, toy_batch
from training import config_for, drive_engine

import deepspeed
from deepspeed.zero.access import safe_get_full_fp32_param, safe_get_full_optimizer_state
from deepspeed.zero.gathered import GatheredParameters

SCHEDULE = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.02, "warmup_num_steps": 5}}


def make_engine(
    stage=2,
    precision="fp32",
    tier=None,
    *,
    seed=0,
    params=False,
    optimizer=None,
    model=None,
    checkpoint=None,
    **zero,
):
    """Make an engine whose weights depend on `seed`; `tier` is a folder for states on disk, and `params`."""
    if tier is not None:
        zero |= {"offload_optimizer": {"device": "nvme", "nvme_path": tier}, "sub_group_size": 32}
    if params:
        zero |= {"offload_param": {"device": "nvme", "nvme_path": tier, "max_in_cpu": 0}}
    config = {**config_for(stage, precision, 1, 0.5, **zero), "scheduler": SCHEDULE}
    config["checkpoint"] = checkpoint or {}
    if optimizer is not None:
        del config["optimizer"]
    return deepspeed.initialize(model=make_toy(seed, **(model or {})), config=config, optimizer=optimizer)[0]


def train(engine, steps, ranks=None):
    """Train on data that depends on the step only; `ranks`: as many batches in a step, whatever the world size."""
    losses = []
    for step in steps:
        batch = toy_batch(step, 0, dist.get_rank() if ranks is None else 0)
        losses += drive_engine(engine, [batch])
    return losses


def everything(engine, keys=("exp_avg", "exp_avg_sq", "momentum_buffer")):
    """Return all weights, masters and states, whole."""
    found = {}
    for name, param in engine.module.named_parameters():
        with GatheredParameters(param):
            found[name] = param.detach().clone()
        if param.requires_grad and param.numel():
            found[f"master {name}"] = safe_get_full_fp32_param(param)
            for key in keys:
                found[f"{key} {name}"] = safe_get_full_optimizer_state(param, key)
    return {name: value for name, value in found.items() if value is not None}


def compare(one, other, **tolerance):
    """Compare what `everything` returned, bit by bit or within a tolerance."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


def draw():
    """Draw from every generator."""
    return random.random(), float(np.random.rand()), float(torch.rand(()))
