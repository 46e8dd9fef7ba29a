"""What an optimizer around another one shows of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from deepspeed.errors import UsageError
from deepspeed.zero.parking import Parking


class WrappedOptimizer(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` whose groups, state and defaults are those of `optimizer`, the inner one."""

    optimizer: torch.optim.Optimizer
    parking: Parking
    change_masters: Callable[[Callable[[], Any]], None]
    _hooks_before: OrderedDict[int, Callable]
    _hooks_after: OrderedDict[int, Callable]

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The inner optimizer's groups, themselves."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The inner optimizer's state, by leaf."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The inner optimizer's defaults."""
        return self.optimizer.defaults

    @property
    def single_partition_of_fp32_groups(self) -> list[torch.Tensor]:
        """What the inner optimizer trains on this rank: flat master weights, by the original's name at stages 1, 2."""
        return [param.detach() for group in self.param_groups for param in group["params"]]

    @property
    def fp32_partitioned_groups_flat(self) -> list[torch.Tensor]:
        """The same by the original's name at stage 3."""
        return self.single_partition_of_fp32_groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: parameters are laid out when the engine is made."""
        raise UsageError(
            "add_param_group: parameters are laid out by deepspeed.initialize and cannot be added later; "
            "pass all of them in model_parameters, or initialize again"
        )

    def train(self) -> None:
        """Let an optimizer that evaluates with other weights (a schedule-free one) show those that it trains.

        All ranks call it. With other optimizers it does nothing, like `eval`.
        """
        show = getattr(self.optimizer, "train", None)
        if show is not None:
            self.change_masters(show)

    def eval(self) -> None:
        """Let such an optimizer show the weights that are to be evaluated or saved; `train` goes on. All ranks."""
        show = getattr(self.optimizer, "eval", None)
        if show is not None:
            self.change_masters(show)

    def register_step_pre_hook(self, hook: Callable) -> torch.utils.hooks.RemovableHandle:
        """Call ``hook(optimizer, args, kwargs)`` before each step."""
        return _register(self._hooks_before, hook)

    def register_step_post_hook(self, hook: Callable) -> torch.utils.hooks.RemovableHandle:
        """Call ``hook(optimizer, args, kwargs)`` after each step."""
        return _register(self._hooks_after, hook)

    def offload_states(self, *args: Any, **kwargs: Any) -> None:
        """Move states of an idle optimizer to the host; see `Parking.offload_states`."""
        self.parking.offload_states(*args, **kwargs)

    def reload_states(self, non_blocking: bool = False) -> None:
        """Bring back what `offload_states` moved."""
        self.parking.reload_states(non_blocking)


def _register(hooks: OrderedDict[int, Callable], hook: Callable) -> torch.utils.hooks.RemovableHandle:
    handle = torch.utils.hooks.RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle
