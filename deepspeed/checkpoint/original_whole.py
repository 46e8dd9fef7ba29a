"""Masters and optimizer states of the original's stage 0, which are in the order of param groups, without names.

In 16-bit runs a master tells its name: rounded, it is a weight. In fp32 there are no masters, and the order of the
weights and the shapes of the states have to do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspeed.checkpoint.original_values import Cut, Ranges, state_of
from deepspeed.errors import CheckpointError


def read_whole(
    ranges: Ranges, path: Path, optimizer: dict[str, Any], weights: dict[str, Tensor], *, states: bool
) -> list[list[str]]:
    """Take masters and states; return the names of the parameters in each param group.

    Args:
        ranges: to add to.
        path: of the file.
        optimizer: its ``optimizer``.
        weights: all parameters, each once.
        states: take states where they are not beside masters, too.

    Raises:
        CheckpointError: it cannot be told which parameters the states are of.
    """
    inner = optimizer.get("optimizer_state_dict", optimizer)
    left = dict(weights)
    if "fp32_groups_flat" in optimizer:
        return [
            _flat_names(ranges, path, flat, state_of(inner, index), left)
            for index, flat in enumerate(optimizer["fp32_groups_flat"])
        ]
    order = [group["params"] for group in inner["param_groups"]]
    if "fp32_groups" not in optimizer and not states:
        return []
    if "fp32_groups" not in optimizer:
        groups = _names_by_shape(path, order, inner["state"], weights)
        for numbers, names in zip(order, groups, strict=True):
            for number, name in zip(numbers, names, strict=False):
                ranges.add_states(name, inner["state"].get(number, {}))
        return groups
    groups = []
    for numbers, masters in zip(order, optimizer["fp32_groups"], strict=True):
        groups.append([])
        for number, master in zip(numbers, masters, strict=True):
            name = _name_of(path, left, _rounds_to(master))
            groups[-1].append(name)
            whole = Cut(name, 0, 0, master.numel())
            ranges.add_flat(path, master, {}, [whole])
            ranges.add_states(name, inner["state"].get(number, {}))
    return groups


def _flat_names(
    ranges: Ranges, path: Path, flat: Tensor, states: dict[str, Any], left: dict[str, Tensor]
) -> list[str]:
    """Take a group whose masters are one flat."""
    cuts: list[Cut] = []
    place = 0
    while place < flat.numel():
        name = _name_of(path, left, _rounds_to(flat[place:]))
        numel = ranges.shapes[name].numel()
        cuts.append(Cut(name, 0, place, numel))
        place += numel
    ranges.add_flat(path, flat, states, cuts)
    return [cut.name for cut in cuts]


def _rounds_to(master: Tensor) -> Callable[[Tensor], bool]:
    """Return whether a master, or a flat that begins with it, rounds to a weight."""

    def compare(weight: Tensor) -> bool:
        if not 0 < weight.numel() <= master.numel() or (master.dim() > 1 and master.shape != weight.shape):
            return False
        begun = master.reshape(-1)[: weight.numel()]
        return torch.equal(begun.to(weight.dtype), weight.reshape(-1))

    return compare


def _name_of(path: Path, left: dict[str, Tensor], fits: Callable[[Tensor], bool]) -> str:
    """Return the first weight that fits and was not taken yet."""
    for name, weight in left.items():
        if fits(weight):
            del left[name]
            return name
    raise _unknown(path, "a master rounds to none of the weights")


def _names_by_shape(
    path: Path, order: list[list[int]], states: dict[int, Any], weights: dict[str, Tensor]
) -> list[list[str]]:
    """Return names for the numbers of the parameters in each group."""
    shapes = {number: _shape_in(states.get(number, {})) for group in order for number in group}
    if len(order) == 1 and len(order[0]) == len(weights):
        named = dict(zip(order[0], weights, strict=True))
        if all(shapes[number] in (None, weights[name].shape) for number, name in named.items()):
            return [list(weights)]
    if not any(states.values()):
        return [[] for _ in order]  # nothing to tell them by, and nothing to restore
    names: dict[int, str] = {}
    for shape in set(shapes.values()):
        fitting = [name for name, weight in weights.items() if weight.shape == shape]
        groups = [[number for number in group if shapes[number] == shape] for group in order]
        groups = [group for group in groups if group]
        if len(groups) != 1 or len(groups[0]) != len(fitting):
            raise _unknown(
                path, f"parameters of shape {shape} are in several groups, or some of them are frozen"
            )
        names |= zip(groups[0], fitting, strict=True)
    return [[names[number] for number in group] for group in order]


def _shape_in(states: dict[str, Any]) -> torch.Size | None:
    """Return the shape of a parameter, that of the largest of its states."""
    tensors = [value for key, value in states.items() if isinstance(value, Tensor) and key != "step"]
    return max(tensors, key=Tensor.numel).shape if tensors else None


def _unknown(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: the original's stage 0 saves optimizer states without names, and {why}; load the weights only "
        "(load_optimizer_states=False)"
    )
