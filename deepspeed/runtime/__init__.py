"""The import paths the original used, as one table; no logic lives here.

    from deepspeed.runtime.lr_schedules import WarmupLR      is      from deepspeed.schedules import WarmupLR

Every module of the table exists as soon as ``deepspeed.runtime`` is imported, and imports a name when it is
first used. Names whose feature does not exist yet stand in later.py; using one says so.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from deepspeed.common.lazy import lazy_names
from deepspeed.runtime.later import LATER

# old module -> old name -> "module that has it" or "module:its name there"
TABLE: dict[str, dict[str, str]] = {
    "activation_checkpointing": {},
    "activation_checkpointing.checkpointing": dict.fromkeys(
        (
            "CheckpointFunction",
            "CudaRNGStatesTracker",
            "_CUDA_RNG_STATE_TRACKER",
            "_MODEL_PARALLEL_RNG_TRACKER_NAME",
            "_set_cuda_rng_state",
            "checkpoint",
            "configure",
            "get_cuda_rng_tracker",
            "is_configured",
            "model_parallel_cuda_manual_seed",
            "model_parallel_reconfigure_tp_seed",
            "non_reentrant_checkpoint",
            "reset",
        ),
        "deepspeed.activation_checkpointing.checkpointing",
    ),
    "base_optimizer": {
        "DeepSpeedOptimizer": "deepspeed.zero.optimizer:ZeroOptimizer",
        "ZeROOptimizer": "deepspeed.zero.optimizer:ZeroOptimizer",
    },
    "bf16_optimizer": {"BF16_Optimizer": "deepspeed.zero.optimizer:ZeroOptimizer"},
    "checkpoint_engine": {"TorchCheckpointEngine": "deepspeed.checkpoint.torch_files"},
    "checkpoint_engine.torch_checkpoint_engine": {
        "TorchCheckpointEngine": "deepspeed.checkpoint.torch_files"
    },
    "config": {
        "DeepSpeedConfig": "deepspeed.config",
        "DeepSpeedConfigError": "deepspeed.errors:ConfigError",
    },
    "config_utils": {"DeepSpeedConfigModel": "deepspeed.config.base:Section"},
    "dataloader": {"DeepSpeedDataLoader": "deepspeed.data", "RepeatingLoader": "deepspeed.data"},
    "engine": {"DeepSpeedEngine": "deepspeed.engine.engine"},
    "fp16": {},
    "fp16.fused_optimizer": {"FP16_Optimizer": "deepspeed.zero.optimizer:ZeroOptimizer"},
    "fp16.loss_scaler": {
        "DynamicLossScaler": "deepspeed.precision.loss_scaler",
        "LossScaler": "deepspeed.precision.loss_scaler:StaticLossScaler",
    },
    "fp16.unfused_optimizer": {"FP16_UnfusedOptimizer": "deepspeed.zero.optimizer:ZeroOptimizer"},
    "lr_schedules": dict.fromkeys(
        ("LRRangeTest", "OneCycle", "VALID_LR_SCHEDULES", "WarmupCosineLR", "WarmupDecayLR", "WarmupLR"),
        "deepspeed.schedules",
    ),
    "pipe": {},
    "pipe.topology": {
        "PipeDataParallelTopology": "deepspeed.parallel.topology",
        "PipeModelDataParallelTopology": "deepspeed.parallel.topology",
        "ProcessTopology": "deepspeed.parallel.topology",
    },
    "utils": {
        "move_to_device": "deepspeed.common.nested",
        "see_memory_usage": "deepspeed.common.memory",
        "set_random_seed": "deepspeed.common.seeds",
    },
    "zero": dict.fromkeys(
        ("GatheredParameters", "Init", "MiCS_Init", "TiledLinear", "register_external_parameter"),
        "deepspeed.zero",
    ),
    "zero.config": {"DeepSpeedZeroConfig": "deepspeed.config.zero:ZeroSection"},
    "zero.offload_config": {
        "DeepSpeedZeroOffloadOptimizerConfig": "deepspeed.config.zero:OffloadOptimizerSection",
        "DeepSpeedZeroOffloadParamConfig": "deepspeed.config.zero:OffloadParamSection",
        "OffloadDeviceEnum": "deepspeed.zero.parking",
        "OffloadStateTypeEnum": "deepspeed.zero.parking",
    },
    "zero.parameter_offload": {"DeepSpeedZeRoOffload": "deepspeed.zero.gatherer:Gatherer"},
    "zero.partition_parameters": {
        "GatheredParameters": "deepspeed.zero",
        "Init": "deepspeed.zero",
        "ZeroParamStatus": "deepspeed.zero",
        "_orig_torch_arange": "deepspeed.zero.constructors:TORCH_ARANGE",
        "get_accelerator": "deepspeed.accelerator",
        "is_zero_param": "deepspeed.zero.slot",
        "register_external_parameter": "deepspeed.zero",
        "unregister_external_parameter": "deepspeed.zero",
        "zero_wrapper_for_fp_tensor_constructor": "deepspeed.zero.constructors:with_target",
    },
    "zero.stage3": {
        "DeepSpeedZeroOptimizer_Stage3": "deepspeed.zero.optimizer:ZeroOptimizer",
        **dict.fromkeys(
            (
                "estimate_zero3_model_states_mem_needs",
                "estimate_zero3_model_states_mem_needs_all_cold",
                "estimate_zero3_model_states_mem_needs_all_live",
            ),
            "deepspeed.zero",
        ),
    },
    "zero.tiling": dict.fromkeys(("TiledLinear", "TiledLinearReturnBias"), "deepspeed.zero"),
    "zero.utils": {"is_zero_param": "deepspeed.zero.slot"},
    "zero.stage_1_and_2": {
        "DeepSpeedZeroOptimizer": "deepspeed.zero.optimizer:ZeroOptimizer",
        **dict.fromkeys(
            (
                "estimate_zero2_model_states_mem_needs",
                "estimate_zero2_model_states_mem_needs_all_cold",
                "estimate_zero2_model_states_mem_needs_all_live",
            ),
            "deepspeed.zero",
        ),
    },
}


def _register() -> None:
    """Put a module for each path of the tables where ``import`` looks first, and into its parent."""
    for path in sorted({*TABLE, *LATER}):
        name, names = f"{__name__}.{path}", TABLE.get(path, {})
        feature, waiting = LATER.get(path, ("", ()))
        module = ModuleType(name, f"The names of ``{name}``, from where they live now.")
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        module.__dict__.update(
            __all__=sorted(names), __getattr__=lazy_names(name, names, dict.fromkeys(waiting, feature))
        )
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        setattr(sys.modules[parent], child, module)


_register()
