"""zero.Init: modules are sharded as they are constructed, so that no rank ever holds the whole model.

Note [Born sharded]
Inside the context every module class's ``__init__`` is wrapped: when the constructor of a module returns, the
parameters it made become units of one parameter each, with the first rank's values. Whatever changes them
later in the context (an initialiser of the parent, a copy of a layer) sees them whole, and the first rank's
changes count. The engine regroups these units into its own, one at a time.

An initialiser may take a view and write to it next (``nn.init.orthogonal_``, ``weight[0].fill_(1)``). So a unit of
which a view was taken stays whole until the running constructor ends, another begins, or views of a few more
units have been taken.

What a parametrization computes a weight from (``torch.nn.utils.parametrizations.weight_norm``) stays whole until
``initialize``: whoever reads the weight, an initialiser on the first rank alone for one, reads that too and
cannot name it to ``GatheredParameters``.

The constructors of tensors are wrapped too, so that parameters are made in the dtype and on the device that
training will use. Outside of a ``with`` block nothing of torch is changed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.config import read_config
from deepspeed.config.compilation import AioSection
from deepspeed.config.zero import OffloadParamSection
from deepspeed.errors import ConfigError, NotBuiltError
from deepspeed.precision.policy import PrecisionPolicy
from deepspeed.zero import constructors
from deepspeed.zero.buffers import Scratch
from deepspeed.zero.gathered import GatheredParameters
from deepspeed.zero.holder import Holder, leave_device, make_holder
from deepspeed.zero.layout import even_layout
from deepspeed.zero.meter import GatherMeter
from deepspeed.zero.slot import slot_of
from deepspeed.zero.stage import RankGroup, Sharding, sharding_for_stage
from deepspeed.zero.unit import Unit, refuse

TRIM_EVERY = 32 * 2**20
"""Bytes of parameters made on the host after which the heap's holes, left by whole ones, go back to the system."""

SCRATCH = 64 * 2**20
"""Bytes on the host through which values of parameters go to their shards. See note [Buffers on the host]."""

LENT = 4
"""Units that stay whole for views of them."""

CONSTRUCTORS = ("tensor", "empty", "zeros", "ones", "full", "arange", "eye", "rand", "randn")


