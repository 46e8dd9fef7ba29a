"""The engine's documented one-line accessors, by the names scripts and trainers call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from deepspeed.config import DeepSpeedConfig
    from deepspeed.config.batch import BatchSizes
    from deepspeed.precision.policy import PrecisionPolicy
    from deepspeed.zero.optimizer import ZeroOptimizer
    from deepspeed.zero.stage import RankGroup


class EngineAccessors(nn.Module):
    """Read-only answers about a running engine. Nothing here changes state."""

    _zero: ZeroOptimizer | None
    settings: DeepSpeedConfig
    batch: BatchSizes
    policy: PrecisionPolicy
    data_parallel: RankGroup
    global_steps: int
    micro_steps: int

    # -- batch ------------------------------------------------------------------------------------

    def train_batch_size(self) -> int | None:
        """Samples per optimizer step over all ranks; None until "auto" is resolved."""
        return self.batch.train

    def train_micro_batch_size_per_gpu(self) -> int | None:
        """Samples per rank and forward; None until "auto" is resolved."""
        return self.batch.micro

    def gradient_accumulation_steps(self) -> int:
        """Micro-batches per optimizer step."""
        return self.batch.gas

    # -- numbers ----------------------------------------------------------------------------------

    def get_lr(self) -> list[float]:
        """Learning rate of each param group."""
        return [group["lr"] for group in self._param_groups()]

    def get_mom(self) -> list[Any]:
        """Momentum of each param group: ``momentum``, else ``betas``, else 0.0."""
        return [group.get("momentum", group.get("betas", 0.0)) for group in self._param_groups()]

    def get_type(self) -> list[Any]:
        """The ``type`` entry of each param group, None where there is none."""
        return [group.get("type") for group in self._param_groups()]

    def get_global_grad_norm(self) -> float | None:
        """Norm of the averaged gradients of the last step, before clipping; None before the first step."""
        norm = self._zero.global_grad_norm if self._zero is not None else None
        return None if norm is None else float(norm)

    @property
    def cur_scale(self) -> float:
        """The loss scale; 1 where the loss is not scaled."""
        return self._zero.loss_scale if self._zero is not None else 1.0

    def loss_scale(self) -> float:
        """The loss scale; 1 where the loss is not scaled."""
        return self.cur_scale

    def dynamic_loss_scale(self) -> bool:
        """Whether the loss scale adapts to overflows."""
        return self._zero is not None and self._zero.loss_scaler.dynamic

    def gradient_clipping(self) -> float:
        """Largest global gradient norm; 0 does not clip."""
        return self.settings.gradient_clipping

    def gradient_predivide_factor(self) -> float:
        """Part of the averaging that is done before reduction."""
        return self.settings.gradient_predivide_factor

    def steps_per_print(self) -> float | None:
        """Optimizer steps between progress lines; None prints none."""
        return self.settings.steps_per_print

    def get_batch_info(self) -> tuple[int | None, int | None, int]:
        """Return (train batch, micro-batch, accumulation steps)."""
        return self.batch.train, self.batch.micro, self.gradient_accumulation_steps()

    # -- what is on -------------------------------------------------------------------------------

    def fp16_enabled(self) -> bool:
        """Whether parameters are stored in fp16."""
        return self.policy.storage is torch.float16

    def bfloat16_enabled(self) -> bool:
        """Whether parameters are stored in bf16."""
        return self.policy.storage is torch.bfloat16

    def torch_autocast_enabled(self) -> bool:
        """Whether forward runs under ``torch.autocast``."""
        return self.policy.autocast is not None

    def torch_autocast_dtype(self) -> torch.dtype | None:
        """The autocast dtype, or None."""
        return self.policy.autocast

    def amp_enabled(self) -> bool:
        """False: Apex AMP is not supported."""
        return False

    def random_ltd_enabled(self) -> bool:
        """Whether layers drop tokens at random."""
        return self.settings.data_efficiency.data_routing.random_ltd.enabled

    def zero_optimization(self) -> bool:
        """Whether anything is sharded."""
        return self.zero_optimization_stage() > 0

    def zero_optimization_stage(self) -> int:
        """The ZeRO stage."""
        return int(self.settings.zero_optimization.stage)

    def zero_optimization_partition_gradients(self) -> bool:
        """Whether gradients are sharded."""
        return self.zero_optimization_stage() >= 2

    def zero_optimization_partition_weights(self) -> bool:
        """Whether parameters are sharded."""
        return self.zero_optimization_stage() >= 3

    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        """Whether `save_16bit_model` may gather sharded weights."""
        return self.settings.zero_optimization.stage3_gather_16bit_weights_on_model_save

    def zero_use_cpu_optimizer(self) -> bool:
        """Whether optimizer state lives in host memory beside a device."""
        offload = self.settings.zero_optimization.offload_optimizer
        return offload is not None and offload.device != "none"

    zero_cpu_offload = zero_use_cpu_optimizer

    def wall_clock_breakdown(self) -> bool:
        """Whether forward, backward and step times are logged."""
        return self.settings.wall_clock_breakdown

    def communication_data_type(self) -> torch.dtype | None:
        """The dtype gradients are reduced in, where it was chosen."""
        return self.policy.reduce

    # -- data parallel ----------------------------------------------------------------------------

    @property
    def dp_world_size(self) -> int:
        """Number of data-parallel ranks."""
        return self.data_parallel.size

    @property
    def data_parallel_group(self) -> torch.distributed.ProcessGroup | None:
        """The data-parallel process group; None is the default group."""
        return self.data_parallel.process_group

    # -- helpers ----------------------------------------------------------------------------------

    def _param_groups(self) -> list[dict[str, Any]]:
        return [] if self._zero is None else self._zero.param_groups

    def get_parameter_dtypes(self) -> list[dict[str, str]]:
        """One row per kind of parameter: storage, compute, reduce, accumulate and master dtype."""
        return self.policy.describe(self.parameters())
