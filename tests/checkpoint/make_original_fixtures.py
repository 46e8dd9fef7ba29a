"""Write tests/checkpoint/original: run this with the original DeepSpeed 0.19 installed, on CPU.

    DS_ACCELERATOR=cpu python tests/checkpoint/make_original_fixtures.py

Every case trains, saves, notes what the original has then (`now` in truth.pt), trains on and notes that (`later`).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from original_cases import (
    CASES,
    MORE,
    STEPS,
    case_config,
    case_groups,
    case_model,
    case_optimizer,
    words_loss,
)

FOLDER = Path(__file__).parent / "original"


def write_cases(rank: int, ranks: int, port: int, names: list[str], folder: Path) -> None:
    """Write the cases of one world size on one rank."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks)
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True  # it works on CPU too
    deepspeed.init_distributed(dist_backend="gloo")
    for name in names:
        write_case(CASES[name], folder / name)
    dist.destroy_process_group()


def write_case(case: dict, folder: Path) -> None:
    """Train, save, train on."""
    import deepspeed

    model = case_model(case)
    optimizer = case_optimizer(case, model)
    made = deepspeed.initialize(
        model=model,
        config=case_config(case),
        optimizer=optimizer,
        model_parameters=None if optimizer is not None else case_groups(case, model),
    )
    engine = made[0]
    train(engine, range(STEPS))
    client = {"epoch": 3, "args": argparse.Namespace(lr=0.1), "seen": torch.arange(3)}
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
    engine.save_checkpoint(
        str(folder), client_state=client, exclude_frozen_parameters=case.get("left_out", False)
    )
    dist.barrier()
    now = everything(engine)
    losses = train(engine, range(STEPS, STEPS + MORE))
    truth = {"now": now, "later": everything(engine), "losses": losses}
    del truth["later"]["state"]
    if dist.get_rank() == 0:
        torch.save(truth, folder / "truth.pt")
        for script in folder.rglob("*.py"):
            script.unlink()
    dist.barrier()
    engine.destroy()


def train(engine, steps: range) -> list[float]:
    """Return the loss of each step, averaged over ranks."""
    losses = []
    for step in steps:
        loss = words_loss(engine, step, dist.get_rank())
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / dist.get_world_size())
    return losses


def everything(engine) -> dict:
    """Return all values by name, and the numbers of the run."""
    found: dict = {"master": {}, "state": {}}
    (note_zero if engine.zero_optimization_stage() else note_whole)(engine, found)
    found["lr"] = engine.get_lr()
    found["counters"] = [engine.global_steps, engine.global_samples, engine.skipped_steps]
    found["scale"] = getattr(engine.optimizer, "cur_scale", None)
    return found


def note_zero(engine, found: dict) -> None:
    """Note masters and states at stages 1 to 3."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    inner = engine.optimizer.optimizer.state.values()
    keys = sorted(
        {key for state in inner for key, value in state.items() if torch.is_tensor(value) and value.dim()}
    )
    if engine.zero_optimization_stage() < 3 and len(engine.optimizer.param_groups) > 1:
        keys = []  # the original cannot tell the states of a second group
    for name, param in engine.module.named_parameters():
        if param.requires_grad:
            found["master"][name] = safe_get_full_fp32_param(param).clone()
            for key in keys:
                found["state"].setdefault(key, {})[name] = safe_get_full_optimizer_state(param, key).clone()


def note_whole(engine, found: dict) -> None:
    """Note masters and states at stage 0, where 16-bit engines keep masters as copies."""
    names = {id(param): name for name, param in engine.module.named_parameters()}
    inner, pairs = engine.optimizer, []
    if hasattr(inner, "fp32_groups_flat"):  # one flat master for each group
        for params, flat in zip(inner.fp16_groups, inner.fp32_groups_flat, strict=True):
            start = 0
            for param in params:
                pairs.append((param, flat, slice(start, start := start + param.numel())))
    elif hasattr(inner, "fp32_groups"):
        for params, masters in zip(inner.fp16_groups, inner.fp32_groups, strict=True):
            pairs += [(param, master, slice(None)) for param, master in zip(params, masters, strict=True)]
    else:
        pairs = [(param, param, slice(None)) for param in inner.state]
    states = getattr(inner, "optimizer", inner).state
    for param, master, cut in pairs:
        name = names[id(param)]
        found["master"][name] = master.detach().reshape(-1)[cut].view(param.shape).clone()
        for key in ("exp_avg", "exp_avg_sq"):
            value = states[master][key].reshape(-1)[cut].view(param.shape)
            found["state"].setdefault(key, {})[name] = value.clone()


def main() -> None:
    """Write all cases, or those named."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--folder", type=Path, default=FOLDER)
    chosen = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for ranks in (1, 2, 3):
        names = [name for name in chosen.cases if CASES[name].get("ranks", 2) == ranks]
        arguments = [
            (rank, ranks, 29700 + ranks, names, chosen.folder) for rank in range(ranks if names else 0)
        ]
        processes = [context.Process(target=write_cases, args=one) for one in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            if process.exitcode:
                sys.exit(f"a rank of {ranks} failed")


if __name__ == "__main__":
    main()