class Init:
    """Context in which modules are sharded as they are constructed.

    It starts torch.distributed if nobody has. Nested contexts do nothing, nor do those inside of
    ``torch.device("meta")``.

    Args:
        module: shard this finished module at once, instead of what is constructed inside.
        data_parallel_group: ranks to shard over; None: those of `mpu`, or all.
        mem_efficient_linear: accepted; gathered weights are never kept for backward.
        remote_device: where shards live: "none" (on the device), "cpu" or "nvme" (in the folder that the
            configuration names); None: as ``offload_param`` says.
        pin_memory: page-locked memory for shards on the host of a device; ``offload_param`` decides where it is.
        config_dict_or_path: configuration; its precision gives the dtype, its MiCS and hpZ keys the groups.
        config: older name of the same.
        enabled: False does nothing.
        dtype: of floating-point parameters; None: from the configuration, else torch's default.
        mpu: model-parallel unit with ``get_data_parallel_group()``.
        zero_param_parallel_group: ranks that share one copy of the parameters (hpZ); taken from the configuration.
        zero_quantized_weights: must be False.
        zero_quantized_nontrainable_weights: must be False.
        sequence_data_parallel_group: ranks to shard over, instead of `data_parallel_group`.
        param_swapper: must be None.

    Raises:
        ConfigError: the configuration does not exist or is wrong, or both group arguments are given.
        NotBuiltError: an argument asks for what does not exist yet.
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        data_parallel_group: Any = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: Any = None,
        config: Any = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Any = None,
        zero_param_parallel_group: Any = None,
        zero_quantized_weights: bool = False,
        zero_quantized_nontrainable_weights: bool = False,
        sequence_data_parallel_group: Any = None,
        param_swapper: Any = None,
    ) -> None:
        self._enabled = enabled
        self._entered: Construction | None = None
        if not enabled:
            return
        _check_kinds(module, data_parallel_group or sequence_data_parallel_group, mpu, dtype)
        _refuse_unbuilt(param_swapper, zero_quantized_weights or zero_quantized_nontrainable_weights)
        comm.init_distributed(verbose=False)
        if data_parallel_group is not None and sequence_data_parallel_group is not None:
            raise ConfigError(
                "zero.Init: expected data_parallel_group or sequence_data_parallel_group, got both; pass one"
            )
        group = data_parallel_group or sequence_data_parallel_group
        if group is None and mpu is not None:
            group = mpu.get_data_parallel_group()
        source = config_dict_or_path if config_dict_or_path is not None else config
        self._dtype = dtype
        sizes: dict[str, Any] = {}
        offload, self._aio = None, AioSection()
        if source is not None:
            settings = read_config(source, bf16_supported=get_accelerator().is_bf16_supported())
            zero = settings.zero_optimization
            sizes = {"mics_size": zero.mics_shard_size, "hpz_size": zero.zero_hpz_partition_size}
            offload, self._aio = zero.offload_param, settings.aio
            if dtype is None and (settings.fp16.enabled or settings.bf16.enabled):
                self._dtype = torch.float16 if settings.fp16.enabled else torch.bfloat16
        self._offload = _offload_to(remote_device, offload, pin_memory)
        away = leave_device(self._offload, _device())
        self._sharding = sharding_for_stage(3, RankGroup.of(group), **sizes, away=away)
        if module is not None:
            self._construction().shard_all(module)

    def _construction(self) -> Construction:
        holder = make_holder(self._sharding, _device(), self._offload, self._aio)
        return Construction(self._sharding, self._dtype, holder)

    def __enter__(self) -> Init:
        on_meta = torch.get_default_device().type == "meta"  # nothing is made, so there is nothing to shard
        if self._enabled and not on_meta and not constructors.is_patched():
            self._entered = self._construction()
            self._entered.begin()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._entered is not None:
            self._entered.end(*error)
            self._entered = None


class Construction:
    """What happens to the modules that are made in one context."""

    def __init__(self, sharding: Sharding, dtype: torch.dtype | None, holder: Holder) -> None:
        self._sharding, self._dtype, self._holder = sharding, dtype, holder
        self._device = _device()
        on_host = self._device.type == "cpu" and sharding.releases
        self._scratch = Scratch(SCRATCH, self._device) if on_host else None
        self._meter = GatherMeter()
        self._under_way: list[nn.Module] = []
        self._units: list[Unit] = []
        self._untrimmed = 0
        self._lent: list[GatheredParameters] = []

    def begin(self) -> None:
        """Wrap the constructors of tensors and modules."""
        dtype = self._dtype or torch.get_default_dtype()
        constructors.patch_tensors(CONSTRUCTORS, _tensor_wrapper(), dtype, self._device)
        constructors.patch_modules(self._around)

    def end(self, *error: Any) -> None:
        """Take the wrappers off; with an error, nobody waits for the other ranks any more."""
        constructors.unpatch()
        self._take_back(0, *error)
        self._close()

    def _close(self) -> None:
        for unit in self._units:
            unit.demand = refuse
            unit.lend = None

    def _lend(self, unit: Unit, view: Any) -> Any:
        """Keep a unit whole for a view of it, which may be written to later."""
        self._take_back(LENT - 1)
        context = _first_rank_decides(unit)
        self._lent.append(context)
        context.__enter__()
        return view

    def _take_back(self, keep: int = 0, kind: Any = None, *error: Any) -> None:
        """Release units whose views have been written to, all but the latest."""
        while len(self._lent) > keep:
            self._lent.pop(0).__exit__(kind, *error)

    def _around(self, module: nn.Module, construct: Callable[[], None]) -> None:
        """Run a constructor; shard what it made when the outermost one for this module returns."""
        outermost = not any(one is module for one in self._under_way)
        self._take_back()
        self._under_way.append(module)
        try:
            construct()
        finally:
            self._under_way.pop()
        self._take_back()
        if outermost:
            if isinstance(module, ParametrizationList):
                _fill(module)
            self._shard(module.__class__.__name__, module, recurse=not self._under_way)

    def shard_all(self, module: nn.Module) -> None:
        """Shard a finished module."""
        self._shard("", module, recurse=True)
        self._close()

    def _shard(self, prefix: str, module: nn.Module, *, recurse: bool) -> None:
        computed_from = _parametrised(module.modules() if recurse else [module])
        for name, param in list(module.named_parameters(recurse=recurse)):
            if slot_of(param) is None and not param.is_meta and id(param) not in computed_from:
                self._make_unit(f"{prefix}.{name}" if prefix else name, param)

    def _make_unit(self, name: str, param: nn.Parameter) -> None:
        dtypes = PrecisionPolicy(storage=self._dtype if param.is_floating_point() else None).of(param)
        unit = Unit(
            [(name, param)],
            even_layout([param.numel()], self._sharding.shard_group.size),
            self._sharding,
            dtypes,
            self._device,
            trained=False,
            holder=self._holder,
            meter=self._meter,
            scratch=self._scratch,
        )
        unit.demand, unit.lend = _first_rank_decides, self._lend
        unit.may_resize = True
        self._units.append(unit)
        self._untrimmed += unit.layout.total * unit.flat.element_size()
        if self._device.type == "cpu" and self._untrimmed >= TRIM_EVERY:
            self._untrimmed = 0
            get_accelerator().empty_cache()


def _parametrised(modules: Iterable[nn.Module]) -> set[int]:
    """Return the ids of parameters from which ``torch.nn.utils.parametrize`` computes others."""
    lists = (one for one in modules if isinstance(one, ParametrizationList))
    return {id(param) for one in lists for param in one.parameters(recurse=False)}


@torch.no_grad()
def _fill(parametrised: ParametrizationList) -> None:
    """Give values to a weight that was made while torch's initialisers were switched off.

    transformers switches them off and gives values later, by name; to what a weight is computed from it cannot.
    """
    if nn.init.kaiming_uniform_.__module__ != nn.init.__name__:
        weight = parametrised()
        bound = max(weight[0].numel(), 1) ** -0.5
        parametrised.right_inverse(torch.empty_like(weight).uniform_(-bound, bound))


def _tensor_wrapper() -> Callable[..., Any]:
    """Return the wrapper of tensor constructors; transformers replaces it, under its old import path."""
    old_path = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    return getattr(old_path, "zero_wrapper_for_fp_tensor_constructor", constructors.with_target)


def _first_rank_decides(unit: Unit) -> GatheredParameters:
    return GatheredParameters(unit.params, modifier_rank=unit.sharding.everyone.first_rank)


def _check_kinds(module: Any, group: Any, mpu: Any, dtype: Any) -> None:
    problem = None
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        problem = f"dtype: expected a floating-point torch.dtype, got {dtype!r}"
    elif module is not None and not isinstance(module, nn.Module):
        problem = f"module: expected a torch.nn.Module, got {type(module).__name__}"
    elif mpu is not None and not hasattr(mpu, "get_data_parallel_group"):
        problem = f"mpu: expected an object with get_data_parallel_group, got {mpu!r}"
    elif group is not None and not isinstance(group, dist.ProcessGroup):
        problem = f"data_parallel_group: expected a process group, got {group!r}"
    if problem:
        raise ConfigError(f"zero.Init: {problem}")


def _device() -> torch.device:
    return torch.device(get_accelerator().current_device_name())


def _offload_to(
    remote_device: str | None, section: OffloadParamSection | None, pin: bool
) -> OffloadParamSection | None:
    """Return the configured ``offload_param`` with the device that the argument names."""
    if remote_device is None:
        return section
    if remote_device not in ("none", "cpu", "nvme"):
        raise ConfigError(
            f'zero.Init: remote_device: expected "none", "cpu" or "nvme", got {remote_device!r}'
        )
    section = section or OffloadParamSection(pin_memory=pin)
    if remote_device == "nvme" and not section.nvme_path:
        raise ConfigError(
            "zero.Init: remote_device: nvme needs a folder; set zero_optimization.offload_param.nvme_path in the "
            "configuration, and pass that as config_dict_or_path"
        )
    return section.model_copy(update={"device": remote_device})


def _refuse_unbuilt(param_swapper: Any, quantised: bool) -> None:
    if param_swapper is not None:
        raise ConfigError(
            "zero.Init: param_swapper: expected None, got another swapper; parameters go to disk as "
            "zero_optimization.offload_param of the configuration says"
        )
    if quantised:
        raise NotBuiltError("zero.Init: quantised weights are not built yet; leave the argument out")
