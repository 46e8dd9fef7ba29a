"""Wrap the constructors of tensors and modules for the length of a ``with`` block, and restore them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

TORCH_ARANGE = torch.arange
"""torch's own, by which transformers recognises it."""

_restore: list[Callable[[], None]] = []
"""What to do at the end of the block; empty outside of one."""


def is_patched() -> bool:
    """Whether such a block is running."""
    return bool(_restore)


def patch_tensors(
    names: Iterable[str], wrap: Callable[..., Callable[..., Any]], dtype: torch.dtype, device: torch.device
) -> None:
    """Put ``wrap(constructor, target_fp_dtype=dtype, target_device=device)`` in the place of constructors of torch."""
    # At its first use torch lists the constructors that such a context is for, and keeps the list.
    with torch.device("cpu"):
        torch.empty(0)
    for name in names:
        _replace(torch, name, wrap(getattr(torch, name), target_fp_dtype=dtype, target_device=device))


def patch_modules(around: Callable[[nn.Module, Callable[[], None]], None]) -> None:
    """Let ``around(module, construct)`` run every module's constructor, of classes made in the block too."""
    for cls in {*_subclasses(nn.Module)}:
        if "__init__" in cls.__dict__:
            _wrap_class(cls, around)
    module: Any = nn.Module

    def on_new_class(cls: Any, /, **kwargs: Any) -> None:
        super(module, cls).__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            _wrap_class(cls, around)

    module.__init_subclass__ = classmethod(on_new_class)
    _restore.append(lambda: delattr(module, "__init_subclass__"))


def unpatch() -> None:
    """Restore everything, last change first."""
    while _restore:
        _restore.pop()()


def with_target(
    fn: Callable[..., Any], *, target_fp_dtype: torch.dtype, target_device: Any
) -> Callable[..., Any]:
    """Return a constructor of tensors that makes floating-point ones in `target_fp_dtype`, on `target_device`
    unless the caller names another."""

    @functools.wraps(fn)
    def construct(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is None:
            kwargs["device"] = target_device
        made = fn(*args, **kwargs)
        return made.to(target_fp_dtype) if made.is_floating_point() else made

    return construct


def _wrap_class(cls: Any, around: Callable[[nn.Module, Callable[[], None]], None]) -> None:
    original = cls.__dict__["__init__"]

    @functools.wraps(original)
    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        around(self, lambda: original(self, *args, **kwargs))

    _replace(cls, "__init__", init)


def _replace(owner: Any, name: str, value: Any) -> None:
    before = owner.__dict__[name]
    setattr(owner, name, value)
    _restore.append(lambda: setattr(owner, name, before))


def _subclasses(cls: Any) -> Iterator[Any]:
    for one in cls.__subclasses__():
        yield one
        yield from _subclasses(one)
