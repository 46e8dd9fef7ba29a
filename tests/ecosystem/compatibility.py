"""Write docs/compatibility.md from the table of what the tests hold: ``python tests/ecosystem/compatibility.py``."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "compatibility.md"

HERE, EXAMPLES = "tests/ecosystem", "tests/examples/test_huggingface_examples.py"
WORKS, REFUSED = "works", "refused by name"

# library -> feature, verdict, the test that holds it (file::name), or for what does not apply: why
TABLE: dict[str, list[tuple[str, str, str]]] = {
    "transformers": [
        (
            "Trainer with a file of `auto` values, two ranks",
            WORKS,
            f"{EXAMPLES}::test_the_trainer_learns_and_saves_a_model_for_from_pretrained",
        ),
        (
            "whole weights of `save_16bit_model` read by `from_pretrained`",
            WORKS,
            "tests/checkpoint/test_safetensors_weights.py::test_transformers_reads_saved_weights_in_a_fresh_process",
        ),
        (
            "`generate` with `synced_gpus` where ranks finish at different times",
            WORKS,
            "tests/zero/test_user_patterns.py::test_ranks_generate_different_lengths",
        ),
    ],
    "accelerate": [
        (
            "`accelerate launch --use_deepspeed`, `save_state`, `load_state`",
            WORKS,
            f"{EXAMPLES}::test_a_loop_with_accelerate_stops_resumes_and_saves",
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
            "several ranks that it counts as one",
            REFUSED,
            f"{HERE}/test_accelerate.py::test_an_accelerator_that_counts_one_process_of_two_is_told_the_way_out",
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
        ("saved adapters", WORKS, "tests/zero/test_peft.py::test_a_saved_adapter_is_complete"),
        (
            "switched, disabled and merged adapters",
            WORKS,
            "tests/zero/test_peft.py::test_adapters_are_switched_disabled_and_merged",
        ),
        (
            "an adapter on a model that is born sharded",
            WORKS,
            "tests/zero/test_peft.py::test_an_adapter_on_a_model_born_sharded",
        ),
    ],
    "trl": [
        (
            "SFT, DPO and GRPO, stages 2 and 3, equal to TRL alone",
            WORKS,
            f"{HERE}/test_trl.py::test_trains_as_without_deepspeed",
        ),
    ],
}


def versions() -> dict[str, str]:
    """Return the releases that the tests install."""
    return dict(
        re.findall(r"^([\w-]+)==([\w.]+)$", (ROOT / "requirements-test.txt").read_text(), re.MULTILINE)
    )


def page() -> str:
    """Return the page."""
    lines = [
        "# Compatibility",
        "",
        "Each line is a test against the real library, in the release named.",
        "Made by `python tests/ecosystem/compatibility.py`.",
    ]
    for library, rows in TABLE.items():
        lines += [
            "",
            f"## {library} {versions().get(library, '')}".rstrip(),
            "",
            "| feature | |",
            "|---|---|",
        ]
        lines += [f"| {feature} | {verdict} |" for feature, verdict, _ in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
