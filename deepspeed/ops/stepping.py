"""What optimizers that update leaf by leaf share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from deepspeed.errors import ConfigError, UsageError


class LeafOptimizer(torch.optim.Optimizer):
    """An optimizer whose whole work is `update_leaf`; ``step`` applies it to parameters with a gradient."""

    def update_leaf(
        self,
        leaf: Tensor,
        group: dict[str, Any],
        grad: Tensor,
        *,
        out: Tensor | None = None,
        scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Update one tensor and its state.

        Args:
            leaf: weights, updated in place.
            group: the param group whose hyper-parameters count.
            grad: gradient in the leaf's shape, any floating dtype.
            out: low-precision copy of the weights to refresh.
            scale: 0-dim factor on the gradient.
            found_inf: 0-dim; nonzero leaves everything as it is.
        """
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient; return what `closure` returned.

        Raises:
            UsageError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                if param.grad.is_sparse:
                    name = type(self).__name__
                    raise UsageError(f"{name}: expected dense gradients, got a sparse one; use SparseAdam")
                self.update_leaf(param, group, param.grad)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned; the state keeps the dtype this optimizer keeps it in."""
        super().load_state_dict(state_dict)
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [(param, group) for group in self.param_groups for param in group["params"]]
        for index, (param, group) in zip(indices, params, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if name != "step":  # torch has cast it to the dtype of the parameter
                    dtype = _dtype_of_state(param, group)
                    self.state[param][name] = value.to(device=param.device, dtype=dtype, copy=True)

    def _state_of(self, leaf: Tensor, group: dict[str, Any], *names: str) -> dict[str, Any]:
        """Return the state of `leaf`; a new one has its step count and `names`, all zero."""
        state: dict[str, Any] = self.state[leaf]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=leaf.device)
            for name in names:
                state[name] = torch.zeros_like(leaf, dtype=_dtype_of_state(leaf, group))
        return state


def _dtype_of_state(leaf: Tensor, group: dict[str, Any]) -> torch.dtype:
    """At least fp32, unless the group asks for the dtype of its parameters."""
    return wide_dtype(leaf) if group.get("fp32_optimizer_states", True) else leaf.dtype


PIECE = 2**17
"""Elements that element-wise optimizers update at a time on a host: their temporaries stay small and near."""


def pieces(*tensors: Tensor | None) -> Iterator[list[Any]]:
    """Cut tensors of one shape alike, so that an element-wise update needs little room of its own.

    Tensors on a device, and those that cannot be viewed as flat, come whole; None stays None.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if given[0].device.type != "cpu" or not all(tensor.is_contiguous() for tensor in given):
        yield list(tensors)
        return
    flats = [None if tensor is None else tensor.view(-1) for tensor in tensors]
    for start in range(0, given[0].numel(), PIECE):
        yield [None if flat is None else flat[start : start + PIECE] for flat in flats]


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype to compute in: fp32 for anything narrower."""
    return torch.promote_types(tensor.dtype, torch.float32)


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in fp32; fp32 and fp64 are returned as they are."""
    return tensor.to(wide_dtype(tensor))


def scaled(grad: Tensor, scale: Tensor | None) -> Tensor:
    """Return the gradient in fp32 (fp64 stays), times the scale."""
    return wide(grad) if scale is None else wide(grad) * scale


def assign(target: Tensor, value: Tensor, found_inf: Tensor | None) -> None:
    """Write `value` into `target` unless `found_inf` forbids it; the device decides, the host does not wait."""
    target.copy_(value if found_inf is None else torch.where(found_inf == 0, value.to(target.dtype), target))


def count_step(state: dict[str, Any], found_inf: Tensor | None) -> Tensor:
    """Advance and return the 0-dim fp32 step count of a state."""
    step: Tensor = state["step"]
    step += 1 if found_inf is None else (found_inf == 0).to(step.dtype)
    return step


def check_numbers(name: str, *, betas: Sequence[float] = (), **numbers: float) -> None:
    """Raise ConfigError unless every number is at least 0 and every beta in [0, 1)."""
    if all(value >= 0 for value in numbers.values()) and all(0 <= beta < 1 for beta in betas):
        return
    shown = {**numbers, "betas": tuple(betas)} if betas else numbers
    raise ConfigError(
        f"{name}: expected {', '.join(numbers)} >= 0{' and betas in [0, 1)' if betas else ''}, got "
        + ", ".join(f"{key}={value}" for key, value in shown.items())
    )
