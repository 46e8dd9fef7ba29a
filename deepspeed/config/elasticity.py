"""``elasticity``: batch sizes that suit many numbers of ranks."""

from typing import ClassVar

from deepspeed.config.base import Amount, Count, Section, Size, key


class ElasticitySection(Section):
    """A batch size chosen so that the job can be restarted on more or fewer ranks."""

    enabled: bool = key(False, "use it")
    max_train_batch_size: Count = key(2000, "upper bound of the batch; required")
    micro_batch_sizes: list[Count] = key([2, 4, 6], "candidates; required")
    min_gpus: Count = key(1, "fewest ranks")
    max_gpus: Count = key(10000, "most ranks")
    num_gpus_per_node: Count = key(1, "ranks per node")
    model_parallel_size: Count = key(1, "model-parallel ranks")
    min_time: Size = key(0, "hint for a scheduler, minutes")
    prefer_larger_batch: bool = key(True, "the largest batch of equal choices")
    ignore_non_elastic_batch_info: bool = key(False, "other batch keys are ignored instead of refused")
    version: Amount = key(0.2, "algorithm; at most 0.2")

    aliases: ClassVar = {"prefer_large_batch": "prefer_larger_batch"}
