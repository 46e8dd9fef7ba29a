"""Names that scripts look for here; each is imported from where it lives when it is first used."""

from deepspeed.common.lazy import lazy_names
from deepspeed.utils import groups, logging, timer

WHERE = {
    "instrument_w_nvtx": "deepspeed.common.ranges",
    "is_initialized": "deepspeed.comm",
    "log_dist": "deepspeed.common.logging",
    "logger": "deepspeed.common.logging",
    "move_to_device": "deepspeed.common.nested",
    "safe_get_full_fp32_param": "deepspeed.zero.access",
    "safe_get_full_grad": "deepspeed.zero.access",
    "safe_get_full_optimizer_state": "deepspeed.zero.access",
    "safe_get_local_fp32_param": "deepspeed.zero.access",
    "safe_get_local_grad": "deepspeed.zero.access",
    "safe_get_local_optimizer_state": "deepspeed.zero.access",
    "safe_set_full_fp32_param": "deepspeed.zero.access",
    "safe_set_full_grad": "deepspeed.zero.access",
    "safe_set_full_optimizer_state": "deepspeed.zero.access",
    "safe_set_local_fp32_param": "deepspeed.zero.access",
    "safe_set_local_grad": "deepspeed.zero.access",
    "safe_set_local_optimizer_state": "deepspeed.zero.access",
    "see_memory_usage": "deepspeed.common.memory",
    "set_random_seed": "deepspeed.common.seeds",
    "RepeatingLoader": "deepspeed.data",
    "SynchronizedWallClockTimer": "deepspeed.common.timers",
    "ThroughputTimer": "deepspeed.common.timers",
}

LATER = {
    "get_z3_leaf_modules": "sharding of parameters (stage 3)",
    "set_z3_leaf_module": "sharding of parameters (stage 3)",
    "set_z3_leaf_modules": "sharding of parameters (stage 3)",
    "unset_z3_leaf_modules": "sharding of parameters (stage 3)",
    "z3_leaf_module": "sharding of parameters (stage 3)",
}

__getattr__ = lazy_names(__name__, WHERE, LATER)

__all__ = ["groups", "logging", "timer", *WHERE]
