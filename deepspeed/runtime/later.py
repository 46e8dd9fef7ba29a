"""Old import paths whose feature does not exist yet, so that using one says which feature is missing."""

from __future__ import annotations

PIPELINE = "pipeline parallelism"
SEQUENCE = "sequence parallelism"

# old module -> (the feature it belongs to, names that scripts import from it)
LATER: dict[str, tuple[str, tuple[str, ...]]] = {
    "data_pipeline": ("data efficiency", ()),
    "data_pipeline.curriculum_scheduler": ("the curriculum", ("CurriculumScheduler",)),
    "data_pipeline.data_routing": ("random token dropping", ()),
    "data_pipeline.data_routing.helper": (
        "random token dropping",
        ("convert_to_random_ltd", "save_without_random_ltd"),
    ),
    "data_pipeline.data_sampling": ("curriculum sampling", ()),
    "data_pipeline.data_sampling.data_analyzer": ("curriculum sampling", ("DataAnalyzer",)),
    "data_pipeline.data_sampling.indexed_dataset": ("curriculum sampling", ("MMapIndexedDataset",)),
    "hybrid_engine": ("the hybrid engine", ("DeepSpeedHybridEngine",)),
    "pipe": (PIPELINE, ("LayerSpec", "PipelineEngine", "PipelineModule", "TiedLayerSpec")),
    "pipe.engine": (PIPELINE, ("PipelineEngine",)),
    "pipe.module": (PIPELINE, ("LayerSpec", "PipelineModule", "TiedLayerSpec")),
    "pipe.schedule": (PIPELINE, ("ForwardPass", "InferenceSchedule", "PipeSchedule", "TrainSchedule")),
    "sequence_parallel": (SEQUENCE, ()),
    "sequence_parallel.ulysses_sp": (
        SEQUENCE,
        ("TiledMLP", "UlyssesSPAttentionHF", "UlyssesSPDataLoaderAdapter"),
    ),
}
