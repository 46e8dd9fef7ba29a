"""The process groups by the names scripts ask for; see `deepspeed.parallel.groups`."""

from deepspeed.parallel.groups import alone_group, alone_rank, alone_size, axes

_get_data_parallel_group = axes.data_parallel_group
_get_data_parallel_world_size = axes.data_parallel_world_size
_get_data_parallel_rank = axes.data_parallel_rank
_get_sequence_data_parallel_group = axes.data_parallel_group
_get_sequence_data_parallel_world_size = axes.data_parallel_world_size
_get_sequence_data_parallel_rank = axes.data_parallel_rank
_get_sequence_parallel_group = alone_group
_get_sequence_parallel_world_size = alone_size
_get_sequence_parallel_rank = alone_rank
_get_model_parallel_group = axes.model_parallel_group
_get_model_parallel_world_size = axes.model_parallel_world_size
_get_model_parallel_rank = axes.model_parallel_rank
_get_tensor_model_parallel_group = axes.model_parallel_group
_get_tensor_model_parallel_world_size = axes.model_parallel_world_size
_get_tensor_model_parallel_rank = axes.model_parallel_rank
