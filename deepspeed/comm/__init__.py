"""``torch.distributed`` with timing and logging, under the same names: ``deepspeed.comm``.

Every function takes torch's arguments and returns torch's Work when ``async_op=True``. Gathering, reducing
and scattering between CPU ranks is faster here: see note [direct exchange on gloo]. `register_shm`
makes that known to torch as the backend ``shm``, see note [A backend of torch's].
"""

from torch.distributed import (
    P2POp,
    ProcessGroup,
    ReduceOp,
    Work,
    all_gather_object,
    batch_isend_irecv,
    broadcast_object_list,
    destroy_process_group,
    gather_object,
    get_backend,
    get_global_rank,
    get_group_rank,
    get_rank,
    get_world_size,
    is_available,
    is_initialized,
    monitored_barrier,
    new_group,
    scatter_object_list,
)

from deepspeed.comm.backend import register as register_shm
from deepspeed.comm.collectives import (
    all_gather,
    all_gather_single,
    all_reduce,
    reduce_scatter,
    reduce_scatter_single,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from deepspeed.comm.init import default_timeout, init_distributed, mpi_discovery
from deepspeed.comm.log import comms_logger, configure, log_summary
from deepspeed.comm.ops import (
    TorchBackend,
    all_to_all,
    all_to_all_single,
    barrier,
    broadcast,
    gather,
    get_all_ranks_from_group,
    get_local_rank,
    get_world_group,
    initialize_mesh_device,
    irecv,
    isend,
    recv,
    reduce,
    scatter,
    send,
)
from deepspeed.comm.parts import laid_out

# The names that torch and the original gave to the same operations.
all_gather_into_tensor = all_gather_single
reduce_scatter_tensor = reduce_scatter_single
allgather_fn = all_gather_single
reduce_scatter_fn = reduce_scatter_single


__all__ = [
    "P2POp",
    "ProcessGroup",
    "ReduceOp",
    "TorchBackend",
    "Work",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_gather_single",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "allgather_fn",
    "barrier",
    "batch_isend_irecv",
    "broadcast",
    "broadcast_object_list",
    "comms_logger",
    "configure",
    "default_timeout",
    "destroy_process_group",
    "gather",
    "gather_object",
    "get_all_ranks_from_group",
    "get_backend",
    "get_global_rank",
    "get_group_rank",
    "get_local_rank",
    "get_rank",
    "get_world_group",
    "get_world_size",
    "init_distributed",
    "initialize_mesh_device",
    "irecv",
    "is_available",
    "is_initialized",
    "isend",
    "laid_out",
    "log_summary",
    "monitored_barrier",
    "mpi_discovery",
    "new_group",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_fn",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
    "register_shm",
    "scatter",
    "scatter_object_list",
    "send",
    "start_all_gather",
    "start_all_reduce",
    "start_reduce_scatter",
]
