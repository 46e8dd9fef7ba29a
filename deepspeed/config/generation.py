"""``hybrid_engine`` and ``weight_quantization``: generating with a model in training, or a frozen one."""

from typing import Annotated, Literal

from deepspeed.config.base import Count, Expects, Integer, Section, key, to_integer


class HybridEngineSection(Section):
    """Training and generation in turns, as in RLHF."""

    enabled: bool = key(False, "use it")
    max_out_tokens: Count = key(512, "longest sequence")
    inference_tp_size: Count = key(1, "tensor parallelism while generating")
    release_inference_cache: bool = key(False, "free the key-value cache after generating")
    pin_parameters: bool = key(True, "stage 3: gather every layer before generating")
    tp_gather_partition_size: Count = key(8, "layers gathered together when splitting for generation")
    enable_cuda_graph: bool = key(False, "replay a CUDA graph")


class QuantizedWeightSection(Section):
    """How a weight is quantised."""

    num_bits: Annotated[Literal[4, 8], Expects("4 or 8", to_integer)] = key(8, "bits per element")
    group_size: Count = key(64, "elements that share a scale")
    group_dim: Integer = key(0, "dim along which groups are cut")
    symmetric: bool = key(False, "must be false")


class WeightQuantizationSection(Section):
    """Weights of a frozen model kept quantised; giving the section turns it on."""

    enabled: bool = key(True, "use it")
    quantized_initialization: QuantizedWeightSection | None = key(None, "quantise while zero.Init runs")
    post_init_quant: dict[str, QuantizedWeightSection] = key({}, "part of a module's name -> how")
    num_bits: Count = key(8, "without effect here")
    q_type: str = key("symmetric", "without effect here")
    q_groups: Count = key(1, "without effect here")
