"""DeepSpeedEngine: forward, backward, step around a user's module.

One training step:

    loss = engine(batch)      inputs moved and cast | module | outputs watched for any backward through them
    engine.backward(loss)     scaled by accumulation and loss scale -> autograd -> Reducer
    engine.step()             acts at the accumulation boundary: ZeroOptimizer.step -> schedule -> counters
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deepspeed.accelerator import get_accelerator
from deepspeed.common.logging import logger, warn_once
from deepspeed.common.nested import tensors_in
from deepspeed.common.timers import ThroughputTimer
from deepspeed.common.untraced import untraced
from deepspeed.engine.accessors import EngineAccessors
from deepspeed.engine.checkpointing import Checkpointing
from deepspeed.engine.compiled import CompiledForward
from deepspeed.engine.feature import Feature
from deepspeed.engine.features.metrics import Throughput
from deepspeed.engine.inputs import InputRules
from deepspeed.engine.memory import MemoryControl
from deepspeed.engine.structure import Structure
from deepspeed.engine.watch import OutputWatch
from deepspeed.engine.weights import WeightSaving
from deepspeed.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from deepspeed.config import DeepSpeedConfig
    from deepspeed.config.batch import BatchSizes
    from deepspeed.engine.build import EngineParts


class DeepSpeedEngine(Checkpointing, WeightSaving, MemoryControl, EngineAccessors):
    """A module that trains: made by `deepspeed.initialize`, used like the module it wraps.

    Attributes that the module has and the engine has not are the module's.

    Attributes:
        module: the user's module; its parameters are views of the engine's flats.
        optimizer: the `ZeroOptimizer`; where there is nothing to train, the `Gatherer` at stage 3, else None.
        lr_scheduler: the schedule that `step` advances; may be set to None.
        training_dataloader: loader over `training_data`, or None.
        config: the configuration as the user gave it.
        settings: the configuration, typed.
        global_steps: optimizer steps taken, skipped ones included.
        micro_steps: micro-batches seen (calls of `step`).
        global_samples: samples seen over all ranks.
        skipped_steps: optimizer steps skipped for a gradient that was not finite.
        tput_timer: samples per second over all ranks, and the epochs that the script counts with it.
    """

    def __init__(self, parts: EngineParts) -> None:
        super().__init__()
        self.module: nn.Module = parts.module
        self.settings: DeepSpeedConfig = parts.settings
        self.config: Any = parts.settings.raw
        self.batch: BatchSizes = parts.batch
        self.policy = parts.policy
        self.data_parallel = parts.data_parallel
        self.device = parts.device
        self.optimizer: Any = parts.optimizer or parts.gatherer
        self._zero = parts.optimizer
        self.lr_scheduler = parts.lr_scheduler
        self.training_dataloader = parts.training_dataloader
        self.mpu = parts.mpu
        self.global_steps = self.micro_steps = self.global_samples = self.skipped_steps = 0
        self._reducer = parts.reducer
        self._gatherer = parts.gatherer
        self._units = parts.units
        self._sharding = parts.sharding
        self.tput_timer = ThroughputTimer(parts.batch.train or 1, synchronized=False)
        self._features: list[Feature] = [Throughput(self.tput_timer), *parts.features]
        self._make_loader: Callable[..., Any] = parts.make_loader
        self._inputs = InputRules(parts.device, parts.policy.storage if parts.policy.cast_inputs else None)
        self._boundary: bool | None = None
        self._no_sync = False
        self._scaled = False
        self._step_applied = False
        self._compiled_blocks = self._destroyed = False
        self._accumulating = False
        self._micro_batches = 0  # since the last update
        if self._reducer is not None:
            self._reducer.on_implicit_backward = partial(_implicit_backward, weakref.ref(self))
        if self._zero is not None:
            self._zero.owner = weakref.ref(self)
        self._frozen = [(name, p) for name, p in self.module.named_parameters() if not p.requires_grad]
        self._structure = Structure(self.module)
        self._watch_hook = self.module.register_forward_hook(OutputWatch(self))

    # -- forward ----------------------------------------------------------------------------------

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the module on inputs moved to the engine's device and cast to the dtype it computes in."""
        call = untraced()
        inputs, kwargs = call(self._begin_forward, inputs, kwargs)
        with self._autocast():
            output = self.module(*inputs, **kwargs)
        call(self._end_forward, output)
        return output

    def _begin_forward(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Make ready for a forward, and return its inputs as the module takes them."""
        if self._destroyed and torch.is_grad_enabled():
            raise UsageError(
                "engine.forward: expected an engine, got one that was destroyed (Accelerator.free_memory does that, "
                "and transformers' Trainer when train() is called again or after evaluate()); make a new engine or "
                "Trainer"
            )
        if self.batch.micro is None:
            self._complete_batch((inputs, kwargs))
        if self._zero is not None and not self._zero.parking.is_empty:
            raise UsageError("engine.forward: states are away; call engine.reload_states() first")
        for feature in self._features:
            feature.forward_start(self)
        inputs = tuple(self._inputs.apply(value) for value in inputs)
        return inputs, {key: self._inputs.apply(value) for key, value in kwargs.items()}

    def _end_forward(self, output: Any) -> None:
        if self.module._compiled_call_impl is not None:  # its hooks are not called
            self.watch_outputs(output)
        for feature in self._features:
            feature.forward_end(self)

    def _autocast(self) -> Any:
        if self.policy.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.policy.autocast)

    def _complete_batch(self, inputs: Any) -> None:
        """Resolve an "auto" micro-batch from the leading dimension of the first batch."""
        first = next((tensor for tensor in tensors_in(inputs) if tensor.dim() > 0), None)
        if first is None:
            raise ConfigError(
                'train_micro_batch_size_per_gpu: "auto" is read from the first tensor given to forward, and '
                "there was none; set it in the configuration"
            )
        self.batch = self.settings.complete_batch(first.shape[0], "leading dimension of the first batch")
        self.settings.announce_resolutions()

    def watch_outputs(self, output: Any) -> None:
        """See any backward through the outputs, so that a plain ``loss.backward()`` is reduced too."""
        if self._reducer is None or not torch.is_grad_enabled():
            return
        self._prepare_reduction()
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                self._reducer.watch(tensor)

    # -- backward ---------------------------------------------------------------------------------

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """Compute gradients of `loss` and reduce them as the stage says.

        Args:
            loss: 0-dim tensor, the mean over this rank's micro-batch.
            retain_graph: keep the graph for another backward.
            scale_wrt_gas: divide by the accumulation steps, so that the step sees the mean over them.

        Returns:
            The loss divided by the accumulation steps (not by the loss scale).

        Raises:
            UsageError: there is no optimizer, or `loss` is not a scalar that requires grad.
        """
        optimizer, reducer = self._training_parts("backward")
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise UsageError(
                "engine.backward: expected a tensor of one element that requires grad, got "
                + (
                    f"shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}"
                    if isinstance(loss, Tensor)
                    else type(loss).__name__
                )
            )
        for feature in self._features:
            feature.backward_start(self, loss)
        steps = self.gradient_accumulation_steps() if scale_wrt_gas else 1
        loss = loss if steps == 1 else loss / steps
        self._prepare_reduction()
        reducer.begin()
        try:
            scaled = loss if optimizer.loss_scale == 1.0 else loss.float() * optimizer.loss_scale
            scaled.backward(retain_graph=retain_graph)
        except BaseException:
            reducer.abort()
            raise
        reducer.end()
        self._accumulating = not self.is_gradient_accumulation_boundary()
        for feature in self._features:
            feature.backward_end(self)
        return loss

    def scale(self, loss: Tensor) -> Tensor:
        """Multiply a loss by the loss scale, for a ``backward()`` called on the result itself."""
        optimizer, _ = self._training_parts("scale")
        self._scaled = True
        scaled: Tensor = loss.float() * optimizer.loss_scale
        return scaled

    def begin_implicit_backward(self) -> None:
        """Take note of a ``loss.backward()``; refuse one in fp16 whose loss nobody scaled: gradients would vanish."""
        self._accumulating = not self.is_gradient_accumulation_boundary()
        scaled, self._scaled = self._scaled, False
        if self.policy.loss_scaled and not scaled:
            raise UsageError(
                "loss.backward: fp16 gradients need a scaled loss; call engine.backward(loss), or "
                "engine.scale(loss).backward()"
            )

    def _prepare_reduction(self) -> None:
        """Tell the reducer whether the next backward is reduced or kept on this rank."""
        if self._reducer is None:
            return
        self._reducer.recover()
        if not self._reducer.running:
            due = self._sharding.reduce_every_backward or self.is_gradient_accumulation_boundary()
            self._reducer.sync = due and not self._no_sync

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Keep gradients on this rank; the first backward or step after it reduces them. Any stage."""
        before, self._no_sync = self._no_sync, True
        try:
            yield
        finally:
            self._no_sync = before

    # -- step -------------------------------------------------------------------------------------

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the running micro-batch is the last one before an update."""
        if self._boundary is not None:
            return self._boundary
        if not self.settings.managed_gradient_accumulation:
            return True
        return self._micro_batches + 1 >= self.gradient_accumulation_steps()

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Decide, instead of the counter, whether this micro-batch is the last; holds until set again."""
        self._boundary = is_boundary

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """Count a micro-batch; at the accumulation boundary update the parameters and advance the schedule.

        Args:
            lr_kwargs: passed to the schedule's ``step``.
        """
        self._training_parts("step")
        at_boundary = self.is_gradient_accumulation_boundary()
        self._step_applied = False
        if at_boundary:
            self._update(lr_kwargs or {})
        self.micro_steps += 1
        self._micro_batches = 0 if at_boundary else self._micro_batches + 1
        self.global_samples += (self.batch.micro or 0) * self.data_parallel.size
        if at_boundary:
            for feature in self._features:
                feature.step_end(self)

    def _update(self, lr_kwargs: dict[str, Any]) -> None:
        optimizer, reducer = self._training_parts("step")
        for feature in self._features:
            feature.step_start(self)
        self._structure.check()
        self._warn_of_untrained()
        reducer.recover()
        self._accumulating = False
        self._step_applied = optimizer.step()
        self.global_steps += 1
        if not self._step_applied:
            self.skipped_steps += 1
            logger.info("step %d skipped: a gradient is not finite", self.global_steps)
        elif self.lr_scheduler is not None:
            self.lr_scheduler.step(**lr_kwargs)

    def _warn_of_untrained(self) -> None:
        unfrozen = [name for name, param in self._frozen if param.requires_grad]
        if names := unfrozen or self._structure.untrained():
            then = "were frozen" if unfrozen else "were not there"
            warn_once(
                f"{names[0]} and {len(names) - 1} more require grad now but {then} when the engine was made, "
                "so they are not trained; unfreeze or add them before deepspeed.initialize, or initialize again"
            )

    def was_step_applied(self) -> bool:
        """Whether the last `step` changed the parameters."""
        return self._step_applied

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients, except those of an accumulation that is under way.

        Scripts call this before every backward; in the middle of an accumulation it must not lose the
        micro-batches seen so far.
        """
        if self._reducer is None:
            self.module.zero_grad(set_to_none)
            return
        self._reducer.recover()
        if not self._accumulating:
            self._reducer.clear()

    # -- changing the batch -----------------------------------------------------------------------

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the global batch by changing the accumulation steps; the micro-batch stays."""
        self.batch = self.batch.with_train(train_batch_size)
        self.settings.set_batch(self.batch, "set_train_batch_size")

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Change the micro-batch; the accumulation steps stay and the global batch follows."""
        self.batch = self.batch.with_micro(micro_batch_size)
        self.settings.set_batch(self.batch, "set_train_micro_batch_size")

    # -- the rest ---------------------------------------------------------------------------------

    def deepspeed_io(
        self, dataset: Any, batch_size: int | None = None, route: str = "train", **options: Any
    ) -> Any:
        """Make a `DeepSpeedDataLoader` over this engine's ranks.

        Args:
            dataset: see the loader.
            batch_size: samples per batch of this rank; None: the engine's micro-batch.
            route: "train" shuffles; "eval" and "predict" keep the dataset's order.
            options: further arguments of the loader.
        """
        if route not in ("train", "eval", "predict"):
            raise UsageError(f'deepspeed_io: expected route "train", "eval" or "predict", got {route!r}')
        options = {"shuffle": route == "train", **options}
        return self._make_loader(dataset, self.batch.micro if batch_size is None else batch_size, **options)

    def compile(
        self, *args: Any, backend: Any = None, compile_kwargs: dict | None = None, **more: Any
    ) -> None:
        """Compile the module's forward in place with ``torch.compile``.

        At stage 3 each block is compiled by itself, so that gathering stays outside of compiled code.
        """
        options = {**(compile_kwargs or {}), **more}
        if backend is not None:
            options["backend"] = backend
        if self._gatherer is None or not self._gatherer.units:
            self.module.compile(*args, **options)
            return
        for block in self._gatherer.let_compile():
            block.forward = CompiledForward(block, *args, **options)
        self._compiled_blocks = True

    @property
    def is_compiled(self) -> bool:
        """Whether `compile` was called."""
        return self._compiled_blocks or self.module._compiled_call_impl is not None

    def destroy(self) -> None:
        """Take the engine off the module: hooks are removed, buffers freed, unused memory given back.

        Parameters stay where they are: whole, or at stage 3 sharded as ``zero.Init`` leaves them, to be read
        under ``zero.GatheredParameters`` or given to another engine.
        """
        self.finish_saving()
        self._destroyed = True
        self._watch_hook.remove()
        self._drop_parts()
        get_accelerator().empty_cache()

    def _drop_parts(self) -> None:
        owner = self._zero or self._gatherer  # the first detaches the other too
        if owner is not None:
            owner.detach()
        for feature in self._features:
            feature.close()
        self._features = []
        self.optimizer = self._zero = self._reducer = self._gatherer = self.lr_scheduler = None

    def _training_parts(self, call: str) -> tuple[Any, Any]:
        if self._zero is None or self._reducer is None:
            raise UsageError(
                f"engine.{call}: this engine has no optimizer; give deepspeed.initialize an optimizer, or an "
                '"optimizer" section in the configuration'
            )
        return self._zero, self._reducer

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a counter or flag that is there without asking, as torch does, whether it is a parameter."""
        if name in self.__dict__ and not isinstance(value, (nn.Module, Tensor)):
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is None or not hasattr(module, name):
                raise AttributeError(
                    f"neither DeepSpeedEngine nor its module has an attribute {name!r}"
                ) from None
            return getattr(module, name)


def _implicit_backward(owner: weakref.ref[DeepSpeedEngine]) -> None:
    """Tell an engine, if it is still there, of a backward that it did not start."""
    engine = owner()
    if engine is not None:
        engine.begin_implicit_backward()
