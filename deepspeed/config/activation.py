"""``activation_checkpointing``: how saved inputs of recomputed layers are kept."""

from deepspeed.config.base import Count, Section, key


class ActivationCheckpointingSection(Section):
    """How deepspeed.checkpointing.checkpoint keeps inputs until backward; each key works alone."""

    partition_activations: bool = key(False, "split saved inputs over model-parallel ranks")
    cpu_checkpointing: bool = key(False, "keep saved inputs in host memory")
    contiguous_memory_optimization: bool = key(False, "one preallocated buffer for saved inputs of a size")
    number_checkpoints: Count | None = key(None, "checkpoints in that buffer, at once; required by it")
    synchronize_checkpoint_boundary: bool = key(False, "wait for the device at each checkpoint")
    profile: bool = key(False, "log the time of checkpoints: forward, recomputation")
