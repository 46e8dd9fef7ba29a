"""Fine-tune a diffusers UNet with ZeRO: one denoising step after another, made from a configuration.

    python examples/unet_diffusers.py                                one rank
    deepspeed --num_gpus 2 examples/unet_diffusers.py --stage 3      two ranks, weights sharded

The pictures are bright squares on a dark ground; the network learns to tell the noise that was added to them. A
moving average of the weights is kept by diffusers' own EMAModel and saved. Needs ``pip install diffusers``.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

import deepspeed
from deepspeed import comm
from deepspeed.utils import RepeatingLoader
from deepspeed.zero import GatheredParameters

try:
    import diffusers
    from diffusers.training_utils import EMAModel
except ImportError:
    sys.exit("unet_diffusers: diffusers is not installed; pip install diffusers")

SIZE = 16
NOISE = diffusers.DDPMScheduler(num_train_timesteps=100)


def main() -> None:
    """Build, fine-tune, save the average."""
    args = parse()
    torch.manual_seed(0)
    engine, _, loader, _ = deepspeed.initialize(
        model=network(),
        training_data=squares(256),
        config={
            "train_micro_batch_size_per_gpu": 16,
            "gradient_clipping": 1.0,
            "optimizer": {"type": "AdamW", "params": {"lr": 2e-3}},
            "zero_optimization": {"stage": args.stage, "stage3_param_persistence_threshold": 1000},
        },
    )
    with GatheredParameters(engine.module.parameters()):
        average = EMAModel([one.detach().clone() for one in engine.module.parameters()], decay=0.9)
    batches = iter(RepeatingLoader(loader))
    for step in range(1, args.steps + 1):
        loss = denoising_loss(engine, next(batches))
        engine.backward(loss)
        engine.step()
        with GatheredParameters(engine.module.parameters()):
            average.step(engine.module.parameters())
        if comm.get_rank() == 0 and (step == 1 or step % 5 == 0):
            print(f"step {step}/{args.steps}  loss {loss.item():.3f}")
    with GatheredParameters(engine.module.parameters(), modifier_rank=0):
        if comm.get_rank() == 0:
            average.copy_to(engine.module.parameters())
            engine.module.save_pretrained(args.output)
            print(f"Saved the averaged weights in {args.output}/.")
    engine.destroy()
    comm.destroy_process_group()


def network() -> diffusers.UNet2DModel:
    """Return a UNet of two levels."""
    return diffusers.UNet2DModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
    )


def squares(count: int) -> Tensor:
    """Return pictures (count, 1, SIZE, SIZE) of values -1 and 1, a square at some place in each."""
    pictures = torch.full((count, 1, SIZE, SIZE), -1.0)
    for picture, (row, column) in zip(pictures, torch.randint(0, SIZE - 6, (count, 2)).tolist(), strict=True):
        picture[:, row : row + 6, column : column + 6] = 1.0
    return pictures


def denoising_loss(unet: torch.nn.Module, pictures: Tensor) -> Tensor:
    """Add noise of a random step to pictures and return how badly `unet` tells it."""
    noise = torch.randn_like(pictures)
    steps = torch.randint(0, NOISE.config.num_train_timesteps, (len(pictures),), device=pictures.device)
    return mse_loss(unet(NOISE.add_noise(pictures, noise, steps), steps).sample, noise)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Fine-tune a diffusers UNet with ZeRO.")
    add = parser.add_argument
    add("--stage", type=int, default=2, choices=range(4), help="of ZeRO (%(default)s)")
    add("--steps", type=int, default=40, help="optimizer steps (%(default)s)")
    add("--output", default="runs/unet", metavar="FOLDER", help="where the weights go (%(default)s)")
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # some launchers pass it
    return parser.parse_args()


if __name__ == "__main__":
    main()
