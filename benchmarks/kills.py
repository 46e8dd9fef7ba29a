"""Kills jobs with SIGKILL at random moments of their saves, and sees whether each resumes from a whole checkpoint.

    python benchmarks/kills.py [--trials 100] [--folder /mnt/disk]

One job after another trains a small model and saves after every step, every other one in the background. It first
resumes from what the job before it left: the last checkpoint whose save had returned, or a later one, and to the bit
the state of a run that was never stopped.
Results: kills.json and kills.md under benchmarks/results.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from arguments import folder, positive, results_folder
from launch import HERE, child_environment, free_port, this_project
from results import RESULTS, header, header_lines, markdown_table, write

from deepspeed.common.commands import count, count_or_none


@dataclass(frozen=True)
class Trial:
    """What a job that was killed left.

    Attributes:
        background: whether it saved in the background.
        after: seconds after it began to save.
        saved: the last step whose save had returned.
        resumed: the step at which the next job resumed.
        equal: whether its weights are those of a run that was not stopped.
        partial: whether a save was under way.
    """

    background: bool
    after: float
    saved: int
    resumed: int
    equal: bool
    partial: bool

    @property
    def good(self) -> bool:
        """Whether nothing that was saved is lost."""
        return self.resumed >= self.saved and self.equal


class Job:
    """A running job: `benchmarks/kills_worker.py`."""

    def __init__(self, folder: str, background: bool) -> None:
        command = [sys.executable, str(HERE / "kills_worker.py"), "--folder", folder]
        place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        environment = child_environment(this_project(), 1) | place | {"MASTER_PORT": str(free_port())}
        self._process = subprocess.Popen(
            command + ["--background"] * background, env=environment, stdout=subprocess.PIPE, text=True
        )

    def said(self, word: str) -> list[str]:
        """Wait for a line that begins with `word`; return what follows it."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            first, *rest = line.split()
            if first == word:
                return rest
        raise RuntimeError(f"the job ended with {self._process.wait()} before it said {word!r}")

    def kill(self) -> Iterator[list[str]]:
        """Kill it and yield what it had still said."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout is not None
        return (line.split() for line in self._process.stdout)


def main() -> int:
    """Run the trials, print and write; 1 when something was lost."""
    options = parse(sys.argv[1:])
    head, trials = header(), []
    with TemporaryDirectory(prefix="benchmark-kills-", dir=options.folder) as folder:
        numbers, weights = random.Random(options.seed), dict[str, str]()
        job = Job(folder, background=False)
        job.said("resumed")
        for number in range(options.trials):
            saved = int(job.said("saved")[0])
            after = numbers.uniform(0, options.most)
            time.sleep(after)
            for words in job.kill():
                saved = int(words[1]) if words[0] == "saved" else saved
            partial = any(Path(folder).glob(".*.partial"))
            background, job = number % 2 == 1, Job(folder, background=number % 2 == 0)
            step, found = job.said("resumed")
            expected = weights.setdefault(step, job.said("expected")[0])
            trials.append(Trial(background, after, saved, int(step), found == expected, partial))
            print(f"{number + 1}: {trials[-1]}", file=sys.stderr, flush=True)
        list(job.kill())
    rows = []
    for background in (False, True):
        mine = [trial for trial in trials if trial.background is background]
        rows.append(
            [
                "in the background" if background else "at once",
                str(len(mine)),
                str(sum(trial.partial for trial in mine)),
                str(sum(trial.good for trial in mine)),
            ]
        )
    whole = sum(trial.good for trial in trials)
    said = "met" if whole == len(trials) else "NOT met"
    paragraphs = [
        "# Jobs killed while they save",
        f"SIGKILL at a random moment, up to {options.most} s after a save. The job after it resumes; its weights, "
        "masters and moments are compared, to the bit, with those of a run that was never stopped.",
        *header_lines(head, {"torch": version("torch")}),
        markdown_table(["saves", "killed", "a save was under way", "resumed whole"], rows),
        f"- Resumed from a whole checkpoint, with nothing lost whose save had returned: {whole} of {len(trials)} "
        f"(goal: all, {said}).",
    ]
    print(
        write("kills", {**head, "trials": [asdict(t) for t in trials]}, paragraphs, options.out).read_text()
    )
    return 0 if whole == len(trials) else 1


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=count, default=100)
    parser.add_argument("--most", type=positive, default=0.4, help="seconds after a save")
    parser.add_argument("--seed", type=count_or_none, default=0)
    parser.add_argument(
        "--folder", type=folder, default=Path("/var/tmp"), help="where checkpoints are written"
    )
    parser.add_argument("--out", type=results_folder, default=RESULTS, help="folder of the results")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
