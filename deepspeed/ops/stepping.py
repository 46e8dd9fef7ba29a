"""What optimizers that update leaf by leaf share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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
        """Update every parameter that has a gradient; return what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.update_leaf(param, group, param.grad)
        return loss


def scaled(grad: Tensor, scale: Tensor | None) -> Tensor:
    """Return the gradient in fp32 (fp64 stays), times the scale."""
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    return wide if scale is None else wide * scale


def assign(target: Tensor, value: Tensor, found_inf: Tensor | None) -> None:
    """Write `value` into `target` unless `found_inf` forbids it; the device decides, the host does not wait."""
    target.copy_(value if found_inf is None else torch.where(found_inf == 0, value.to(target.dtype), target))


def count_step(state: dict[str, Any], found_inf: Tensor | None) -> Tensor:
    """Advance and return the 0-dim fp32 step count of a state."""
    step: Tensor = state["step"]
    step += 1 if found_inf is None else (found_inf == 0).to(step.dtype)
    return step


def new_moments(state: dict[str, Any], leaf: Tensor, *names: str) -> None:
    """Give an empty state its step count and zero moments in at least fp32."""
    if state:
        return
    state["step"] = torch.zeros((), dtype=torch.float32, device=leaf.device)
    dtype = torch.promote_types(leaf.dtype, torch.float32)
    for name in names:
        state[name] = torch.zeros_like(leaf, dtype=dtype)
