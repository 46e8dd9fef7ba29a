"""Sharding: what ZeRO does, on flat units.

Read stage, layout, unit, grouping, partition, gradients, reducer, optimizer; then, for stage 3, released,
gatherer, gathered and init. Names are imported when they are first used.
"""

from deepspeed.common.lazy import lazy_names

WHERE = {
    "GatheredParameters": "deepspeed.zero.gathered",
    "Init": "deepspeed.zero.init",
    "MiCS_Init": "deepspeed.zero.init:Init",
    "OnDevice": "deepspeed.zero.on_device",
    "TiledLinear": "deepspeed.zero.tiling",
    "TiledLinearReturnBias": "deepspeed.zero.tiling",
    "ZeroParamStatus": "deepspeed.zero.released",
    "register_external_parameter": "deepspeed.zero.external",
    "unregister_external_parameter": "deepspeed.zero.external",
    "unwrap_model_for_generation": "deepspeed.zero.generation",
    **dict.fromkeys(
        (
            "estimate_zero2_model_states_mem_needs",
            "estimate_zero2_model_states_mem_needs_all_cold",
            "estimate_zero2_model_states_mem_needs_all_live",
            "estimate_zero3_model_states_mem_needs",
            "estimate_zero3_model_states_mem_needs_all_cold",
            "estimate_zero3_model_states_mem_needs_all_live",
        ),
        "deepspeed.zero.estimates",
    ),
}

__getattr__ = lazy_names(__name__, WHERE)

__all__ = sorted(WHERE)
