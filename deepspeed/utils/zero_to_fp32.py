"""Weights out of saved training state, by the names scripts import; there is no saved state yet."""

from deepspeed.common.lazy import lazy_names

LATER = dict.fromkeys(
    (
        "convert_zero_checkpoint_to_fp32_state_dict",
        "get_fp32_state_dict_from_zero_checkpoint",
        "get_model_state_file",
        "get_optim_files",
        "load_state_dict_from_zero_checkpoint",
    ),
    "saving and resuming of training state",
)

__getattr__ = lazy_names(__name__, {}, LATER)
