"""Train a byte-level GPT on text, from nothing.

    deepspeed --num_gpus 2 examples/pretrain_gpt.py --deepspeed --deepspeed_config examples/ds_config.json

Read `prepare` and `train`; the parts are in the folder gpt/. Without a launcher the script is one rank.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gpt.data import Windows, load_corpus, validation_windows
from gpt.model import GPT
from gpt.ngram import ByteCounts, bits_per_byte
from gpt.options import deepspeed_config, model_shape, parse
from gpt.pace import Pace
from gpt.progress import progress_for
from gpt.ranks import together
from gpt.report import Result, describe, draw, next_steps, scores
from gpt.sample import generate
from gpt.validation import validate
from gpt.weights import WEIGHTS, load_weights, make_folder, write_shape
from torch import Tensor

import deepspeed
from deepspeed import comm
from deepspeed.utils import RepeatingLoader

STATUSES = 80  # times a run measures itself
VALIDATIONS = 5  # times it scores the validation text


@dataclass
class Run:
    """What `prepare` makes and the rest uses."""

    args: argparse.Namespace
    engine: deepspeed.DeepSpeedEngine
    batches: Iterator[tuple[Tensor, Tensor]]
    validation: np.ndarray  # (windows, seq + 1) bytes
    result: Result


def main() -> None:
    """Prepare, train, and write down what came out."""
    start = time.monotonic()
    deepspeed.init_distributed(verbose=False)
    run = together(prepare)
    train(run, start)
    finish(run, start)
    comm.destroy_process_group()


def prepare() -> Run:
    """Read options and text, build the model and wrap it. Raises UserError for what cannot be used."""
    args = parse()
    shape = model_shape(args)
    corpus = load_corpus(args.data, shape.seq)
    make_folder(Path(args.output))
    torch.manual_seed(args.seed)
    model = GPT(shape)
    if args.init_from is not None:
        load_weights(model, Path(args.init_from))
    engine, _, loader, _ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        training_data=Windows(corpus.train, shape.seq, args.seed),
        config=deepspeed_config(args),
    )
    validation = validation_windows(corpus.validation, shape.seq)
    order0, order1 = bits_per_byte(ByteCounts.of(corpus.train), validation)
    if comm.get_rank() == 0:
        print(describe(corpus, validation, engine), flush=True)
    return Run(args, engine, iter(RepeatingLoader(loader)), validation, Result(order0=order0, order1=order1))


def train(run: Run, start: float) -> None:
    """Run the steps: forward, backward, step, and now and then a look at how it goes."""
    engine, steps, result = run.engine, run.args.steps, run.result
    pace = Pace(engine, steps, start + 60 * (run.args.minutes or math.inf))
    with progress_for(comm.get_rank()) as progress:
        for step in range(1, steps + 1):
            for _ in range(engine.gradient_accumulation_steps()):
                tokens, targets = next(run.batches)
                loss = engine(tokens, targets)
                engine.backward(loss)
                engine.step()
                pace.saw(loss, tokens.numel())
            last = False
            if step == 1 or due(step, steps, STATUSES):
                status = pace.status(step)
                result.train.append((step, status.bits))
                progress.show(status)
                last = status.last
            if last or due(step, steps, VALIDATIONS):
                result.validation.append((step, validate(engine, run.validation)))
                pace.restart()
            if last:
                break


def due(step: int, steps: int, times: int) -> bool:
    """Whether `step` is one of some `times` spread over a run; the last step always is."""
    return step % math.ceil(steps / times) == 0 or step == steps


def finish(run: Run, start: float) -> None:
    """Save the weights, say how good they are, show what they write. Every rank takes part."""
    args, engine, result = run.args, run.engine, run.result
    folder = Path(args.output)
    engine.save_16bit_model(folder, WEIGHTS)
    text = generate(
        engine.eval(),
        args.prompt,
        count=args.sample_bytes,
        seq=engine.shape.seq,
        temperature=args.temperature,
        seed=args.seed,
        device=engine.device,
    )
    if comm.get_rank() != 0:
        return
    write_shape(folder, engine.shape)
    result.seconds = time.monotonic() - start
    result.write(folder)
    picture = draw(result, folder / "loss.png")
    print(f"\n{scores(result)}\n\nA sample:\n\n{text}\n")
    print(next_steps(args, comm.get_world_size(), result))
    if not picture:
        print("No picture was drawn: matplotlib is not installed.")


if __name__ == "__main__":
    main()
