"""The first failure is found, and said in words."""

from __future__ import annotations

import json
import signal

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from deepspeed.launcher import record
from deepspeed.launcher.failure import report
from deepspeed.launcher.record import Record


@pytest.fixture
def failures(tmp_path, monkeypatch):
    """Make what torch's agent collects from ranks with the given records (None: the rank wrote nothing)."""

    def collect(*records, exitcode=-9):
        made = {}
        for rank, each in enumerate(records):
            path = tmp_path / f"{rank}.json"
            if each is not None:
                monkeypatch.setenv(record.VARIABLE, str(path))
                record.write(each)
            made[rank] = ProcessFailure(local_rank=rank, pid=1, exitcode=exitcode, error_file=str(path))
        return made

    return collect


def killed(number, **more):
    return Record(2.0, signal=number, **more)


def test_the_earliest_is_first_even_within_a_second(failures):
    late, early = Record(5.2, "ValueError: late", "T1", 1), Record(5.1, "KeyError: early", "T2", 1)
    assert report(failures(late, early)).text == "deepspeed: rank 1 failed: KeyError: early\nT2"


def test_what_was_ended_is_never_first(failures):
    ended = Record(1.0, "KeyError: shutdown", "T", 1, ended=True)
    told = report(failures(ended, Record(5.0, code=7), ended._replace(time=2.0)))
    assert (told.text, told.code) == ("deepspeed: rank 1 exited with code 7; 2 other ranks were ended", 7)


@pytest.mark.parametrize(
    ("found", "text", "code"),
    [
        (Record(1.0, code=3), "exited with code 3", 3),
        (Record(1.0, "no such file: x", code=1), "exited with code 1: no such file: x", 1),
        (killed(signal.SIGSEGV), "was killed by SIGSEGV: native code touched memory that is not there", 139),
        (killed(signal.SIGTERM), "was killed by SIGTERM: somebody else told it to end", 143),
        (killed(signal.SIGUSR1), "was killed by SIGUSR1", 138),
        (killed(signal.SIGBUS), "was killed by SIGBUS: probably shared memory is used up", 135),
        (killed(40), "was killed by signal 40", 168),
        (killed(signal.SIGABRT, code=0), "ran its script to the end and was killed by SIGABRT", 134),
        (killed(signal.SIGABRT, code=1, summary="E", text="T"), "failed: E\nT", 1),
        (killed(signal.SIGKILL), "was killed by SIGKILL: probably out of host memory", 137),
    ],
)
def test_an_end_is_put_in_words_and_keeps_its_code(failures, found, text, code):
    told = report(failures(found))
    assert told.text.startswith(f"deepspeed: rank 0 {text}")
    assert told.code == code


def test_a_rank_out_of_memory_says_how_much_it_had(failures):
    told = report(failures(killed(signal.SIGKILL, peak=3 * 2**30)))
    assert "probably out of host memory (its peak was 3.0 GiB, this machine has " in told.text


def test_a_rank_that_wrote_nothing_is_known_by_its_exit(failures):
    assert report(failures(None)).code == 137
    assert report(failures(None, exitcode=9)).text == "deepspeed: rank 0 exited with code 9"


def test_another_programs_record_is_left_aside(failures, tmp_path):
    (tmp_path / "0.json").write_text(
        json.dumps({"message": {"message": "x", "extraInfo": {"timestamp": "1"}}})
    )
    assert report(failures(None, exitcode=6)).text == "deepspeed: rank 0 exited with code 6"


def test_the_log_is_named(failures):
    assert "Its output is in /logs/a" in report(failures(Record(1.0, code=3, log="/logs/a"))).text
