"""Fine-tuning a diffusers UNet equals plain PyTorch, its EMAModel included; so does the example what it says."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from harness import run_on_ranks
from torch.nn.functional import mse_loss
from twins import Twins, seeded

from deepspeed.zero import GatheredParameters

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from gpt_example import EXAMPLES, run


def unet():
    import diffusers

    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
    )


def loss_of(model, rank):
    import diffusers

    noises = diffusers.DDPMScheduler(num_train_timesteps=50)
    generator = torch.Generator().manual_seed(rank)
    pictures, noise = torch.randn(2, 2, 1, 8, 8, generator=generator)
    steps = torch.randint(0, 50, (2,), generator=generator)
    return mse_loss(model(noises.add_noise(pictures, noise, steps), steps).sample, noise)


def fine_tunes(stage, checkpointing):
    from diffusers.training_utils import EMAModel

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(diffusers|torch)\.")
        model = seeded(1, unet)
        if checkpointing:
            model.enable_gradient_checkpointing()
        twins = Twins(model, stage=stage, lr=0.02)
        averages = []
        for one in (twins.engine.module, twins.plain):
            with GatheredParameters(one.parameters()):
                averages.append(EMAModel([param.detach().clone() for param in one.parameters()], decay=0.5))
        for _ in range(3):
            twins.step(loss_of)
            for average, one in zip(averages, (twins.engine.module, twins.plain), strict=True):
                with GatheredParameters(one.parameters()):
                    average.step(one.parameters())
        for ours, plain in zip(averages[0].shadow_params, averages[1].shadow_params, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
        twins.finish(1e-4)


@pytest.mark.parametrize(("stage", "checkpointing"), [(2, False), (3, False), (3, True)])
def test_a_unet_is_fine_tuned_as_in_plain_pytorch(stage, checkpointing):
    run_on_ranks(2, fine_tunes, stage, checkpointing)


def test_the_example_learns_and_saves_a_unet_that_diffusers_reads(tmp_path):
    import diffusers

    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2"]
    options = ["--stage", "3", "--steps", "10"]
    output = run([*launcher, str(EXAMPLES / "unet_diffusers.py"), *options], folder=tmp_path)
    curve = [float(loss) for loss in re.findall(r"^step \d+/10  loss ([\d.]+)", output, re.MULTILINE)]
    assert curve[-1] < curve[0] / 2
    read = diffusers.UNet2DModel.from_pretrained(tmp_path / "runs" / "unet")
    assert read(torch.zeros(1, 1, 16, 16), 3).sample.shape == (1, 1, 16, 16)
