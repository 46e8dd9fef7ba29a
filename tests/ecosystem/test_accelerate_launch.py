"""`accelerate launch --use_deepspeed` on one machine: every flag is taken, and shows in the engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from accelerate.commands.launch import launch_command_parser

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, os, sys
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, inputs):
        return inputs + self.inner(inputs)

set_seed(0)
accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
model = nn.Sequential(Block(), nn.Linear(4, 1))
data = torch.utils.data.DataLoader(torch.randn(16, 4), batch_size=2)
plugin = accelerator.state.deepspeed_plugin
if "optimizer" in plugin.deepspeed_config:
    from accelerate.utils import DummyOptim
    optimizer = DummyOptim(model.parameters(), lr=0.125)
else:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.125)
model, optimizer, data = accelerator.prepare(model, optimizer, data)
for batch in data:
    with accelerator.accumulate(model):
        accelerator.backward(model(batch).float().square().mean())
        optimizer.step()
        optimizer.zero_grad()
zero = model.settings.zero_optimization
report = {
    "arguments": sys.argv[2:],
    "rank": [accelerator.process_index, accelerator.num_processes],
    "stage": model.zero_optimization_stage(),
    "steps": [model.global_steps, model.gradient_accumulation_steps()],
    "clipping": model.gradient_clipping(),
    "dtype": str(model.module[1].weight.dtype),
    "optimizer": type(model.optimizer.optimizer).__name__,
    "lr": model.get_lr(),
    "param device": None if zero.offload_param is None else zero.offload_param.device,
    "saves 16-bit": model.zero_gather_16bit_weights_on_model_save(),
    "born sharded": plugin.zero3_init_flag,
    "leaf": model.module[0]._z3_leaf if hasattr(model.module[0], "_z3_leaf") else None,
    "debug": os.environ.get("ACCELERATE_DEBUG_MODE"),
    "finite": bool(torch.isfinite(torch.tensor(float(accelerator.clip_grad_norm_(model.parameters(), 1.0))))),
}
with open(f"{sys.argv[1]}/{accelerator.process_index}.json", "w") as file:
    json.dump(report, file)
accelerator.end_training()
"""


def launch(folder, *flags, arguments=(), environment=None):
    """Launch the script and return what each rank reports."""
    script = folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    out = folder / "out"
    out.mkdir()
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
    target = ["script"] if "--module" in flags else [str(script)]
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "accelerate.commands.launch",
                "--use_deepspeed",
                "--main_process_port",
                "0",
            ),
            *(*flags, *target, str(out), *arguments),
        ],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(environment or {})},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(path.read_text()) for path in sorted(out.iterdir())]


FLAGS = """
    --num_processes 2 --num_machines 1 --mixed_precision bf16 --dynamo_backend no
    --zero_stage 3 --gradient_accumulation_steps 2 --gradient_clipping 0.75
    --offload_optimizer_device cpu --offload_param_device cpu
    --offload_optimizer_nvme_path /unused --offload_param_nvme_path /unused
    --zero3_init_flag false --zero3_save_16bit_model true
    --deepspeed_moe_layer_cls_names Block
    --deepspeed_hostfile /unused --deepspeed_inclusion_filter unused --deepspeed_exclusion_filter unused
    --deepspeed_multinode_launcher standard --num_cpu_threads_per_process 1 --enable_cpu_affinity
    --debug
"""


def test_no_flag_of_deepspeed_is_left_out():
    (group,) = (one for one in launch_command_parser()._action_groups if one.title == "DeepSpeed Arguments")
    known = {action.option_strings[0] for action in group._group_actions}
    assert known - {*FLAGS.split()} == {"--deepspeed_config_file"}  # it stands for the others


def test_every_flag_is_taken_and_shows_in_the_engine(tmp_path):
    reports = launch(tmp_path, *FLAGS.split(), arguments=("--my", "flag"))
    assert [report.pop("rank") for report in reports] == [[0, 2], [1, 2]]
    assert reports[0] == reports[1]
    assert reports[0] == {
        "arguments": ["--my", "flag"],
        "stage": 3,
        "steps": [2, 2],
        "clipping": 0.75,
        "dtype": "torch.bfloat16",
        "optimizer": "DeepSpeedCPUAdam",
        "lr": [0.125],
        "param device": "cpu",
        "saves 16-bit": True,
        "born sharded": False,
        "leaf": True,
        "debug": "true",
        "finite": True,
    }


CONFIG = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 0.5,
    "optimizer": {"type": "Adam", "params": {"lr": "auto"}},
    "zero_optimization": {"stage": 1},
}


def test_a_file_and_a_module_are_launched(tmp_path):
    config, yaml = tmp_path / "ds.json", tmp_path / "accelerate.yaml"
    config.write_text(json.dumps(CONFIG))
    yaml.write_text(
        f"""
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config:
  deepspeed_config_file: {config}
num_machines: 1
num_processes: 1
machine_rank: 0
main_training_function: main
use_cpu: false
"""
    )
    (report,) = launch(tmp_path, "--config_file", str(yaml), "--module")
    assert report["rank"] == [0, 1]
    assert (report["stage"], report["steps"], report["clipping"]) == (1, [2, 4], 0.5)
    assert (report["optimizer"], report["lr"]) == ("FusedAdam", [0.125])
    assert report["dtype"] == "torch.float32"
