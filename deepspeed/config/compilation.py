"""``compile``: graph passes over a compiled model, and ``aio``: requests to a drive."""

from typing import Annotated, Literal

from deepspeed.config.base import LOWER, Count, Section, Size, key

Pass = Annotated[Literal["z1", "z3", "autosp", "autotp"], LOWER]


class CompileSection(Section):
    """Graph passes; only `deepcompile` (or naming a pass) turns them on, engine.compile works without."""

    deepcompile: bool = key(False, "use graph passes in engine.compile")
    free_activation: bool = key(False, "free large activations early")
    free_activation_threshold: Size = key(10_485_760, "bytes from which an activation is large")
    offload_activation: bool = key(False, "keep saved activations in host memory")
    offload_activation_pin_memory: bool = key(True, "page-locked host memory for them")
    offload_opt_states: bool = key(False, "keep optimizer states in host memory during forward and backward")
    offload_parameters: bool = key(False, "keep parameters in host memory (stage 3)")
    double_buffer: bool = key(True, "two reduction buckets")
    symmetric_memory: bool = key(False, "collectives over torch's symmetric memory")
    debug_log: bool = key(False, "write graphs to files")
    sync_before_reduce: bool = key(False, "wait for the device before a reduction")
    sync_after_reduce: bool = key(False, "wait for the device after a reduction")
    sync_before_allgather: bool = key(False, "wait for the device before a gather")
    sync_after_allgather: bool = key(False, "wait for the device after a gather")
    keep_int_input_tensors: bool = key(True, "keep integer inputs for profiling again")
    keep_all_input_tensors: bool = key(False, "keep all inputs for profiling again")
    passes: list[Pass] | None = key(None, "passes to run, in order; null: those of the stage")


class AioSection(Section):
    """Requests to an NVMe drive; without effect unless something is offloaded to one."""

    block_size: Count = key(1_048_576, "bytes per request, rounded up to a multiple of 4096")
    queue_depth: Count = key(8, "requests in flight per thread; at most 64 in all")
    intra_op_parallelism: Count = key(1, "multiplies queue_depth")
    single_submit: bool = key(False, "no effect; every request is a system call of its own")
    thread_count: Count = key(1, "no effect; intra_op_parallelism sets the threads")
    overlap_events: bool = key(True, "no effect; a new request never waits for others to complete")
    use_gds: bool = key(False, "GPUDirect Storage")
