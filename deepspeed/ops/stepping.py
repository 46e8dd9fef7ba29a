"""What the optimizers here share: stepping, their state and its dtype, checks of their arguments.

Note [Without the compiler's import]
torch wraps four methods of its optimizers so that no graph holds them, and the first call imports ``torch._dynamo``: a
second, and 72 MiB that every rank keeps. Optimizers here call what is inside those wrappers, untraced in their own way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deepspeed.common.untraced import untraced
from deepspeed.errors import ConfigError, UsageError

_OF_TORCH = {  # see note [Without the compiler's import]
    name: inspect.unwrap(getattr(torch.optim.Optimizer, name))
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
}


UNKNOWN = ("amsgrad", "maximize")
"""Options of torch's optimizers, found in the states of these, that would change what a step does."""


class LeafOptimizer(torch.optim.Optimizer):
    """An optimizer whose whole work is `update_leaf`; ``step`` applies it to parameters with a gradient.

    Attributes:
        state_dtype: dtype of the state; None: fp32 (fp64 for fp64 parameters).
    """

    state_dtype: torch.dtype | None = None

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
            grad: gradient in the leaf's shape, any floating dtype; only read.
            out: low-precision copy of the weights to refresh, contiguous.
            scale: 0-dim factor on the gradient.
            found_inf: 0-dim; nonzero leaves everything as it is, the step count too.
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
            params = [param for param in group["params"] if param.grad is not None]
            if any(param.grad.is_sparse for param in params):
                name = type(self).__name__
                raise UsageError(f"{name}: expected dense gradients, got a sparse one; use SparseAdam")
            self._update_group(params, group)
        return loss

    def _update_group(self, params: list[Any], group: dict[str, Any]) -> None:
        """Update parameters of a group, all of which have a gradient."""
        for param in params:
            self.update_leaf(param, group, param.grad)

    def narrow_states(self) -> None:
        """Keep new state in the parameters' dtype (that of the first)."""
        self.state_dtype = next(param.dtype for group in self.param_groups for param in group["params"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their own hyper-parameters, as ``torch.optim.Optimizer`` does."""
        untraced()(_OF_TORCH["add_param_group"], self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients, or fill them with zeros, as ``torch.optim.Optimizer`` does."""
        untraced()(_OF_TORCH["zero_grad"], self, set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return state and groups, as ``torch.optim.Optimizer`` does."""
        return untraced()(_OF_TORCH["state_dict"], self)  # type: ignore[no-any-return]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned; the state keeps the dtype this optimizer keeps it in."""
        given: dict[str, Any] = {}  # what hooks of the user have made of it
        hooks = (
            self.register_load_state_dict_pre_hook(lambda _, final: given.update(final)),
            self.register_load_state_dict_post_hook(lambda _: self._take_states(given), prepend=True),
        )
        try:
            untraced()(_OF_TORCH["load_state_dict"], self, state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _take_states(self, given: dict[str, Any]) -> None:
        """Set the states anew: torch casts to the dtype of the parameter, and leaves step counts where they were."""
        saved = [index for group in given["param_groups"] for index in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for index, param in zip(saved, params, strict=True):
            for name, value in given["state"].get(index, {}).items():
                if isinstance(value, (Tensor, int, float)):
                    self.state[param][name] = torch.as_tensor(value).to(
                        device=param.device,
                        dtype=torch.float32 if name == "step" else self.dtype_of_state(param),
                        copy=True,
                        memory_format=torch.contiguous_format,
                    )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "state_dtype": self.state_dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name in UNKNOWN:
            if any(group.get(name) for group in state["param_groups"]):
                raise UsageError(
                    f"{name}: expected False in the state to load, got True, which {type(self).__name__} cannot do; "
                    "load it into the optimizer of torch that saved it"
                )
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():  # what the optimizer that saved it does not know
                group.setdefault(name, value)

    def _state_of(self, leaf: Tensor, **starts: float) -> dict[str, Any]:
        """Return the state of `leaf`; a new one has its step count, and contiguous tensors filled with `starts`."""
        state: dict[str, Any] = self.state[leaf]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=leaf.device)
            dtype, layout = self.dtype_of_state(leaf), torch.contiguous_format
            for name, start in starts.items():
                state[name] = torch.full_like(leaf, start, dtype=dtype, memory_format=layout)
        return state

    def dtype_of_state(self, leaf: Tensor) -> torch.dtype:
        """The dtype that states of `leaf` are kept in."""
        return self.state_dtype or wide_dtype(leaf)


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


def check_numbers(**numbers: float) -> None:
    """Raise ConfigError unless every number is at least 0."""
    for name, value in numbers.items():
        if not value >= 0:
            raise ConfigError(f"{name}: expected a number of at least 0, got {value}")


def check_betas(betas: Sequence[float]) -> None:
    """Raise ConfigError unless these are two decay rates."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(f"betas: expected two numbers in [0, 1), got {betas}")
