"""What a checkpoint of the original tells of the run: counters, loss scale, options of the optimizer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deepspeed.checkpoint.unpickling import Inert

OWN_KEYS = {
    *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params"),
    *("frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names"),
    *("skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size", "ds_config"),
    *("checkpoint_parallel_dimensions", "ds_version"),
}
"""Keys of the main file that are not the user's."""


def about_run(main: dict[str, Any], states: list[dict[str, Any]], stage: int) -> dict[str, Any]:
    """Return counters and settings as manifests have them.

    Args:
        main: contents of the main file.
        states: every rank's ``optimizer_state_dict``.
        stage: of ZeRO.
    """
    ranks, accumulation = int(main["dp_world_size"]), _accumulation(main.get("ds_config"))
    version = main.get("ds_version")
    return {
        "stage": stage,
        "world_size": ranks,
        "ds_version": version,
        "global_steps": int(main.get("global_steps") or 0),
        "micro_steps": int(main.get("global_steps") or 0) * accumulation,
        "global_samples": int(main.get("global_samples") or 0),
        "skipped_steps": int(main.get("skipped_steps") or 0),
        "loss_scaler": _scaler(states[0] if states else main.get("optimizer") or {}),
        "data": None,
        "optimizer_files": [],
        "imported": f"DeepSpeed {version} (stage {stage}, {ranks} rank{'s' if ranks > 1 else ''})",
    }


def group_options(main: dict[str, Any], states: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the options of the param groups."""
    holder = states[0] if states else main.get("optimizer") or {}
    inner = holder.get("base_optimizer_state", holder.get("optimizer_state_dict", holder))
    groups = inner.get("param_groups", ()) if isinstance(inner, dict) else ()
    return [
        {
            key: value.item() if isinstance(value, Tensor) else value
            for key, value in group.items()
            if key not in ("params", "step")
        }
        for group in groups
    ]


def _accumulation(config: Any) -> int:
    """Return how many micro-batches a step had, as far as the configuration tells."""
    steps = config.get("gradient_accumulation_steps") if isinstance(config, dict) else None
    return steps if isinstance(steps, int) else 1


def _scaler(states: dict[str, Any]) -> dict[str, Any] | None:
    """Return the state of a dynamic loss scale: an object's, or at stage 0 the numbers beside the states."""
    scaler = states.get("loss_scaler")
    found = scaler.state if isinstance(scaler, Inert) else states
    if "last_overflow_iter" not in found:  # static, as it also is where nothing is scaled
        return None
    made = {
        "scale": float(found["cur_scale"]),
        "clean_steps": found["cur_iter"] - found["last_overflow_iter"] - 1,
    }
    if "cur_hysteresis" in found:
        made["tolerance"] = found["cur_hysteresis"]
    return made
