"""``compression_training`` and ``quantize_training``: quantised, pruned and shallower models."""

from typing import Annotated, Literal

from deepspeed.config.base import LOWER, Count, Fraction, Names, Section, Size, key, part
from deepspeed.config.monitoring import EigenvalueSection

Symmetry = Annotated[Literal["symmetric", "asymmetric"], LOWER]
Norm = Annotated[Literal["l1", "topk"], LOWER]


class LayerReductionSection(Section):
    """A student with fewer layers than its teacher."""

    enabled: bool = key(False, "use it")
    keep_number_layer: Count | None = key(None, "layers of the student")
    module_name_prefix: str | None = key(None, "where the layers are")
    teacher_layer: list[Size] | None = key(None, "layers taken from the teacher")
    other_module_name: list[str] | None = key(None, "other modules taken from the teacher")


class MixedQuantizeSection(Section):
    """Blend of fp16 and quantised weights."""

    enabled: bool = key(False, "use it")
    quantize_change_ratio: Fraction = key(0.001, "how fast the blend moves")


class WeightQuantizationShared(Section):
    """Quantised weights."""

    enabled: bool = key(False, "use it")
    quantizer_kernel: bool = key(False, "fused kernel")
    schedule_offset: Size = key(0, "first step")
    quantize_groups: Count = key(1, "groups per weight")
    quantize_verbose: bool = key(False, "print")
    quantization_type: Symmetry = key("symmetric", "symmetric or not")
    quantize_weight_in_forward: bool = key(False, "quantise in forward instead of in step")
    rounding: Annotated[Literal["nearest", "stochastic"], LOWER] = key("nearest", "how to round")
    fp16_mixed_quantize: MixedQuantizeSection = part(MixedQuantizeSection, "blend with fp16")


class ActivationQuantizationShared(Section):
    """Quantised activations."""

    enabled: bool = key(False, "use it")
    quantization_type: Symmetry = key("symmetric", "symmetric or not")
    range_calibration: Annotated[Literal["dynamic", "static"], LOWER] = key("dynamic", "how ranges are found")
    schedule_offset: Size = key(1000, "first step")


class SparsePruningShared(Section):
    """Single weights set to zero."""

    enabled: bool = key(False, "use it")
    method: Annotated[Literal["l1", "topk", "snip_momentum"], LOWER] = key("l1", "how they are chosen")
    schedule_offset: Size = key(1000, "first step")
    schedule_offset_end: Size | None = key(None, "last step; null: the first")
    schedule_offset_stride: Count = key(1, "steps between choices")
    block_pattern: str = key("4x1", "block of snip_momentum")
    dense_ratio: Fraction = key(0.1, "share that is kept")
    excluded_modules: list[str] = key([], "modules left alone")


class RowPruningShared(Section):
    """Output rows set to zero."""

    enabled: bool = key(False, "use it")
    method: Norm = key("l1", "how they are chosen")
    schedule_offset: Size = key(1000, "first step")


class HeadPruningShared(Section):
    """Attention heads set to zero."""

    enabled: bool = key(False, "use it")
    method: Norm = key("topk", "how they are chosen")
    num_heads: Count | None = key(None, "heads of the model; required")
    schedule_offset: Size = key(1000, "first step")


class ChannelPruningShared(Section):
    """Convolution channels set to zero."""

    enabled: bool = key(False, "use it")
    method: Norm = key("l1", "how they are chosen")
    schedule_offset: Size = key(1000, "first step")


class WeightBits(Section):
    """Bit schedule of one group."""

    start_bits: Count = key(..., "bits at the start")
    target_bits: Count = key(..., "bits at the end")
    quantization_period: Count = key(1, "steps between changes")


class ActivationBits(Section):
    """Bits of one group."""

    bits: Count = key(..., "bits of activations")


class DenseRatio(Section):
    """Density of one group."""

    dense_ratio: Fraction | None = key(None, "share that is kept")


class Group(Section):
    """Modules that share settings; `params` differ by technique."""

    modules: Names = key(["*"], "parts of module names")
    related_modules: list[list[str]] | None = key(None, "modules changed along with them")


class WeightBitsGroup(Group):
    """Modules whose weights have these bits."""

    params: WeightBits = key(..., "bit schedule")


class ActivationBitsGroup(Group):
    """Modules whose activations have these bits."""

    params: ActivationBits = key(..., "bits")


class DensityGroup(Group):
    """Modules pruned to this density."""

    params: DenseRatio = part(DenseRatio, "density")


class WeightQuantizationTechnique(Section):
    """Quantised weights."""

    shared_parameters: WeightQuantizationShared = part(WeightQuantizationShared, "for all groups")
    different_groups: dict[str, WeightBitsGroup] = key({}, "name -> modules and settings")


class ActivationQuantizationTechnique(Section):
    """Quantised activations."""

    shared_parameters: ActivationQuantizationShared = part(ActivationQuantizationShared, "for all groups")
    different_groups: dict[str, ActivationBitsGroup] = key({}, "name -> modules and settings")


class SparsePruningTechnique(Section):
    """Single weights set to zero."""

    shared_parameters: SparsePruningShared = part(SparsePruningShared, "for all groups")
    different_groups: dict[str, DensityGroup] = key({}, "name -> modules and settings")


class RowPruningTechnique(Section):
    """Output rows set to zero."""

    shared_parameters: RowPruningShared = part(RowPruningShared, "for all groups")
    different_groups: dict[str, DensityGroup] = key({}, "name -> modules and settings")


class HeadPruningTechnique(Section):
    """Attention heads set to zero."""

    shared_parameters: HeadPruningShared = part(HeadPruningShared, "for all groups")
    different_groups: dict[str, DensityGroup] = key({}, "name -> modules and settings")


class ChannelPruningTechnique(Section):
    """Convolution channels set to zero."""

    shared_parameters: ChannelPruningShared = part(ChannelPruningShared, "for all groups")
    different_groups: dict[str, DensityGroup] = key({}, "name -> modules and settings")


class CompressionSection(Section):
    """Techniques used by deepspeed.compression."""

    layer_reduction: LayerReductionSection = part(LayerReductionSection, "fewer layers")
    weight_quantization: WeightQuantizationTechnique = part(WeightQuantizationTechnique, "quantised weights")
    activation_quantization: ActivationQuantizationTechnique = part(
        ActivationQuantizationTechnique, "quantised activations"
    )
    sparse_pruning: SparsePruningTechnique = part(SparsePruningTechnique, "single weights")
    row_pruning: RowPruningTechnique = part(RowPruningTechnique, "rows")
    head_pruning: HeadPruningTechnique = part(HeadPruningTechnique, "attention heads")
    channel_pruning: ChannelPruningTechnique = part(ChannelPruningTechnique, "channels")


class QuantizeTrainingSection(Section):
    """The older quantised training."""

    eigenvalue: EigenvalueSection = part(EigenvalueSection, "eigenvalues of the loss")
