"""The process groups by the names scripts ask for: every rank is data parallel, other axes have size 1."""

from deepspeed.parallel import groups

_get_data_parallel_group = groups.all_ranks_group
_get_data_parallel_world_size = groups.all_ranks_size
_get_data_parallel_rank = groups.all_ranks_rank
_get_sequence_data_parallel_group = groups.all_ranks_group
_get_sequence_data_parallel_world_size = groups.all_ranks_size
_get_sequence_data_parallel_rank = groups.all_ranks_rank
_get_sequence_parallel_group = groups.alone_group
_get_sequence_parallel_world_size = groups.alone_size
_get_sequence_parallel_rank = groups.alone_rank
_get_model_parallel_group = groups.alone_group
_get_model_parallel_world_size = groups.alone_size
_get_model_parallel_rank = groups.alone_rank
_get_tensor_model_parallel_group = groups.alone_group
_get_tensor_model_parallel_world_size = groups.alone_size
_get_tensor_model_parallel_rank = groups.alone_rank
