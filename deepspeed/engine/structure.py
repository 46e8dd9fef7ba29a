"""Notice that a model was changed after its parameters were laid out."""

from __future__ import annotations

from torch import nn

from deepspeed.errors import UsageError
from deepspeed.zero.slot import trained_slot


class Structure:
    """Where a model's trained parameters are found, as it was when the engine was made.

    Args:
        module: the model.
    """

    def __init__(self, module: nn.Module) -> None:
        self._children: list[tuple[nn.Module, str, nn.Module, str]] = []
        self._params: list[tuple[nn.Module, str, nn.Parameter, str]] = []
        self._module = module
        self._parts = [(owner, dict(owner._modules), set(owner._parameters)) for owner in module.modules()]
        for path, owner in module.named_modules():
            prefix = f"{path}." if path else ""
            if any(param.requires_grad for param in owner.parameters()):
                self._children += [
                    (owner, name, child, prefix + name)
                    for name, child in owner._modules.items()
                    if child is not None
                ]
            self._params += [
                (owner, name, param, prefix + name)
                for name, param in owner._parameters.items()
                if param is not None and param.requires_grad
            ]

    def untrained(self) -> list[str]:
        """Name parameters that came later and want gradients, of a second adapter for one."""
        if all(
            owner._modules == children and owner._parameters.keys() == names
            for owner, children, names in self._parts
        ):
            return []
        return [
            name
            for name, param in self._module.named_parameters()
            if param.requires_grad and trained_slot(param) is None
        ]

    def check(self) -> None:
        """Raise UsageError for a module or a trained parameter that is not there any more."""
        for owner, name, child, path in self._children:
            if owner._modules.get(name) is not child:
                raise _replaced(path)
        for owner, name, param, path in self._params:
            if owner._parameters.get(name) is not param:
                raise _replaced(path)


def _replaced(path: str) -> UsageError:
    return UsageError(
        f"{path}: expected what was there at deepspeed.initialize, but it was replaced or removed, so what is "
        "there now is not trained; change the model before initialize, or initialize again"
    )
