"""Names that scripts look for here; each is imported from where it lives when it is first used."""

from deepspeed.common.lazy import lazy_names
from deepspeed.utils import groups, logging, timer

WHERE = {
    "instrument_w_nvtx": "deepspeed.common.ranges",
    "get_z3_leaf_modules": "deepspeed.zero.leaf_modules",
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
    "set_z3_leaf_module": "deepspeed.zero.leaf_modules",
    "set_z3_leaf_modules": "deepspeed.zero.leaf_modules",
    "unset_z3_leaf_modules": "deepspeed.zero.leaf_modules",
    "z3_leaf_module": "deepspeed.zero.leaf_modules",
    "RepeatingLoader": "deepspeed.data",
    "SynchronizedWallClockTimer": "deepspeed.common.timers",
    "ThroughputTimer": "deepspeed.common.timers",
}

__getattr__ = lazy_names(__name__, WHERE)

__all__ = ["groups", "logging", "timer", *WHERE]
