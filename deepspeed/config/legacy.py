"""Old names: how a configuration written for older releases is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

RENAMED = {
    "bfloat16": "bf16",
    "zero_optimization.gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
}

OFFLOADS = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}

REMOVED = {"zero_optimization.legacy_stage1": "that implementation of stage 1 is gone; remove the key"}

DROPPED = dict.fromkeys(
    ("compile.backend", "compile.disable", "compile.enabled", "compile.kwargs"),
    "engine.compile() compiles, with its arguments",
)
"""Keys without effect, and what has it now."""


def old_names(section: str) -> list[str]:
    """Return the keys of this file that stand in `section` (a path, empty for the top level)."""
    listed = [*RENAMED, *REMOVED, *DROPPED, *(f"zero_optimization.{name}" for name in OFFLOADS)]
    return [path.rpartition(".")[2] for path in listed if path.rpartition(".")[0] == section]


@dataclass
class Modernised:
    """A tree in today's names, and what was done to it."""

    tree: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    spelled: dict[str, str] = field(default_factory=dict)
    """Today's path -> the path the user wrote."""


def modernise(tree: dict[str, Any]) -> Modernised:
    """Rewrite old names in `tree`, in place."""
    done = Modernised(tree)
    _expand_boolean_stage(done)
    _refuse_removed(done)
    _drop(done)
    _rename(done)
    _move_offloads(done)
    return done


def _parent(tree: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    section, _, name = path.rpartition(".")
    parent = tree.get(section) if section else tree
    return (parent if isinstance(parent, dict) else {}), name


def _expand_boolean_stage(done: Modernised) -> None:
    value = done.tree.get("zero_optimization")
    if not isinstance(value, bool):
        return
    section: dict[str, Any] = {"stage": int(value)}
    done.spelled["zero_optimization.stage"] = "zero_optimization"
    if value and "allgather_size" in done.tree:
        section["allgather_bucket_size"] = done.tree.pop("allgather_size")
        done.spelled["zero_optimization.allgather_bucket_size"] = "allgather_size"
    done.tree["zero_optimization"] = section
    done.warnings.append(
        f'zero_optimization: {str(value).lower()} is the old form, read as {{"stage": {int(value)}}}'
    )


def _refuse_removed(done: Modernised) -> None:
    for path, reason in REMOVED.items():
        parent, name = _parent(done.tree, path)
        if parent.pop(name, False) not in (False, "auto"):
            done.errors.append(f"{path}: expected false, got true; {reason}")


def _drop(done: Modernised) -> None:
    for path, instead in DROPPED.items():
        parent, name = _parent(done.tree, path)
        if name in parent:
            del parent[name]
            done.warnings.append(f"{path}: has no effect; {instead}")


def _rename(done: Modernised) -> None:
    for path, today in RENAMED.items():
        parent, old = _parent(done.tree, path)
        if old not in parent:
            continue
        value = parent.pop(old)
        now = path.removesuffix(old) + today
        if today in parent:
            done.warnings.append(f"{path} is ignored: {now} is given too")
            continue
        parent[today] = value
        done.spelled[now] = path
        done.warnings.append(f"{path} is the old name of {now}")


def _move_offloads(done: Modernised) -> None:
    for old, today in OFFLOADS.items():
        path, now = f"zero_optimization.{old}", f"zero_optimization.{today}"
        parent, _ = _parent(done.tree, path)
        if old not in parent:
            continue
        value = parent.pop(old)
        if value not in (True, False, None, "true", "false", 0, 1):
            done.errors.append(f"{path}: expected true or false, got {value!r}")
        elif value not in (True, "true"):
            continue
        elif parent.get(today) is not None:
            done.errors.append(f"{path}: expected it absent beside {now}, got true; remove {path}")
        else:
            parent[today] = {"device": "cpu"}
            done.spelled[f"{now}.device"] = path
            done.warnings.append(f'{path} is the old form of {now}: {{"device": "cpu"}}')
