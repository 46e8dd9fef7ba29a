"""``deepspeed.checkpointing``: recompute a function in backward, and say where its inputs wait for that.

    hidden = deepspeed.checkpointing.checkpoint(layer, hidden, mask)

Torch recomputes. What the ``activation_checkpointing`` section or `configure` ask for beyond that is a way of
storing the saved inputs (stores.py) or something at the edges of each checkpoint (boundaries.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from deepspeed.accelerator import get_accelerator
from deepspeed.activation_checkpointing.boundaries import (
    Boundary,
    Profile,
    SameNumbers,
    Surrounded,
    Synchronize,
)
from deepspeed.activation_checkpointing.random import MODEL_PARALLEL, CudaRNGStatesTracker, set_device_state
from deepspeed.activation_checkpointing.stores import Contiguous, Host, Partition, Store, storing
from deepspeed.config import DeepSpeedConfig, read_config
from deepspeed.config.activation import ActivationCheckpointingSection
from deepspeed.errors import ConfigError
from deepspeed.parallel.groups import Axes, axes

_MODEL_PARALLEL_RNG_TRACKER_NAME = MODEL_PARALLEL
_CUDA_RNG_STATE_TRACKER = CudaRNGStatesTracker()
_set_cuda_rng_state = set_device_state

_BETWEEN_STREAMS = 2718
"""Distance of the model-parallel seeds from the common one: Megatron's, so that runs can be compared."""


class _Settings:
    """What was asked for last, and what carries it out."""

    def __init__(self) -> None:
        self.axes = axes
        self.section = ActivationCheckpointingSection()
        self.given: dict[str, Any] = {}  # arguments of `configure`, which override the section
        self.is_configured = False
        self.stores: list[Store] = []
        self.boundaries: list[Boundary] = []

    def apply(self, section: ActivationCheckpointingSection, given: dict[str, Any], mpu: Any) -> None:
        wanted = section.model_copy()
        for name, value in given.items():
            setattr(wanted, name, value)
        if wanted.contiguous_memory_optimization and wanted.number_checkpoints is None:
            raise ConfigError(
                "activation_checkpointing.number_checkpoints: expected a number with "
                "contiguous_memory_optimization, got null; add it, or pass num_checkpoints to configure"
            )
        if mpu is not None:
            self.axes = Axes()
            self.axes.mpu = mpu
        self.section, self.given, self.is_configured = section, given, True
        self.stores = self._stores(wanted)
        self.boundaries = [Synchronize()] if wanted.synchronize_checkpoint_boundary else []
        self.boundaries += [Profile()] if wanted.profile else []

    def _stores(self, wanted: ActivationCheckpointingSection) -> list[Store]:
        stores: list[Store] = []
        group = self.axes.tensor_model_parallel_group()
        if wanted.partition_activations and group is not None and torch.distributed.get_world_size(group) > 1:
            stores.append(Partition(group))
        if wanted.contiguous_memory_optimization:
            assert wanted.number_checkpoints is not None
            stores.append(Contiguous(wanted.number_checkpoints, on_host=wanted.cpu_checkpointing))
        elif wanted.cpu_checkpointing:
            stores.append(Host())
        return stores


_settings = _Settings()


def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """Return ``function(*args)``, of which only the arguments are saved; backward runs it a second time.

    The second run draws the same random numbers. Nested calls, `torch.no_grad`, repeated backward and
    ``torch.autograd.grad`` work. A function must not depend on anything that changes before backward.
    """
    boundaries = _boundaries()
    if boundaries or _settings.stores:
        return _checkpoint_with(boundaries, function, args)
    return torch_checkpoint(function, *args, use_reentrant=False)


