"""``activation_checkpointing``: how saved inputs of recomputed layers are kept."""

from deepspeed.config.base import Count, Section, key


class ActivationCheckpointingSection(Section):
    """Used by deepspeed.checkpointing, once it is configured from this file."""

    partition_activations: bool = key(False, "split saved inputs over model-parallel ranks")
    cpu_checkpointing: bool = key(False, "keep saved inputs in host memory; needs partition_activations")
    contiguous_memory_optimization: bool = key(False, "one preallocated buffer for saved inputs")
    number_checkpoints: Count | None = key(None, "checkpoints in that buffer; required by it")
    synchronize_checkpoint_boundary: bool = key(False, "wait for the device at each checkpoint")
    profile: bool = key(False, "time each checkpoint's forward and backward")
