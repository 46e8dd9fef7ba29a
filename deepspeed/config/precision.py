"""Number formats: ``fp16``, ``bf16``, ``torch_autocast``, ``amp`` and ``data_types``."""

from typing import ClassVar

from deepspeed.config.base import Amount, DtypeName, Section, Size, key


class Fp16Section(Section):
    """Parameters in fp16, master weights in fp32, gradients protected by a loss scale."""

    enabled: bool = key(False, "train in fp16 with loss scaling")
    auto_cast: bool = key(False, "cast floating-point inputs of forward to fp16")
    loss_scale: Amount = key(0.0, "0: dynamic loss scale; above 0: this fixed scale")
    initial_scale_power: Size = key(16, "the first dynamic scale is 2 to this power")
    loss_scale_window: Size = key(1000, "steps without overflow before the scale is doubled")
    hysteresis: Size = key(2, "overflows tolerated before the scale is halved")
    consecutive_hysteresis: bool = key(False, "refill that tolerance after every step without overflow")
    min_loss_scale: Amount = key(1, "the dynamic scale never goes below this; an overflow there is an error")
    fp16_master_weights_and_grads: bool = key(False, "keep master weights and gradients in fp16 (stages 1-3)")


class Bf16Section(Section):
    """Parameters in bf16, master weights in fp32."""

    enabled: bool = key(False, "train in bf16")
    immediate_grad_update: bool = key(False, "no effect; a unit's gradients are added when complete")
    check_grad_overflow: bool = key(True, "skip the step when a gradient is infinite or not a number")
    bf16_master_weights_and_grads: bool = key(False, "keep master weights and gradients in bf16 (stages 1-3)")
    bf16_optimizer_states: bool = key(False, "keep optimizer states in bf16 too; needs the key above")

    aliases: ClassVar = {"check_overflow": "check_grad_overflow"}


class AutocastSection(Section):
    """torch.autocast around forward; parameters keep their dtype."""

    enabled: bool = key(False, "run forward under torch.autocast")
    dtype: DtypeName | None = key(None, "what autocast computes in; null means bf16")
    lower_precision_safe_modules: list[str] | None = key(
        None, "full class names whose parameters may be communicated in the lower dtype"
    )


class AmpSection(Section):
    """NVIDIA Apex, which PyTorch's own autocast replaced; only `enabled: false` is accepted."""

    enabled: bool = key(False, "refused when true: use torch_autocast")
    opt_level: str | None = key(None, "Apex level; without effect")

    open_ended: ClassVar[bool] = True


class DataTypesSection(Section):
    """Dtypes of single steps of the training loop."""

    grad_accum_dtype: DtypeName | None = key(None, "dtype in which gradients are summed; null means fp32")
    param_dtype: DtypeName | None = key(None, "dtype of parameters; must agree with fp16 or bf16")
    buffer_dtype: DtypeName | None = key(None, "cast floating-point buffers to this; null leaves them alone")
