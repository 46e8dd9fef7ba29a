"""Which parameters share a unit: a transformer block together, small neighbours merged, none too large.

At stages 0 to 2 a unit is what is reduced in one collective, so two sizes bound it: `max_numel`
(`reduce_bucket_size`) from above, and MERGE_NUMEL from below, under which a collective of its own costs
more than waiting for the neighbours. Larger units would be sent later, and need larger buffers.

At stage 3 a unit is what is gathered around the forward of a module, so modules decide (`group_blocks`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Hashable, Iterable
from itertools import groupby

from torch import nn

MERGE_NUMEL = 4_000_000
"""Elements from which a unit takes in no more neighbours, but for tiny ones."""

TINY_NUMEL = 500_000

NamedParameter = tuple[str, nn.Parameter]


def group_parameters(
    named: Iterable[NamedParameter], key: Callable[[nn.Parameter], Hashable], max_numel: int
) -> list[list[NamedParameter]]:
    """Split parameters, in their given order, into the lists that become units.

    Args:
        named: unique (name, parameter) pairs in registration order.
        key: parameters whose keys differ (dtype, reduction dtype, ...) never share a unit.
        max_numel: most elements a unit may hold; a larger parameter is a unit of its own.

    Returns:
        Units in registration order of their first parameter.
    """
    units: list[list[NamedParameter]] = []
    open_units: dict[Hashable, list[NamedParameter]] = {}
    for _, block in groupby(named, key=lambda pair: _block_of(pair[0])):
        for kind, members in _by_key(block, key).items():
            for part in _split(members, max_numel):
                current = open_units.get(kind)
                if current is not None and _fits(current, part, max_numel):
                    current.extend(part)
                else:
                    open_units[kind] = part
                    units.append(part)
    return units


def group_blocks(
    named: Iterable[NamedParameter],
    key: Callable[[nn.Parameter], Hashable],
    together: Collection[str],
    live_numel: int,
) -> list[list[NamedParameter]]:
    """Split parameters into the lists that are gathered and released together.

    A repeated block is one, so is a module of `together`, and every other module that owns parameters. What is
    called block by block then needs one gather for each, and modules inside a block may be called or not, on
    each rank as it likes. A block of more than `live_numel` elements is split into the modules that own them.

    Args:
        named: unique (name, parameter) pairs in registration order.
        key: parameters whose keys differ never share a list.
        together: names of modules whose parameters belong together.
        live_numel: most elements that may be gathered.
    """
    parts: dict[str, list[NamedParameter]] = {}
    for pair in named:
        parts.setdefault(_part_of(pair[0], together), []).append(pair)
    lists: list[list[NamedParameter]] = []
    for name, members in parts.items():
        fine = [members]
        if name not in together and _numel(members) > live_numel:
            fine = [list(group) for _, group in groupby(members, key=lambda pair: _owner_of(pair[0]))]
        for part in fine:
            lists.extend(_by_key(part, key).values())
    return lists


def _part_of(name: str, together: Collection[str]) -> str:
    owner = _owner_of(name)
    steps = owner.split(".")
    prefixes = [".".join(steps[: depth + 1]) for depth in range(len(steps))]
    chosen = [prefix for prefix in prefixes if prefix in together]
    return chosen[0] if chosen else _block_of(name) or owner


def _owner_of(name: str) -> str:
    return name.rpartition(".")[0]


def _fits(current: list[NamedParameter], part: list[NamedParameter], max_numel: int) -> bool:
    have, more = _numel(current), _numel(part)
    return have + more <= max_numel and (have < MERGE_NUMEL or more < TINY_NUMEL)


def _block_of(name: str) -> str:
    """The repeated block of a parameter: its name up to the first number (``h.3.attn.weight``: ``h.3``)."""
    match = re.match(r"(.*?\.)?\d+(?=\.)", name)
    return match.group(0) if match else ""


def _by_key(
    members: Iterable[NamedParameter], key: Callable[[nn.Parameter], Hashable]
) -> dict[Hashable, list[NamedParameter]]:
    kinds: dict[Hashable, list[NamedParameter]] = {}
    for name, param in members:
        kinds.setdefault(key(param), []).append((name, param))
    return kinds


def _split(members: list[NamedParameter], max_numel: int) -> list[list[NamedParameter]]:
    parts: list[list[NamedParameter]] = [[]]
    for name, param in members:
        if parts[-1] and _numel(parts[-1]) + param.numel() > max_numel:
            parts.append([])
        parts[-1].append((name, param))
    return parts


def _numel(members: list[NamedParameter]) -> int:
    return sum(param.numel() for _, param in members)
