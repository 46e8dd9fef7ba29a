"""Run the tests of the table below and write docs/compatibility.md from what they show.

    python tests/ecosystem/compatibility.py

A verdict of the table stands on the page only if all of its test passed. The suite holds the table against the
outcomes too, whenever it has run the tests.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "compatibility.md"

HERE = "tests/ecosystem"
WORKS, REFUSED, THEIRS = "works", "refused by name", "not applicable: the library refuses it"
OPTIONAL = "works where it is installed; the tests do not install it"
FAILS, NOT_RUN = "**fails**", "not tried"

# library -> feature, verdict, the test that holds it (file::name)
TABLE: dict[str, list[tuple[str, str, str]]] = {
    "transformers": [
        (
            "Trainer, `auto` values, each mix of the file's and the Trainer's optimizer and schedule",
            WORKS,
            f"{HERE}/test_trainer.py::test_optimizer_and_schedule_of_the_config_or_the_trainer",
        ),
        (
            "Trainer in bf16 and fp16, stages 0 to 3",
            WORKS,
            f"{HERE}/test_trainer.py::test_16_bit_at_every_stage",
        ),
        (
            "Trainer with states and weights on the host and on disk",
            WORKS,
            f"{HERE}/test_trainer.py::test_offload",
        ),
        (
            "gradient accumulation, equal to the big batch",
            WORKS,
            f"{HERE}/test_trainer.py::test_accumulated_micro_batches_are_the_big_batch",
        ),
        (
            "gradient checkpointing at stage 3",
            WORKS,
            f"{HERE}/test_trainer.py::test_checkpointed_activations_at_stage_3",
        ),
        (
            "`load_best_model_at_end`, whole weights saved from stage 3",
            WORKS,
            f"{HERE}/test_trainer.py::test_the_best_model_is_loaded_and_saved_whole",
        ),
        ("resuming, bit by bit", WORKS, f"{HERE}/test_trainer.py::test_resuming_changes_no_bit"),
        (
            "evaluation without training at stage 3",
            WORKS,
            f"{HERE}/test_trainer.py::test_evaluation_without_training_at_stage_3",
        ),
        ("`predict_with_generate`", WORKS, f"{HERE}/test_trainer.py::test_prediction_with_generate"),
        (
            "`auto_find_batch_size`",
            WORKS,
            f"{HERE}/test_trainer.py::test_a_batch_size_is_found_after_failures",
        ),
        (
            "several Trainers one after the other",
            WORKS,
            f"{HERE}/test_trainer.py::test_one_model_in_several_trainers_one_after_the_other",
        ),
        (
            "`from_pretrained` under ZeRO-3: shards, tied weights",
            WORKS,
            f"{HERE}/test_hf_config.py::test_from_pretrained",
        ),
        (
            "missing weights",
            WORKS,
            f"{HERE}/test_hf_config.py::test_missing_weights_are_initialised_alike_on_all_ranks",
        ),
        ("`from_config` under ZeRO-3", WORKS, f"{HERE}/test_hf_config.py::test_from_config"),
        (
            "`from_config` of weight norms under ZeRO-3",
            WORKS,
            f"{HERE}/test_hf_config.py::test_weight_norms_of_a_model_from_a_configuration_are_initialised",
        ),
        (
            "models on meta, `init_empty_weights`",
            WORKS,
            f"{HERE}/test_hf_config.py::test_a_model_on_meta_stays_there_until_it_has_values",
        ),
        ("`resize_token_embeddings`", WORKS, f"{HERE}/test_hf_config.py::test_token_embeddings_are_resized"),
        (
            "mixtures of experts, weight norms",
            WORKS,
            f"{HERE}/test_hf_config.py::test_experts_and_weight_norms_train_as_they_do_plainly",
        ),
        (
            "`generate` with `synced_gpus` where ranks finish at different times",
            WORKS,
            f"{HERE}/test_hf_config.py::test_ranks_that_finish_generating_at_different_times",
        ),
        (
            "weights of `save_16bit_model` read by `from_pretrained`",
            WORKS,
            "tests/checkpoint/test_safetensors_weights.py::test_transformers_reads_saved_weights_in_a_fresh_process",
        ),
    ],
    "accelerate": [
        (
            "`accelerate launch --use_deepspeed`: every flag of one node",
            WORKS,
            f"{HERE}/test_accelerate_launch.py::test_every_flag_is_taken_and_shows_in_the_engine",
        ),
        (
            "a loop, stages 0 to 3, equal to Accelerate alone",
            WORKS,
            f"{HERE}/test_accelerate.py::test_a_script_ends_where_it_ends_without_deepspeed",
        ),
        (
            "DummyOptim and DummyScheduler",
            WORKS,
            f"{HERE}/test_accelerate.py::test_optimizer_and_schedule_of_a_file_stand_behind_dummies",
        ),
        (
            "a plugin from arguments and from the environment",
            WORKS,
            f"{HERE}/test_accelerate.py::test_a_plugin_is_made_of_arguments_and_of_the_environment",
        ),
        (
            "torch schedules on the original optimizer; the swap to DeepSpeedCPUAdam",
            WORKS,
            f"{HERE}/test_accelerate.py::test_an_offloaded_optimizer_follows_the_schedule_of_the_one_it_replaces",
        ),
        (
            "`save_state` and `load_state`, bit by bit",
            WORKS,
            f"{HERE}/test_accelerate.py::test_a_saved_state_is_resumed_bit_by_bit",
        ),
        (
            "schedule-free optimizers",
            WORKS,
            f"{HERE}/test_accelerate.py::test_a_schedule_free_optimizer_shows_its_two_kinds_of_weights",
        ),
        (
            "several ranks that it counts as one",
            REFUSED,
            f"{HERE}/test_accelerate.py::test_an_accelerator_that_counts_one_process_of_two_is_told_the_way_out",
        ),
        (
            "several models with plugins of their own",
            WORKS,
            f"{HERE}/test_accelerate_models.py::test_two_models_with_plugins_of_their_own_live_side_by_side",
        ),
        (
            "`free_memory`",
            WORKS,
            f"{HERE}/test_accelerate_models.py::test_free_memory_frees_the_engine_for_the_next_training",
        ),
        (
            "`get_state_dict`, a model without an optimizer",
            WORKS,
            f"{HERE}/test_accelerate_models.py::test_a_model_without_an_optimizer_is_evaluated_and_saved_whole",
        ),
        (
            "a dynamo plugin",
            WORKS,
            f"{HERE}/test_accelerate_models.py::test_a_dynamo_plugin_compiles_the_engine",
        ),
        (
            "sequence parallelism",
            REFUSED,
            f"{HERE}/test_accelerate_models.py::test_sequence_parallelism_is_refused_in_one_sentence",
        ),
    ],
    "peft": [
        (
            "adapters, equal to plain PyTorch, stages 0 to 3",
            WORKS,
            "tests/zero/test_peft.py::test_an_adapter_trains_like_plain_pytorch",
        ),
        (
            "`modules_to_save`",
            WORKS,
            "tests/zero/test_peft.py::test_lora_and_saved_modules_at_the_other_stages_and_on_one_rank",
        ),
        (
            "gradient checkpointing, reentrant and not",
            WORKS,
            "tests/zero/test_peft.py::test_an_adapter_with_gradient_checkpointing",
        ),
        (
            "switched, disabled and merged adapters",
            WORKS,
            "tests/zero/test_peft.py::test_adapters_are_switched_disabled_and_merged",
        ),
        (
            "adapters of models born sharded, saved and merged",
            WORKS,
            f"{HERE}/test_peft_saving.py::test_an_adapter_of_a_model_born_sharded_is_saved_and_merged_whole",
        ),
        (
            "AdaLora",
            WORKS,
            f"{HERE}/test_peft_saving.py::test_adalora_allocates_ranks_from_the_whole_gradients",
        ),
        (
            "a frozen base quantised with bitsandbytes",
            OPTIONAL,
            f"{HERE}/test_peft_saving.py::test_an_adapter_is_trained_on_a_quantised_frozen_base",
        ),
        (
            "an adapter added to a running engine is reported",
            WORKS,
            f"{HERE}/test_peft_saving.py::test_an_adapter_added_to_a_running_engine_is_reported",
        ),
    ],
    "trl": [
        (
            "SFT, DPO and GRPO, stages 2 and 3, equal to TRL alone",
            WORKS,
            f"{HERE}/test_trl.py::test_trains_as_without_deepspeed",
        ),
        (
            "KTO, reward and RLOO; adapters; a reference model that follows: stage 3, equal to TRL alone",
            WORKS,
            f"{HERE}/test_trl.py::test_trains_at_stage_3_as_without_deepspeed",
        ),
        (
            "generation with hooks taken off and put on again",
            WORKS,
            f"{HERE}/test_trl.py::test_generation_with_and_without_hooks_gives_the_same_training",
        ),
    ],
    "lightning": [
        (
            "Fabric, its check for CUDA put aside, equal to DDP",
            WORKS,
            f"{HERE}/test_lightning.py::test_fabric_trains_as_with_ddp",
        ),
        (
            "Trainer, its check for CUDA put aside, equal to DDP",
            WORKS,
            f"{HERE}/test_lightning.py::test_trainer_fits_tests_and_predicts_as_with_ddp",
        ),
        (
            "Trainer in bf16 and fp16, stages 2 and 3",
            WORKS,
            f"{HERE}/test_lightning.py::test_trainer_in_16_bit_stays_near_fp32",
        ),
        (
            "Trainer's checkpoints, resumed bit by bit",
            WORKS,
            f"{HERE}/test_lightning.py::test_trainer_resumes_bit_by_bit_and_its_checkpoint_becomes_one_file",
        ),
        (
            "the strategy's own configurations",
            WORKS,
            f"{HERE}/test_lightning.py::test_the_strategys_own_configurations_are_taken_without_a_word",
        ),
        ("the strategy without CUDA", THEIRS, f"{HERE}/test_lightning.py::test_cpu_is_refused_by_lightning"),
    ],
    "diffusers": [
        (
            "a UNet fine-tuned, averages of weights, equal to plain PyTorch",
            WORKS,
            f"{HERE}/test_diffusers.py::test_a_unet_is_fine_tuned_as_in_plain_pytorch",
        ),
    ],
    "datasets": [
        (
            "a streaming dataset as `training_data`",
            WORKS,
            f"{HERE}/test_streaming_data.py::test_an_engine_trains_on_a_stream_that_ranks_share",
        ),
    ],
    "evaluate": [
        (
            "a metric over the predictions of all ranks",
            WORKS,
            f"{HERE}/test_streaming_data.py::test_a_metric_sees_what_all_ranks_predict",
        ),
    ],
    "keras": [
        (
            "a model on the torch backend, equal to plain PyTorch",
            WORKS,
            f"{HERE}/test_keras.py::test_a_keras_model_trains_and_saves_as_in_plain_pytorch",
        ),
    ],
}


class Outcomes:
    """A pytest plugin: how each run of each test ended, "passed", "failed" or "skipped", by file::name."""

    def __init__(self) -> None:
        self.of: defaultdict[str, set[str]] = defaultdict(set)

    def pytest_runtest_logreport(self, report: object) -> None:
        """Note what a phase of a test showed; only failures and skips are known before its call."""
        if report.when == "call" or report.outcome != "passed":
            self.of[report.nodeid.partition("[")[0]].add(report.outcome)


def shown(verdict: str, outcomes: set[str]) -> str:
    """Return what may be said of a line, of which the table says `verdict`, after its test ended so."""
    if "failed" in outcomes:
        return FAILS
    if "passed" in outcomes:
        return verdict
    return OPTIONAL if verdict == OPTIONAL else NOT_RUN


def versions() -> dict[str, str]:
    """Return the releases that the tests ask for."""
    return dict(
        re.findall(r"^([\w-]+)==([\w.]+)$", (ROOT / "requirements-test.txt").read_text(), re.MULTILINE)
    )


def page(outcomes: Mapping[str, set[str]] | None = None) -> str:
    """Return the page after these outcomes; without any, that after a run in which everything passed."""
    lines = [
        "# Compatibility",
        "",
        "Each line is a test against the real library, in the release named.",
        "Made by `python tests/ecosystem/compatibility.py`, which runs them.",
    ]
    for library, rows in TABLE.items():
        lines += ["", f"## {library} {versions()[library]}", "", "| feature | |", "|---|---|"]
        for feature, verdict, held in rows:
            said = verdict if outcomes is None else shown(verdict, outcomes.get(held, set()))
            lines.append(f"| {feature} | {said} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the tests, write the page and return pytest's exit status."""
    import pytest

    other = [name for name in TABLE if metadata.version(name) != versions()[name]]
    if other:
        raise SystemExit(f"not the release of requirements-test.txt: {', '.join(other)}")
    outcomes = Outcomes()
    tests = sorted({held for rows in TABLE.values() for _, _, held in rows})
    status = pytest.main([*(f"{ROOT}/{held}" for held in tests), f"--rootdir={ROOT}"], plugins=[outcomes])
    PAGE.write_text(page(outcomes.of))
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
