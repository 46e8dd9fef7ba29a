"""Let a model that `pretrain_gpt.py` trained write text.

python examples/sample_gpt.py runs/gpt --prompt "class "
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from gpt.errors import UserError
from gpt.model import GPT
from gpt.sample import generate
from gpt.weights import WEIGHTS, load_weights, read_shape


def main() -> None:
    """Load the weights and print what they write."""
    parser = argparse.ArgumentParser(description="Sample from a trained GPT.")
    parser.add_argument("folder", help="the --output of pretrain_gpt.py")
    parser.add_argument("--prompt", default="def ", help="what the text starts with (default: %(default)r)")
    parser.add_argument("--bytes", type=int, default=400, help="length (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="below 1: likelier (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="another number, another text")
    args = parser.parse_args()
    if args.temperature <= 0:
        parser.error(f"--temperature: expected a number above 0, got {args.temperature}")
    weights = Path(args.folder) / WEIGHTS
    try:
        model = GPT(read_shape(weights))
        load_weights(model, weights)
    except UserError as error:
        sys.exit(f"sample_gpt: {error}")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = device or torch.device("cpu")
    print(
        generate(
            model.to(device).eval(),
            args.prompt,
            count=args.bytes,
            seq=model.shape.seq,
            temperature=args.temperature,
            seed=args.seed,
            device=device,
        )
    )


if __name__ == "__main__":
    main()
