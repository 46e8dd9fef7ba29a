"""Parameters that a module uses although another one owns them.

Such a use is found when it happens (note [On demand] in gatherer.py). Registering it lets the module bring the
parameter in before its forward begins, which saves nothing but the search.
"""

from __future__ import annotations

from collections.abc import ItemsView
from typing import Any

from torch import nn

from deepspeed.errors import UsageError


class ExternalParameters:
    """The parameters registered for one module; calling it gives (name, parameter) pairs, as scripts expect."""

    def __init__(self) -> None:
        self._params: dict[str, nn.Parameter] = {}

    def __call__(self) -> ItemsView[str, nn.Parameter]:
        return self._params.items()

    def __reduce__(self) -> tuple[type[ExternalParameters], tuple[()]]:
        return ExternalParameters, ()  # a copied module has other parameters

    def add(self, param: nn.Parameter) -> None:
        """Register a parameter, once."""
        self._params[str(id(param))] = param

    def discard(self, param: nn.Parameter) -> None:
        """Forget a parameter."""
        self._params.pop(str(id(param)), None)


def register_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Say that `module` uses `parameter` in its forward although it does not own it.

    Raises:
        UsageError: something else than a module and a parameter.
    """
    _check(module, parameter)
    of(module).add(parameter)


def unregister_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Undo `register_external_parameter`."""
    _check(module, parameter)
    of(module).discard(parameter)


def of(module: nn.Module) -> ExternalParameters:
    """Return what is registered for a module."""
    known: Any = module.__dict__.get("ds_external_parameters")
    if known is None:
        known = ExternalParameters()
        module.__dict__["ds_external_parameters"] = known
    return known  # type: ignore[no-any-return]


def _check(module: Any, parameter: Any) -> None:
    if not isinstance(module, nn.Module):
        raise UsageError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    if not isinstance(parameter, nn.Parameter):
        raise UsageError(f"parameter: expected a torch.nn.Parameter, got {type(parameter).__name__}")
