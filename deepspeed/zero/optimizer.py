"""ZeroOptimizer: an inner optimizer over master shards, with clipping, overflow and publishing.

One step, in order: land the gradients; one norm over all shards (one all-reduce of a small vector); one
scale for unscaling, averaging and clipping; update each leaf; spread the updated shards.

Note [One scale, one flag]
Unscaling, averaging over ranks and clipping are one factor, and "a gradient is not finite" is one flag; both
are tensors on the device and go into the update itself. The gradients are never rewritten and nothing waits
for the device, except at the very end of a step that may be skipped: whether it was is a question for the
host (schedule, loss scale, counters).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.comm import agreement
from deepspeed.errors import OffloadError, UsageError
from deepspeed.zero.gatherer import Gatherer
from deepspeed.zero.gradients import UnitGradients
from deepspeed.zero.landed import GradientInMemory
from deepspeed.zero.leaves import Leaf
from deepspeed.zero.parking import OffloadStateTypeEnum, Parking
from deepspeed.zero.reducer import Reducer
from deepspeed.zero.slot import TrainedSlot, forget_slot
from deepspeed.zero.stage import RankGroup
from deepspeed.zero.states import LeafStates
from deepspeed.zero.unit import Unit
from deepspeed.zero.wrapped import WrappedOptimizer


class LossScale(Protocol):
    """What the optimizer needs of a loss scaler (see `deepspeed.precision.loss_scaler`)."""

    scale: float
    dynamic: bool

    def update(self, overflow: bool, culprit: str | None = None) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class StepRules:
    """What happens to gradients at a step.

    Attributes:
        clip: largest global gradient norm; 0 does not clip.
        divide_by: what the summed gradients are divided by (ranks for the mean, 1 for the sum).
        check_finite: skip the step when a gradient is inf or nan.
        require_all: a parameter without a gradient on any rank is an error.
    """

    clip: float
    divide_by: float
    check_finite: bool
    require_all: bool = False


class ZeroOptimizer(WrappedOptimizer):
    """A ``torch.optim.Optimizer`` whose groups and state are those of the inner optimizer, on shards.

    Args:
        inner: the optimizer that updates; the params of its groups are replaced by leaves, in place, so
            a schedule built on it keeps driving it.
        reducer: owner of the gradients.
        data_parallel: the ranks that agree on norms.
        rules: clipping, averaging, overflow.
        scaler: loss scale; its `scale` divides the gradients.
        states: where masters, states and gradients are between steps.
        gatherer: of the parameters that are released between uses, or None.

    Attributes:
        owner: weak reference to the engine that this optimizer belongs to.
        parameter_offload: the gatherer, under the name that scripts look for.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        reducer: Reducer,
        *,
        data_parallel: RankGroup,
        rules: StepRules,
        scaler: LossScale,
        states: LeafStates,
        gatherer: Gatherer | None = None,
    ) -> None:
        self.optimizer = inner
        self.states = states
        self.parameter_offload = gatherer
        self.rules = rules
        self.loss_scaler = scaler
        self.overflow = False
        self.owner: Callable[[], Any] = _nobody
        self._reducer = reducer
        self._data_parallel = data_parallel
        self._norm: Tensor | None = None
        self._hooks_before = OrderedDict()
        self._hooks_after = OrderedDict()
        with states.noting_failure():
            self._replace_params()
        self.parking = Parking(self._states)
        self._fuses = hasattr(inner, "update_leaf")
        units = self.units if gatherer is None else [*self.units, *gatherer.units]
        self._may_fail = self.states.are_away or any(unit.held.nbytes_on_disk for unit in units)
        if gatherer is not None:
            reducer.on_complete = gatherer.gradients_arrived
            gatherer.raised_by_step = True
        self.raise_together(self.states.failure)
        for gradients in reducer.gradients:
            for index, param in enumerate(gradients.unit.params):
                param.ds_slot = TrainedSlot(gradients.unit, index, self, gradients)  # type: ignore[attr-defined]
                param.param_idx_in_group = index  # type: ignore[attr-defined]  # by which axolotl tells ours

    def _replace_params(self) -> None:
        """Hand the inner optimizer leaves instead of parameters, with the state that it has of these already."""
        inner = self.optimizer
        group_of = {id(param): group for group in inner.param_groups for param in group["params"]}
        before = list(inner.state)
        for gradients in self._reducer.gradients:
            unit = gradients.unit
            self.states.lay_out(unit, [group_of[id(param)] for param in unit.params], inner)
        for param in before:
            del inner.state[param]
        self.refill_groups()

    def refill_groups(self) -> None:
        """Let the inner optimizer's groups have the leaves as they are now cut."""
        leaves = [leaf for unit_leaves in self.states.leaves.values() for leaf in unit_leaves]
        for group in self.optimizer.param_groups:
            group["params"] = [leaf.tensor for leaf in leaves if leaf.group is group]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, those that wait to be reduced too."""
        self._reducer.clear()

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Return the inner optimizer's state (this rank's shards) and the loss scaler's.

        What is on disk is returned as copies in memory.
        """
        inner = self.optimizer.state_dict()
        if self.states.are_away:
            inner["state"] = self._copied_states()
        return {"optimizer": inner, "loss_scaler": self.loss_scaler.state_dict()}

    def _copied_states(self) -> dict[int, dict[str, Any]]:
        leaf_of = {leaf.tensor: leaf for leaves in self.states.leaves.values() for leaf in leaves}
        copies = {}
        params = (param for group in self.optimizer.param_groups for param in group["params"])
        for index, param in enumerate(params):
            with self.states.present(leaf_of[param], changed=False):
                state = self.state.get(param, {})
                copies[index] = {
                    key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()
                }
        return {index: state for index, state in copies.items() if state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned on the same rank of an equal run. All ranks call it."""
        self.states.will_change()
        groups = list(self.optimizer.param_groups)
        self.optimizer.load_state_dict(state_dict["optimizer"])
        for group, loaded in zip(groups, self.optimizer.param_groups, strict=True):
            group.update(loaded)  # leaves know their group, and torch has made others
        self.optimizer.param_groups[:] = groups
        self.loss_scaler.load_state_dict(state_dict["loss_scaler"])
        with self.states.noting_failure():
            self.states.replace()
        with torch.no_grad():
            for unit, leaves in self.states.leaves.items():
                with unit.changing():
                    with self.states.noting_failure():
                        for leaf in leaves:
                            self._mirror(leaf)
                    self.states.deliver(unit)
                    unit.publish()
        self.raise_together(self.states.failure)

    def dtype_of_state(self, leaf: Leaf) -> torch.dtype:
        """The dtype in which the inner optimizer keeps states of a leaf; torch's own keep that of the parameter."""
        chosen = getattr(self.optimizer, "dtype_of_state", None)
        dtype: torch.dtype = leaf.tensor.dtype if chosen is None else chosen(leaf.tensor)
        return dtype

    def device_of_number(self, leaf: Leaf, key: str) -> torch.device:
        """Where the inner optimizer keeps a state that is one number; torch's own count steps on the host."""
        on_host = key == "step" and not hasattr(self.optimizer, "dtype_of_state")
        if on_host and not (leaf.group.get("capturable") or leaf.group.get("fused")):
            return torch.device("cpu")
        return leaf.tensor.device

    def _mirror(self, leaf: Leaf) -> None:
        """Copy a leaf's master to the storage that mirrors it."""
        if leaf.unit.has_master:
            with self.states.present(leaf, changed=False):
                leaf.write_out()

    @torch.no_grad()
    def change_masters(self, change: Callable[[], Any]) -> None:
        """Let `change` write to all masters between steps, and spread what it wrote. All ranks call it.

        Raises:
            UsageError: the masters are not in memory.
        """
        if self.states.are_away or not self.parking.is_empty:
            raise UsageError(
                f"optimizer.train, optimizer.eval: expected the weights of {type(self.optimizer).__name__} in memory, "
                "but they are away; use zero_optimization.offload_optimizer.device none or cpu, and call "
                "engine.reload_states() first"
            )
        self.states.will_change()
        if self.parameter_offload is not None:
            self.parameter_offload.end_step()
        for unit in self.units:
            unit.adopt_edits()
        with ExitStack() as changing:
            for unit in self.units:
                changing.enter_context(unit.changing())
            change()
            for unit, leaves in self.states.leaves.items():
                for leaf in leaves:
                    self._mirror(leaf)
                self.states.deliver(unit)
                unit.publish()

    def _states(self, kind: OffloadStateTypeEnum) -> list[Tensor]:
        """Find the tensors of one kind of state."""
        if kind is OffloadStateTypeEnum.optim_states:
            values = [one for state in self.state.values() for one in state.values()]
            return [one for one in values if isinstance(one, Tensor) and one.dim() > 0]
        if kind is OffloadStateTypeEnum.hp_params:
            return [unit.master for unit in self.units if unit.has_master]
        if kind is OffloadStateTypeEnum.lp_params:
            return [one for unit in self.units for one in unit.held.movable]
        if kind is OffloadStateTypeEnum.lp_grads:
            landed = [one.landed for one in self._reducer.gradients]
            return [
                one.shard for one in landed if isinstance(one, GradientInMemory) and one.shard is not None
            ]
        return []  # buffers of gradients are not kept on a device

    def detach(self) -> None:
        """Leave the parameters alone from now on: hooks and gradients go."""
        self._reducer.clear()
        self._reducer.detach()
        self.states.close()
        for unit in self.units:
            for param in unit.params:
                forget_slot(param)
        if self.parameter_offload is not None:
            self.parameter_offload.detach()

    # -- what callers read ------------------------------------------------------------------------

    @property
    def loss_scale(self) -> float:
        """The factor that the next loss is multiplied by."""
        return self.loss_scaler.scale

    cur_scale = loss_scale

    @property
    def global_grad_norm(self) -> Tensor | None:
        """Norm of the averaged gradients of the last step before clipping (0-dim), None before the first."""
        return self._norm

    @property
    def units(self) -> list[Unit]:
        """The units, in registration order."""
        return list(self.states.leaves)

    @property
    def gradient_divisor(self) -> float:
        """What the reduced gradients are still to be divided by: loss scale times averaging."""
        return self.loss_scaler.scale * self.rules.divide_by

    # -- the step ---------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> bool:  # type: ignore[override]
        """Update all parameters from the gradients reduced so far, and forget the gradients.

        Returns:
            Whether the update was applied; False if a gradient was not finite and the step was skipped.

        Raises:
            UsageError: a closure was passed, a parameter was moved or cast, or one without a gradient is not
                allowed.
            LossScaleError: the gradients overflow although the loss scale is at its minimum.
        """
        if closure is not None:
            raise UsageError(
                "optimizer.step: a closure cannot be used; gradients come from engine.backward(loss)"
            )
        if not self.parking.is_empty:
            raise UsageError("optimizer.step: states are away; call engine.reload_states() first")
        self.overflow = False
        for hook in self._hooks_before.values():
            hook(self, (), {})
        if self.parameter_offload is not None:
            self.parameter_offload.end_step()
        for unit in self.units:
            unit.adopt_edits()
        self._reducer.flush()
        gatherer = self.parameter_offload
        self.raise_together(self.states.failure or (None if gatherer is None else gatherer.take_failure()))
        active = [gradients for gradients in self._reducer.gradients if not gradients.landed.is_empty]
        if active:
            self._update_all(active)
        elif self._data_parallel.size > 1:  # a rank that skipped its backward shall not be one step behind
            comm.barrier(group=self._data_parallel.process_group, label="step without gradients")
        for hook in self._hooks_after.values():
            hook(self, (), {})
        return not self.overflow

    def _update_all(self, active: Sequence[UnitGradients]) -> None:
        norm, unused = self._agree(active)
        self._norm = norm / self.gradient_divisor
        scale = self._step_scale(self._norm)
        found_inf = (~torch.isfinite(norm)).float() if self.rules.check_finite else None
        if unused:
            if self.rules.require_all:
                _refuse_unused([gradients.unit for gradients in active], unused)
            self._split_unused(unused)
        work = self._work(active, unused)
        if self._fuses and self.states.share_device and not self.states.are_away:
            for leaf, grad in self.states.visit(work):
                self._fused_update(leaf, grad, scale, found_inf)
            self.overflow = found_inf is not None and _read(found_inf)
        else:
            self.overflow = found_inf is not None and _read(found_inf)
            if not self.overflow:
                self.raise_together(self._update(work, scale))
        self._publish(active)
        culprit = None
        if self.overflow and self.loss_scaler.dynamic:
            with self.states.noting_failure():
                culprit = _first_non_finite(active)
        self._reducer.clear()
        self.loss_scaler.update(self.overflow, culprit)

    def _agree(self, active: Sequence[UnitGradients]) -> tuple[Tensor, set[nn.Parameter]]:
        """Return the norm of the summed gradients, and the parameters that had a gradient on no rank.

        One all-reduce carries both, and whether any rank has late gradients; if so, all reduce them and agree
        again. Ranks that keep the same gradients share the work of taking their norm. Whether something is unused
        needs no look at the device where every parameter was used on this rank: then it was used somewhere.
        """
        late = self._reducer.holds_local
        replicas = active[0].unit.sharding.replica_group
        norms = [
            norm for gradients in active for norm in gradients.landed.norms(replicas.rank, replicas.size)
        ]
        norm = _total_norm(norms, active[0].unit.flat.device)
        used = [flag for gradients in active for flag in gradients.used]
        group = self._data_parallel
        if group.size > 1:
            flags = get_accelerator().send(used, norm.device)
            parts = [norm.square().reshape(1), norm.new_full((1,), float(late)), flags]
            message = torch.cat(parts)
            comm.all_reduce(message, group=group.process_group, label="norm of the step's gradients")
            norm = message[0].sqrt()
            late = self._reducer.may_be_late and _read(message[1])
            if not all(used):
                used = (message[2:] > 0).tolist()
        if late:
            self._reducer.flush(late=True)
            return self._agree(active)
        if all(used):
            return norm, set()
        params = [param for gradients in active for param in gradients.unit.params]
        return norm, {param for param, was_used in zip(params, used, strict=True) if not was_used}

    def _step_scale(self, norm: Tensor) -> Tensor | None:
        """Combine unscaling, averaging and clipping; None stands for 1."""
        if self.rules.clip > 0:
            return (self.rules.clip / (norm + 1e-6)).clamp(max=1.0) / self.gradient_divisor
        if self.gradient_divisor == 1.0:
            return None
        return torch.full((), 1.0 / self.gradient_divisor, device=norm.device)

    def _split_unused(self, unused: set[nn.Parameter]) -> None:
        for unit in self.units:
            self.states.split(unit, {index for index, param in enumerate(unit.params) if param in unused})
        self.refill_groups()

    def _work(
        self, active: Sequence[UnitGradients], unused: set[nn.Parameter]
    ) -> list[tuple[Leaf, UnitGradients]]:
        """Pair every leaf that is to be updated with its unit's gradient."""
        return [
            (leaf, gradients)
            for gradients in active
            for leaf in self.states.leaves[gradients.unit]
            if not unused or leaf.unit.params[leaf.pieces[0].index] not in unused
        ]

    def _update(
        self, work: Sequence[tuple[Leaf, UnitGradients]], scale: Tensor | None
    ) -> OffloadError | None:
        """Update leaves; return what went wrong with their tier. One leaf at a time where they are away."""
        if self.states.failure is not None:  # of a split
            return self.states.failure
        with self.states.noting_failure():  # half an update is done: no later step may go on from there
            if self._fuses or self.states.are_away:
                for leaf, grad in self.states.visit(work):
                    self._update_one(leaf, grad, scale)
            else:
                self._plain_update(list(self.states.visit(work)), scale)
            self.states.settle_stored()
        return self.states.failure

    def _update_one(self, leaf: Leaf, grad: Tensor, scale: Tensor | None) -> None:
        if self._fuses:
            self._fused_update(leaf, grad, scale, None)
            return
        before = _options(self.optimizer)
        self._plain_update([(leaf, grad)], scale)
        changed = sorted(before.items() ^ _options(self.optimizer).items())
        if changed:
            raise UsageError(
                f"zero_optimization.offload_optimizer.device: expected an optimizer that can update one leaf after "
                f"the other, but {type(self.optimizer).__name__} changes {changed[0][0][1]!r} of its param groups at "
                "every call of step; use device cpu or none"
            )

    def raise_together(self, error: OffloadError | None) -> None:
        """Raise an error of any rank on all of them, where there can be one."""
        if self._may_fail:
            agreement.raise_together(error, self._data_parallel.process_group)

    def _fused_update(self, leaf: Leaf, grad: Tensor, scale: Tensor | None, found_inf: Tensor | None) -> None:
        inner: Any = self.optimizer
        scale = None if scale is None else scale.to(leaf.tensor.device)
        with leaf.writing_out() as out:
            inner.update_leaf(leaf.tensor, leaf.group, grad, out=out, scale=scale, found_inf=found_inf)
        inner._opt_called = True  # what torch's schedules ask of the optimizer they drive

    def _plain_update(self, work: Sequence[tuple[Leaf, Tensor]], scale: Tensor | None) -> None:
        for leaf, grad in work:
            wide = grad.to(leaf.tensor.dtype)
            leaf.tensor.grad = wide if scale is None else wide * scale.to(wide.device)
        self.optimizer.step()
        for leaf, _ in work:
            leaf.tensor.grad = None
            leaf.write_out()

    def _publish(self, active: Sequence[UnitGradients]) -> None:
        """Spread the updated shards, each unit while the next is sent: more at once would need room for all."""
        before: Any = None
        for gradients in active:
            self.states.deliver(gradients.unit)
            work = gradients.unit.publish(async_op=True)
            if before is not None:
                before.wait()
            before = work
        if before is not None:
            before.wait()
        alone = [one.unit for one in active if one.unit.held.reads_alone]
        for unit in alone[:1]:  # they share what is settled
            unit.settle()


def _first_non_finite(active: Sequence[UnitGradients]) -> str | None:
    """Name the first parameter in this rank's shards whose gradient is inf or nan."""
    for gradients in active:
        for piece in gradients.unit.my_pieces():
            for _, part in gradients.landed.visit(piece.shard_start, piece.shard_stop):
                if not bool(torch.isfinite(part).all()):
                    return gradients.unit.names[piece.index]
    return None


def _refuse_unused(units: Sequence[Unit], unused: set[nn.Parameter]) -> None:
    names = [
        name for unit in units for name, param in zip(unit.names, unit.params, strict=True) if param in unused
    ]
    raise UsageError(
        f"zero_optimization.ignore_unused_parameters: expected a gradient for every parameter, got none for "
        f"{', '.join(names)}; freeze them (requires_grad_(False)) or set the key to true"
    )


def _options(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], str]:
    """Describe the options of all param groups."""
    return {
        (index, key): repr(value)
        for index, group in enumerate(optimizer.param_groups)
        for key, value in group.items()
        if key != "params"
    }


def _total_norm(norms: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the norm of what the parts together are, on the parameters' device."""
    moved = [norm.to(device) for norm in norms] or [torch.zeros((), device=device)]
    return moved[0] if len(moved) == 1 else torch.linalg.vector_norm(torch.stack(moved))


def _read(flag: Tensor) -> bool:
    """Ask the device for a flag. See Note [One scale, one flag]. Where tensors are fake nothing ever went wrong."""
    return not isinstance(flag, FakeTensor) and bool(flag.item())


def _nobody() -> None:
    """The owner of an optimizer that no engine has."""
