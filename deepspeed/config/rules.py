"""Keys that must agree with each other. One rule, one function; each yields lines of an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from deepspeed.config.base import shown
from deepspeed.config.root import DeepSpeedConfig
from deepspeed.config.tree import lookup
from deepspeed.errors import ConfigError

Lines = Iterator[str]

LARGEST_POWER = 127


def check(config: DeepSpeedConfig) -> None:
    """Raise ConfigError with one line for each broken rule."""
    lines = [line for rule in RULES for line in rule(config)]
    if lines:
        raise ConfigError("\n".join(lines))


def _refused(config: DeepSpeedConfig) -> Lines:
    if config.amp.enabled:
        yield "amp.enabled: expected false, got true; torch_autocast.enabled or bf16.enabled replaces Apex"
    if config.sparse_gradients:
        yield (
            "sparse_gradients: expected false, got true; gradients of a unit lie in one flat buffer and are "
            "reduced dense; remove the key"
        )
    if config.data_efficiency.data_routing.random_ltd.layer_token_lr_schedule.enabled:
        path = "data_efficiency.data_routing.random_ltd.layer_token_lr_schedule.enabled"
        yield f"{path}: expected false, got true; it was never supported; remove the key"
    if config.expert_parallel.load_balance_coeff is not None:
        yield (
            "expert_parallel.load_balance_coeff: expected null, got "
            f"{shown(config.expert_parallel.load_balance_coeff)}; it was never supported; remove the key"
        )


def _precision(config: DeepSpeedConfig) -> Lines:
    if config.fp16.enabled and config.bf16.enabled:
        yield "fp16.enabled: expected false beside bf16.enabled, got true for both; turn one of them off"
    stage = config.zero_optimization.stage
    for path in ("fp16.fp16_master_weights_and_grads", "bf16.bf16_master_weights_and_grads"):
        if lookup(config, path) and stage == 0:
            yield f"{path}: expected false at stage 0, got true; set zero_optimization.stage to 1 or more"
    if config.bf16.bf16_optimizer_states and not config.bf16.bf16_master_weights_and_grads:
        yield (
            "bf16.bf16_optimizer_states: expected bf16.bf16_master_weights_and_grads to be true too, "
            "got false; set it, or turn bf16_optimizer_states off"
        )
    yield from _param_dtype(config)


def _param_dtype(config: DeepSpeedConfig) -> Lines:
    mode = "fp16" if config.fp16.enabled else "bf16" if config.bf16.enabled else "fp32"
    asked = config.data_types.param_dtype
    if asked not in (None, mode):
        yield (
            f'data_types.param_dtype: expected "{mode}" (from fp16.enabled and bf16.enabled), '
            f'got "{asked}"; remove the key or enable the section of that dtype'
        )


def _loss_scale(config: DeepSpeedConfig) -> Lines:
    fp16 = config.fp16
    if not fp16.enabled or fp16.loss_scale > 0:
        return
    for name in ("loss_scale_window", "min_loss_scale"):
        value = getattr(fp16, name)
        if value <= 0:
            yield f"fp16.{name}: expected a number above 0 with a dynamic loss scale, got {shown(value)}"
    if fp16.initial_scale_power > LARGEST_POWER:
        yield (
            f"fp16.initial_scale_power: expected at most {LARGEST_POWER}, above which the scale is infinite "
            f"in fp32, got {fp16.initial_scale_power}"
        )


def _optimizer(config: DeepSpeedConfig) -> Lines:
    for name in ("optimizer", "scheduler"):
        section, auto = getattr(config, name), config.is_auto(f"{name}.type")
        if section is not None and section.type is None and (section.params or auto):
            yield f"{name}.type: expected a name, got {'auto' if auto else 'nothing'}; add it"
    params = config.optimizer.params if config.optimizer else {}
    if "max_grad_norm" in params:
        yield (
            f"optimizer.params.max_grad_norm: expected it absent, got {shown(params['max_grad_norm'])}; "
            "set gradient_clipping at the top level instead"
        )


def _gradients(config: DeepSpeedConfig) -> Lines:
    if config.gradient_allreduce_op != "sum":
        return
    zero = config.zero_optimization
    for clash, there in (
        ("zero_optimization.stage 3", zero.stage == 3),
        ("zero_optimization.zenflow", zero.zenflow is not None),
        ("compile.deepcompile", config.compile.deepcompile),
    ):
        if there:
            yield f'gradient_allreduce_op: expected "mean" with {clash}, got "sum"; remove one of them'


def _offload(config: DeepSpeedConfig) -> Lines:
    zero = config.zero_optimization
    for name in ("offload_param", "offload_optimizer"):
        section = getattr(zero, name)
        if section is None or section.device != "nvme":
            continue
        if str(section.nvme_path or "none").lower() == "none":  # which is what Accelerate says
            yield (
                f"zero_optimization.{name}.nvme_path: expected a folder with device nvme, got "
                f"{shown(section.nvme_path)}; add the path of a folder on the drive"
            )
    if zero.stage < 3 and zero.offload_param is not None and zero.offload_param.device == "nvme":
        yield (
            'zero_optimization.offload_param.device: expected "none" or "cpu" below stage 3, where parameters stay '
            'whole, got "nvme"; set zero_optimization.stage to 3 or remove the section'
        )


def _checkpoint(config: DeepSpeedConfig) -> Lines:
    writer = config.checkpoint.writer
    if writer is not None and writer.type == "MOCK":
        yield (
            'checkpoint.writer.type: expected "FAST" or "PYTHON", got "MOCK", which would save nothing; remove the key'
        )


def _zenflow(config: DeepSpeedConfig) -> Lines:
    zenflow = config.zero_optimization.zenflow
    if zenflow and zenflow.select_strategy == "auto" and isinstance(zenflow.select_interval, int):
        yield (
            'zero_optimization.zenflow.select_interval: expected "auto" with select_strategy auto, '
            f"got {zenflow.select_interval}; set select_strategy to step or epoch"
        )


def _activation(config: DeepSpeedConfig) -> Lines:
    section = config.activation_checkpointing
    if section.contiguous_memory_optimization and section.number_checkpoints is None:
        yield (
            "activation_checkpointing.number_checkpoints: expected a number with "
            "contiguous_memory_optimization, got null; add it"
        )


def _compile(config: DeepSpeedConfig) -> Lines:
    section = config.compile
    passes = section.passes or []
    if "autotp" in passes and len(passes) > 1:
        yield f"compile.passes: expected autotp alone, got {shown(passes)}; remove the others"
    for name in ("offload_opt_states", "offload_parameters"):
        if section.offload_activation and getattr(section, name):
            yield f"compile.{name}: expected false with compile.offload_activation, got true; turn one off"


def _required(section: str, *names: str) -> Callable[[DeepSpeedConfig], Lines]:
    """Return the rule that an enabled `section` names these keys."""

    def rule(config: DeepSpeedConfig) -> Lines:
        if not lookup(config, f"{section}.enabled"):
            return
        for name in names:
            path = f"{section}.{name}"
            if lookup(config, path) is None or (config.source_of(path) == "default"):
                yield f"{path}: expected a value because {section}.enabled is true, got nothing; add it"

    return rule


def _elastic_batch(config: DeepSpeedConfig) -> Lines:
    section = config.elasticity
    if section.min_gpus > section.max_gpus:
        yield f"elasticity.min_gpus: expected at most max_gpus ({section.max_gpus}), got {section.min_gpus}"
    if section.version > 0.2:
        yield f"elasticity.version: expected at most 0.2, got {section.version}"
    if not section.enabled or section.ignore_non_elastic_batch_info:
        return
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if config.source_of(name) != "default":
            yield (
                f"{name}: expected it absent with elasticity.enabled, got {shown(getattr(config, name))}; "
                "remove it or set elasticity.ignore_non_elastic_batch_info"
            )


def _compression_groups(config: DeepSpeedConfig) -> Lines:
    for name in type(config.compression_training).model_fields:
        technique: Any = getattr(config.compression_training, name)
        if name == "layer_reduction" or not technique.shared_parameters.enabled:
            continue
        if not technique.different_groups:
            yield (
                f"compression_training.{name}.different_groups: expected at least one group because "
                "shared_parameters.enabled is true, got nothing; add one"
            )


SCHEDULE = ("min_difficulty", "max_difficulty", "schedule_type", "schedule_config")
RULES: tuple[Callable[[DeepSpeedConfig], Lines], ...] = (
    _refused,
    _precision,
    _loss_scale,
    _optimizer,
    _gradients,
    _offload,
    _checkpoint,
    _zenflow,
    _activation,
    _compile,
    _elastic_batch,
    _compression_groups,
    _required("elasticity", "max_train_batch_size", "micro_batch_sizes"),
    _required("curriculum_learning", "curriculum_type", *SCHEDULE),
    _required("data_efficiency.data_sampling.curriculum_learning", "data_cluster_path", "curriculum_metrics"),
    _required("data_efficiency.data_sampling.dynamic_batching", "max_tokens"),
    _required("data_efficiency.data_routing.random_ltd", "total_layer_num", "random_ltd_schedule"),
)
