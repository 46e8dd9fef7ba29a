"""Anchors: the modules whose forward needs units, and the hooks there that tell the gatherer.

Note [Blocks in graphs]
torch.compile makes one graph of all blocks that are alike, unless they differ in their hooks' numbers, of which it
guards each. From the first time on that it traces a hook, hooks are therefore only on modules that bring units in for
what lies inside them, and those hooks end a graph (untraced.py). A part of a block that is called by itself is then
gathered on demand, for each of its operations where no other forward is running.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from deepspeed.common.untraced import Hook, untraced_class
from deepspeed.zero import external
from deepspeed.zero.unit import Unit

Anchors = dict[nn.Module, list[Unit]]
CALL = nn.Module._call_impl.__code__
"""What runs a module's hooks and its forward."""


def anchors_of(module: nn.Module, units: Iterable[Unit]) -> Anchors:
    """Return the modules whose forward needs units: owners of their parameters, their block, and the root."""
    unit_of = {id(param): unit for unit in units for param in unit.params}
    anchors: dict[nn.Module, dict[Unit, None]] = {module: {}}
    paths: dict[Unit, list[list[str]]] = {}
    for path, part in module.named_modules():
        external.of(part)
        for param in part._parameters.values():
            unit = unit_of.get(id(param))
            if unit is not None:
                anchors.setdefault(part, {})[unit] = None
                paths.setdefault(unit, []).append(path.split("."))
    for unit, owners in paths.items():
        block = module.get_submodule(_common(owners))
        if block is not module:
            anchors.setdefault(block, {})[unit] = None
    return {part: list(needed) for part, needed in anchors.items()}


def _bringing(
    module: nn.Module, anchors: Anchors, around: frozenset[Unit] = frozenset()
) -> Iterator[nn.Module]:
    """Yield the modules below `module` that need more units than those around them bring in."""
    brought = around.union(anchors.get(module, ()))
    for child in module.children():
        if not brought.issuperset(anchors.get(child, ())):
            yield child
        yield from _bringing(child, anchors, brought)


def _common(paths: list[list[str]]) -> str:
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def outermost(module: nn.Module, anchors: Anchors) -> list[nn.Module]:
    """Return the outermost modules that need units, the root left out."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for part in module.modules():  # parents come before their children
        if part is not module and anchors.get(part) and id(part) not in inside:
            found.append(part)
            inside.update(id(one) for one in part.modules())
    return found


def put_hooks(
    root: nn.Module, anchors: Anchors, gatherer: Callable[[], Any], *, in_graphs: bool
) -> list[RemovableHandle]:
    """Let anchors tell when they are entered and left.

    Args:
        root: the outermost module.
        anchors: what each module needs.
        gatherer: returns who is told, or None where it is gone.
        in_graphs: whether torch.compile may trace the modules; see note [Blocks in graphs].
    """
    hooked, enter, leave = list(anchors), Enter, Leave
    if in_graphs:
        hooked = list(dict.fromkeys([root, *_bringing(root, anchors)]))
        enter, leave = untraced_class(Enter), untraced_class(Leave)
    handles = []
    for part in hooked:
        handles.append(part.register_forward_pre_hook(enter(gatherer, anchors[part]), prepend=True))
        handles.append(part.register_forward_hook(leave(gatherer), always_call=True))
    return handles


def running_anchor(anchors: Anchors) -> nn.Module | None:
    """Return the innermost of these modules whose forward the caller is in."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is CALL and frame.f_locals["self"] in anchors:
            return frame.f_locals["self"]  # type: ignore[no-any-return]
        frame = frame.f_back
    return None


def remove_hooks(handles: list[RemovableHandle]) -> None:
    """Remove hooks, and empty the list of them."""
    while handles:
        handles.pop().remove()


class AnchorHook(Hook):
    """A hook that tells a gatherer; copies of the module leave it behind.

    Args:
        gatherer: returns the gatherer, or None where it is gone.
    """

    def __init__(self, gatherer: Callable[[], Any]) -> None:
        self.gatherer = gatherer

    def leave_graphs(self) -> None:
        """Have all such hooks replaced."""
        gatherer = self.gatherer()
        if gatherer is not None:
            gatherer.let_compile()

    def __reduce__(self) -> Any:
        return AnchorHook, (_gone,)

    def run(self, *args: Any) -> Any:
        """Do nothing: this is a copy."""


class Enter(AnchorHook):
    """Forward pre-hook."""

    def __init__(self, gatherer: Callable[[], Any], units: Iterable[Unit]) -> None:
        super().__init__(gatherer)
        self._units = tuple(units)

    def run(self, module: nn.Module, _inputs: Any) -> None:
        """Bring in what the module needs."""
        gatherer = self.gatherer()
        if gatherer is not None:
            gatherer.enter(module, self._units)


class Leave(AnchorHook):
    """Forward hook."""

    def run(self, module: nn.Module, _inputs: Any, output: Any) -> Any:
        """Let go of it; return what replaces the output, or None."""
        gatherer = self.gatherer()
        return None if gatherer is None else gatherer.leave(module, output)


def _gone() -> None:
    """The gatherer of a copied module."""
