"""One rank: the script runs as under Python, its end is written down, and nothing stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
from launching import REPORT, environment, gone, read_pids, record_in, reports, start_rank, wait_until

GRANDCHILD = """
import os, signal, subprocess, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
apart = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
(folder / "grandchild").write_text(f"{apart.pid}\\n")
(folder / "script").write_text(f"{os.getpid()}\\n")
"""


def write(folder, source, name="script.py"):
    path = folder / name
    path.write_text(textwrap.dedent(source))
    return path


def test_arguments_arrive_untouched_after_local_rank(tmp_path):
    given = ["--deepspeed", "a b", "--", "$$x", "${local_rank}", "--local_rank=9", ""]
    done = start_rank(tmp_path, write(tmp_path, REPORT), *given)
    output, _ = done.communicate(timeout=60)
    assert reports(output)[0][0] == ["--local_rank=1", *given]


def test_local_rank_is_left_out_when_asked(tmp_path):
    done = start_rank(tmp_path, write(tmp_path, REPORT), "x", local_rank_argument=False)
    output, _ = done.communicate(timeout=60)
    assert reports(output)[0][0] == ["x"]


def test_a_script_finds_its_neighbours_and_itself_as_main(tmp_path):
    write(tmp_path, "value = 7", "neighbour.py")
    script = write(
        tmp_path,
        """
        import pickle, sys, neighbour
        class Local: pass
        if __name__ == "__main__":
            print(neighbour.value, type(pickle.loads(pickle.dumps(Local()))) is Local, __file__ == sys.argv[0])
        """,
    )
    done = start_rank(tmp_path, script)
    assert done.communicate(timeout=60) == ("7 True True\n", "")
    assert done.returncode == 0


def test_a_module_runs_as_python_m_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "import sys; print(__name__, sys.argv[1:])", "some_module.py")
    output, _ = start_rank(tmp_path, "some_module", "y", kind="module").communicate(timeout=60)
    assert output == "__main__ ['--local_rank=1', 'y']\n"


def test_a_command_runs_without_python_and_its_last_lines_are_kept(tmp_path):
    done = start_rank(
        tmp_path, "sh", "-c", "echo out; echo bad >&2; exit 7", kind="command", local_rank_argument=False
    )
    assert done.communicate(timeout=60) == ("out\n", "bad\n")
    assert done.returncode == 7
    assert (record_in(tmp_path)["text"], record_in(tmp_path)["code"]) == ("bad", 7)


@pytest.mark.parametrize(
    ("source", "code", "summary", "stderr"),
    [
        ("import sys; sys.exit(3)", 3, "", ""),
        ("import os; os._exit(4)", 4, "", ""),
        ("raise SystemExit('no such data')", 1, "no such data", "no such data\n"),
        ("import sys; sys.exit(0)", 0, None, ""),
    ],
)
def test_exit_codes_are_the_scripts(tmp_path, source, code, summary, stderr):
    done = start_rank(tmp_path, write(tmp_path, source))
    assert done.communicate(timeout=60)[1] == stderr
    assert done.returncode == code
    if summary is not None:
        assert (record_in(tmp_path)["code"], record_in(tmp_path)["summary"]) == (code, summary)


def test_a_traceback_begins_at_the_script_on_stderr_and_in_the_record(tmp_path):
    script = write(tmp_path, "def fail():\n    raise KeyError('missing')\nfail()\n")
    done = start_rank(tmp_path, script)
    _, errors = done.communicate(timeout=60)
    assert done.returncode == 1
    assert errors.splitlines()[1] == f'  File "{script}", line 3, in <module>'
    assert errors == record_in(tmp_path)["text"]
    assert record_in(tmp_path)["summary"] == "KeyError: 'missing'"


def test_atexit_runs_and_the_scripts_excepthook_is_called(tmp_path):
    script = write(
        tmp_path,
        """
        import atexit, sys
        atexit.register(print, "at exit")
        sys.excepthook = lambda kind, error, trace: print("hook", error)
        raise ValueError("wrong")
        """,
    )
    assert start_rank(tmp_path, script).communicate(timeout=60) == ("hook wrong\nat exit\n", "")


def test_a_crash_in_native_code_leaves_its_python_stack(tmp_path):
    script = write(
        tmp_path, "import os, signal\ndef native():\n    os.kill(os.getpid(), signal.SIGSEGV)\nnative()\n"
    )
    done = start_rank(tmp_path, script)
    done.communicate(timeout=60)
    found = record_in(tmp_path)
    assert (done.returncode, found["signal"], found["code"]) == (139, signal.SIGSEGV, None)
    assert f'File "{script}", line 3 in native' in found["text"]
    assert found["peak"] > 2**20


def test_output_goes_to_a_file_of_the_rank(tmp_path):
    script = write(tmp_path, "import sys; print('out'); print('err', file=sys.stderr)")
    output = start_rank(tmp_path, script, log=f"{tmp_path}/x_rank{{rank}}.log").communicate(timeout=60)
    assert output == ("", "")
    assert (tmp_path / "x_rank3.log").read_text() == "out\nerr\n"


def test_a_rank_keeps_to_its_cores(tmp_path):
    allowed = sorted(os.sched_getaffinity(0))
    script = write(tmp_path, "import os; print(sorted(os.sched_getaffinity(0)))")
    cores = ((allowed[0],), (allowed[-1],))
    output, _ = start_rank(tmp_path, script, cores=cores).communicate(timeout=60)
    assert json.loads(output) == [allowed[-1]]


def test_what_a_failing_script_started_is_killed_also_in_other_sessions(tmp_path):
    script = write(tmp_path, GRANDCHILD + "sys.exit(5)")
    done = start_rank(tmp_path, script, str(tmp_path), local_rank_argument=False)
    done.communicate(timeout=60)
    assert done.returncode == 5
    assert gone(read_pids(tmp_path / "grandchild"))


def test_a_script_that_ignores_sigterm_is_killed_after_the_grace(tmp_path):
    script = write(
        tmp_path,
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)" + GRANDCHILD + "time.sleep(300)",
    )
    rank = start_rank(tmp_path, script, str(tmp_path), local_rank_argument=False, grace=0.2)
    pids = read_pids(tmp_path / "grandchild", tmp_path / "script")
    os.killpg(rank.pid, signal.SIGTERM)
    rank.communicate(timeout=60)
    assert rank.returncode == 128 + signal.SIGKILL
    assert gone(pids)
    assert record_in(tmp_path)["ended"] is True


def test_a_script_may_use_the_grace_to_save(tmp_path):
    script = write(
        tmp_path,
        """
        import os, signal, sys, time
        def save(*_):
            print("saved")
            sys.exit(0)
        signal.signal(signal.SIGTERM, save)
        os.write(1, b"ready\\n")  # a handler cannot print while print runs
        time.sleep(300)
        """,
    )
    rank = start_rank(tmp_path, script)
    assert rank.stdout.readline() == "ready\n"
    os.killpg(rank.pid, signal.SIGTERM)
    assert rank.communicate(timeout=60)[0] == "saved\n"
    assert rank.returncode == 0


def test_an_error_before_the_order_to_end_is_not_taken_for_its_consequence(tmp_path):
    script = write(
        tmp_path,
        """
        import atexit, time
        atexit.register(time.sleep, 300)
        raise RuntimeError("first")
        """,
    )
    rank = start_rank(tmp_path, script)
    wait_until((tmp_path / "error.json").exists)
    os.killpg(rank.pid, signal.SIGTERM)
    rank.communicate(timeout=60)
    assert (record_in(tmp_path)["ended"], record_in(tmp_path)["summary"]) == (False, "RuntimeError: first")


@pytest.mark.parametrize("killed", ["launcher", "guard"])
def test_nothing_outlives_a_killed_launcher_or_guard(tmp_path, killed):
    inner = "" if killed == "launcher" else "apart.kill()\n"  # a killed guard cannot look for other sessions
    script = write(tmp_path, GRANDCHILD + inner + "time.sleep(300)")
    launcher = write(
        tmp_path,
        f"""
        import os, subprocess, sys, time
        from pathlib import Path
        from deepspeed.launcher.rank import Task
        task = Task(launcher=os.getpid(), local_rank_argument=False).encode()
        rank = subprocess.Popen(
            [sys.executable, "-m", "deepspeed.launcher.rank", task, {str(script)!r}, {str(tmp_path)!r}],
            env={{**os.environ, "RANK": "0", "LOCAL_RANK": "0"}}, start_new_session=True,
        )
        Path({str(tmp_path / "guard")!r}).write_text(f"{{rank.pid}}\\n")
        time.sleep(300)
        """,
        "launcher.py",
    )
    parent = subprocess.Popen([sys.executable, str(launcher)], env=environment())
    pids = read_pids(tmp_path / "guard", tmp_path / "script", tmp_path / "grandchild")
    os.kill(parent.pid if killed == "launcher" else pids[0], signal.SIGKILL)
    wait_until(lambda: gone(pids))
    parent.kill()
    parent.wait()


def test_a_rank_whose_launcher_is_already_gone_does_not_start(tmp_path):
    done = start_rank(tmp_path, write(tmp_path, "print('ran')"), launcher=1)
    assert done.communicate(timeout=60)[0] == ""
    assert done.returncode == 128 + signal.SIGTERM


def test_a_script_that_forgot_it_leaves_torch_distributed_after_its_own_last_words(tmp_path):
    source = """
    import atexit
    import torch.distributed as dist
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    leave = dist.destroy_process_group
    dist.destroy_process_group = lambda: print("left") or leave()
    atexit.register(print, "last words")
    """
    done = start_rank(tmp_path, write(tmp_path, source))
    assert done.communicate(timeout=60) == ("last words\nleft\n", "")
    assert done.returncode == 0


def test_a_silent_death_is_dated_before_what_peers_say_of_it(tmp_path):
    done = start_rank(
        tmp_path, write(tmp_path, "import os, time\nos.write(1, str(time.time()).encode())\nos._exit(9)")
    )
    output, _ = done.communicate(timeout=60)
    assert record_in(tmp_path)["time"] < float(output)
    assert not record_in(tmp_path)["ended"]