# Inside a compiled function this part stays eager: hooks and contexts of ours cannot be traced.
@torch._disable_dynamo  # type: ignore[attr-defined,untyped-decorator]
def _checkpoint_with(boundaries: list[Boundary], function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    saving: AbstractContextManager[Any] = nullcontext()
    if _settings.stores and torch.is_grad_enabled():
        saving = storing(_settings.stores, args)
    with saving:
        return torch_checkpoint(
            function,
            *args,
            use_reentrant=False,
            context_fn=lambda: (Surrounded(boundaries, "forward"), Surrounded(boundaries, "recompute")),
        )


non_reentrant_checkpoint = checkpoint


class CheckpointFunction:
    """The call form of pipelines written for the original: outputs are appended to a list."""

    @staticmethod
    def apply(function: Callable[..., Any], all_outputs: list[Any], *args: Any) -> Any:
        """Return `checkpoint` of the function; `all_outputs` grows by its outputs."""
        outputs = checkpoint(function, *args)
        all_outputs.extend(outputs if isinstance(outputs, (tuple, list)) else [outputs])
        return outputs


def configure(
    mpu_: Any,
    deepspeed_config: Any = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Say how `checkpoint` keeps inputs. Arguments that are not None override the configuration's section.

    Args:
        mpu_: model-parallel unit with ``get_tensor_model_parallel_group()`` or ``get_model_parallel_group()``;
            None keeps the one given before, or to `deepspeed.initialize`.
        deepspeed_config: dict, path or DeepSpeedConfig whose section is used; None keeps the engine's.
        partition_activations: each model-parallel rank keeps its share of each input.
        contiguous_checkpointing: inputs are copied into one buffer per size; needs `num_checkpoints`.
        num_checkpoints: checkpoints that wait for backward at once.
        checkpoint_in_cpu: inputs are kept in host memory.
        synchronize: wait for the device at the edges of each checkpoint.
        profile: log the time of all checkpoints' forward and recomputation after each backward.

    Raises:
        ConfigError: a value cannot be used; nothing has changed then.
    """
    given = {
        "partition_activations": partition_activations,
        "contiguous_memory_optimization": contiguous_checkpointing,
        "number_checkpoints": num_checkpoints,
        "cpu_checkpointing": checkpoint_in_cpu,
        "synchronize_checkpoint_boundary": synchronize,
        "profile": profile,
    }
    section = _settings.section if deepspeed_config is None else _section_of(deepspeed_config)
    _settings.apply(section, {name: value for name, value in given.items() if value is not None}, mpu_)


def configure_from(section: ActivationCheckpointingSection, mpu: Any = None) -> None:
    """Use the section of an engine's configuration; what `configure` was told stays in force."""
    _settings.apply(section, _settings.given, mpu)


def is_configured() -> bool:
    """Tell whether `configure` was called, or an engine's configuration had the section."""
    return _settings.is_configured


def reset() -> None:
    """Give back the buffers of contiguous checkpointing."""
    for store in _settings.stores:
        if isinstance(store, Contiguous):
            store.clear()


def get_cuda_rng_tracker() -> CudaRNGStatesTracker:
    """Return the tracker of named streams of random numbers; `checkpoint` replays all of them."""
    return _CUDA_RNG_STATE_TRACKER


def model_parallel_cuda_manual_seed(seed: int) -> None:
    """Seed the device alike on all model-parallel ranks, and the model-parallel stream differently on each."""
    _CUDA_RNG_STATE_TRACKER.reset()
    get_accelerator().manual_seed(seed)
    _CUDA_RNG_STATE_TRACKER.add(MODEL_PARALLEL, _model_parallel_seed(seed))


def model_parallel_reconfigure_tp_seed(seed: int) -> None:
    """Start the model-parallel stream again from `seed`, differently on each model-parallel rank."""
    with _CUDA_RNG_STATE_TRACKER.fork():
        get_accelerator().manual_seed(_model_parallel_seed(seed))


def _model_parallel_seed(seed: int) -> int:
    return seed + _BETWEEN_STREAMS + _settings.axes.tensor_model_parallel_rank()


def _boundaries() -> list[Boundary]:
    eager_device = not get_accelerator().on_host and not torch.compiler.is_compiling()
    if _CUDA_RNG_STATE_TRACKER.states_ or eager_device:
        return [*_settings.boundaries, SameNumbers(_CUDA_RNG_STATE_TRACKER)]
    return _settings.boundaries


def _section_of(config: Any) -> ActivationCheckpointingSection:
    if isinstance(config, (Mapping, str, os.PathLike)):
        config = read_config(config)
    if not isinstance(config, DeepSpeedConfig):
        raise ConfigError(
            f"deepspeed_config: expected a dict, a path or a DeepSpeedConfig, got {type(config).__name__}"
        )
    return config.activation_checkpointing
