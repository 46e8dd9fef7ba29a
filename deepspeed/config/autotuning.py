"""``autotuning``: a search for the fastest settings."""

from typing import Annotated, Literal

from deepspeed.config.base import LOWER, Count, FilePath, Section, Size, key, part


class ModelInfoSection(Section):
    """Facts about the model."""

    profile: bool = key(False, "measure them")
    num_params: Size | None = key(None, "parameters")
    hidden_size: Size | None = key(None, "width")
    num_layers: Size | None = key(None, "layers")


class AutotuningSection(Section):
    """Set by the launcher's --autotuning."""

    enabled: bool = key(False, "use it")
    fast: bool = key(True, "tune only the ZeRO stage and the micro-batch")
    results_dir: FilePath = key("autotuning_results", "folder of results")
    exps_dir: FilePath = key("autotuning_exps", "folder of experiments")
    overwrite: bool = key(True, "run finished experiments again")
    start_profile_step: Size = key(3, "first measured step")
    end_profile_step: Size = key(5, "last measured step")
    metric: Annotated[Literal["throughput", "latency", "flops"], LOWER] = key(
        "throughput", "what is compared"
    )
    metric_path: FilePath | None = key(None, "where a run writes it")
    tuner_type: Annotated[Literal["gridsearch", "random", "model_based"], LOWER] = key("gridsearch", "search")
    tuner_early_stopping: Size = key(5, "trials without improvement before stopping")
    tuner_num_trials: Size = key(50, "most trials")
    arg_mappings: dict[str, str] | None = key(None, "configuration key -> argument of the script")
    model_info: ModelInfoSection = part(ModelInfoSection, "facts about the model")
    model_info_path: FilePath | None = key(None, "where they are written")
    mp_size: Count = key(1, "model-parallel ranks")
    max_train_batch_size: Count | None = key(None, "largest batch")
    min_train_batch_size: Count = key(1, "smallest batch")
    max_train_micro_batch_size_per_gpu: Count = key(1024, "largest micro-batch")
    min_train_micro_batch_size_per_gpu: Count = key(1, "smallest micro-batch")
    num_tuning_micro_batch_sizes: Count = key(3, "micro-batches tried")
