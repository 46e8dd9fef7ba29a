"""``checkpoint`` and ``nebula``: how training state is written and read."""

from typing import Annotated, ClassVar, Literal

from deepspeed.config.base import LOWER, UPPER, Count, FilePath, Section, Size, key, part


class ParallelWriteSection(Section):
    """Who writes."""

    pipeline_stage: bool = key(False, "ranks of a pipe stage share the writing of its layers")


class CheckpointWriterSection(Section):
    """A faster file writer."""

    type: Annotated[Literal["MOCK", "PYTHON", "FAST"], UPPER] = key("FAST", "which writer")
    io_buffer_size: Size = key(67_108_864, "bytes of pinned staging memory")
    io_buffer_double: bool = key(True, "two of them")
    show_statistics: bool = key(False, "print the speed")
    data_parallel: Annotated[Literal["REPLICA", "SOCKET", "MACHINE"], UPPER] | None = key(
        None, "which data-parallel ranks share the writing"
    )
    decoupled: bool = key(False, "write from another process while training goes on")
    io_multiplier: Count = key(1, "parallel writes per rank")


class CheckpointSection(Section):
    """save_checkpoint and load_checkpoint."""

    tag_validation: Annotated[Literal["ignore", "warn", "fail"], LOWER] = key(
        "warn", "what to do when ranks use different tags"
    )
    load_universal: bool = key(False, "no effect; every checkpoint loads at any world size and stage")
    load_missing: Annotated[Literal["warn", "error"], LOWER] = key(
        "warn", "what load_checkpoint does where there is no checkpoint"
    )
    load_fallback: bool = key(False, "load the newest whole checkpoint where the one asked for is damaged")
    keep_last: Size = key(0, "checkpoints with tags global_stepN that stay, the newest; 0: all")
    save_safetensors: bool = key(False, "save_checkpoint writes the whole weights as safetensors, too")
    use_node_local_storage: bool = key(False, "every node writes model states to its own disk")
    parallel_write: ParallelWriteSection = part(ParallelWriteSection, "who writes")
    checkpoint_serialization: bool = key(True, "false: torch's old file format")
    writer: CheckpointWriterSection | None = key(None, "a faster file writer")


class NebulaSection(Section):
    """Asynchronous checkpoints on Azure."""

    enabled: bool = key(False, "use them")
    persistent_storage_path: FilePath | None = key(None, "folder")
    persistent_time_interval: Count = key(100, "seconds between writes")
    num_of_version_in_retention: Count = key(2, "checkpoints kept")
    enable_nebula_load: bool = key(True, "load through it too")
    nebula_load_path: FilePath | None = key(None, "folder to load from")

    aliases: ClassVar = {"load_path": "nebula_load_path"}
