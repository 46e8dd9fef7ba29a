"""Functions as named ranges in a device profile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from deepspeed.accelerator import get_accelerator

Function = TypeVar("Function", bound=Callable[..., Any])


def instrument_w_nvtx(function: Function) -> Function:
    """Show each call of `function` under its name in a device profile, where there is one."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        device = get_accelerator()
        device.range_push(function.__qualname__)
        try:
            return function(*args, **kwargs)
        finally:
            device.range_pop()

    return call  # type: ignore[return-value]
