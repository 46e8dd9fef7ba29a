"""The `deepspeed` command starts ranks, and what becomes of them is said and cleaned up."""

from __future__ import annotations

import os
import signal
import socket
import textwrap

import pytest
from launching import NAMES, REPORT, deepspeed, gone, read_pids, reports, start_deepspeed

from deepspeed.launcher import runner

STAY = """
import os, signal, subprocess, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
folder, rank = Path(sys.argv[-1]), os.environ["RANK"]
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
(folder / f"{rank}.child").write_text(f"{child.pid}\\n")
(folder / f"{rank}.script").write_text(f"{os.getpid()}\\n")
if "fail" in sys.argv and rank == "1":
    while len(list(folder.glob("*.script"))) < 2:
        time.sleep(0.02)
    raise ValueError("only rank one")
time.sleep(300)
"""


@pytest.fixture
def script(tmp_path):
    def write(text, name="job.py"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return path

    return write


def pids_below(folder):
    return read_pids(*(folder / f"{rank}.{kind}" for rank in (0, 1) for kind in ("child", "script")))


def test_ranks_get_their_place_the_script_its_arguments_and_the_environment_stays(script, tmp_path):
    (tmp_path / ".deepspeed_env").write_text("# mine\nFROM_FILE=yes=1\nMINE=file\n")
    path = os.pathsep.join([str(runner.__file__).partition("/deepspeed/launcher")[0], "/somewhere"])
    done = deepspeed(
        *("--num_gpus", 2, "--log_level", "warning", script(REPORT), "--num_gpus", "7", "--", "-x", "a$$b"),
        env={"MINE": "own", "PYTHONPATH": path, "OMP_NUM_THREADS": "3"},
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    ranks = sorted(reports(done.stdout), key=lambda seen: seen[1]["RANK"])
    for rank, (arguments, env, folder) in enumerate(ranks):
        assert arguments == [f"--local_rank={rank}", "--num_gpus", "7", "--", "-x", "a$$b"]
        assert [env[name] for name in NAMES] == [str(rank), str(rank), "2", "2", "2", "0", "1"]
        assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("127.0.0.1", ranks[0][1]["MASTER_PORT"])
        assert (env["MINE"], env["FROM_FILE"], env["OMP_NUM_THREADS"]) == ("own", "yes=1", "3")
        assert env["PYTHONPATH"].endswith(path)
        assert folder == str(tmp_path)


def test_a_named_port_cores_of_its_own_and_logs(script, tmp_path):
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    done = deepspeed(
        *("--num_accelerators", 1, "--master_port", port, "--master_addr", "localhost"),
        *("--bind_cores_to_rank", "--bind_core_list", min(os.sched_getaffinity(0))),
        *("--enable_each_rank_log", tmp_path / "logs", "--no_local_rank", script(REPORT)),
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (log,) = (tmp_path / "logs").glob("*_rank0.log")
    arguments, env, _ = reports(log.read_text())[0]
    assert arguments == []
    assert (env["MASTER_ADDR"], env["MASTER_PORT"], env["OMP_NUM_THREADS"]) == ("localhost", str(port), "1")


def test_a_module_and_options_for_torch_below(script, tmp_path):
    script(
        "import os, sys\nsys.exit(9) if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' else print('twice')",
        "m.py",
    )
    done = deepspeed("--launcher_args=--max-restarts=1", "--module", "m", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "twice\n")


WHEN_RANK_0_HAS_GONE = """
echo rank $RANK
if [ $RANK = 0 ]; then echo $$ > "$0/pid"; exit; fi
until [ -s "$0/pid" ]; do sleep 0.02; done
while kill -0 $(cat "$0/pid") 2> /dev/null; do sleep 0.02; done
sleep 1
exit 6
"""


def test_a_command_without_python(tmp_path):
    command = ("sh", "-c", WHEN_RANK_0_HAS_GONE, tmp_path)
    done = deepspeed("--num_gpus", 2, "--no_local_rank", "--no_python", *command)
    assert done.returncode == 6
    assert sorted(done.stdout.splitlines()) == ["rank 0", "rank 1"]
    assert done.stderr == "\ndeepspeed: rank 1 exited with code 6\n"


def test_a_failure_ends_all_and_its_traceback_comes_last(script, tmp_path):
    done = deepspeed(
        "--num_gpus", 2, script(STAY), "fail", tmp_path, env={"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1"}
    )
    assert done.returncode == 1
    *_, headline, title, frame, source, last = done.stderr.splitlines()
    assert headline == "deepspeed: rank 1 failed: ValueError: only rank one; 1 other rank was ended"
    assert (title, last) == ("Traceback (most recent call last):", "ValueError: only rank one")
    assert "job.py" in frame
    assert "raise" in source
    assert gone(pids_below(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ending_the_launcher_leaves_nothing(script, tmp_path, number):
    job = start_deepspeed(
        "--num_gpus",
        2,
        "--no_local_rank",
        script(STAY),
        tmp_path,
        env={"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1"},
    )
    pids = pids_below(tmp_path)
    job.send_signal(number)
    _, errors = job.communicate(timeout=60)
    assert (job.returncode, errors) == (
        128 + number,
        f"deepspeed: stopped by {number.name}; all ranks have ended\n",
    )
    assert gone(pids)


def test_killing_the_launcher_leaves_no_process(script, tmp_path):
    job = start_deepspeed("--num_gpus", 2, script(STAY), tmp_path)
    pids = pids_below(tmp_path)
    job.kill()
    job.communicate(timeout=60)  # returns when nobody below holds its output any more
    assert gone(pids)


def test_a_killed_rank_is_put_in_words(script):
    source = """
    import os, signal, time
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(300)
    """
    done = deepspeed("--num_gpus", 2, script(source))
    assert done.returncode == 137
    assert (
        "deepspeed: rank 1 was killed by SIGKILL: probably out of host memory (its peak was " in done.stderr
    )
    assert len(done.stderr.strip().splitlines()) == 1


def test_two_jobs_at_once_meet_at_different_ports(script):
    jobs = [start_deepspeed("--num_gpus", 1, script(REPORT)) for _ in range(2)]
    ports = [reports(job.communicate(timeout=120)[0])[0][1]["MASTER_PORT"] for job in jobs]
    assert len(set(ports)) == 2


def one_sentence(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        runner.main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    text = capsys.readouterr().err
    assert len(text.splitlines()) == 1
    return text


def test_a_port_in_use_is_one_sentence(capsys, script):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        text = one_sentence(capsys, "--master_port", port, script(""))
    assert text.startswith(
        f"deepspeed: --master_port: expected a free port, got {port} (Address already in use); "
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["no_such_file.py"], "expected a Python file, got 'no_such_file.py', which does not exist"),
        (["--no_python", "no-such-command"], "expected a command, got 'no-such-command', which is not found"),
        (["--num_gpus", 0, "FILE"], "--num_gpus: expected at least 1, got 0"),
        (["--num_gpus", 1, "--include", "localhost:0", "FILE"], "--num_gpus: expected to stand alone"),
        (["--num_nodes", 2, "FILE"], "--num_nodes: starting several nodes is not built yet, got 2"),
        (["--force_multi", "FILE"], "--force_multi: starting several nodes is not built yet"),
        (["--autotuning", "tune", "FILE"], "--autotuning: autotuning is not built yet, got tune"),
        (["--elastic_training", "FILE"], "--elastic_training: elastic training is not built yet"),
        (["--module", "--no_python", "FILE"], "--module: expected to stand alone"),
        (["--bind_core_list", "0", "FILE"], "--bind_core_list: expected --bind_cores_to_rank beside it"),
        (["--master_port", 70000, "FILE"], "--master_port: expected 1 to 65535, got 70000"),
        (["--master_addr", "no.such.host.invalid", "FILE"], "--master_addr: expected a name or address"),
        (["--include", "worker-7", "FILE"], "--include: starting several nodes is not built yet"),
        (["--enable_each_rank_log", "FILE", "FILE"], "--enable_each_rank_log: expected a folder, got"),
        (["--launcher_args", "'", "FILE"], "--launcher_args: expected options in balanced quotes"),
    ],
)
def test_mistakes_are_one_sentence(capsys, script, arguments, text):
    given = [script("") if argument == "FILE" else argument for argument in arguments]
    assert text in one_sentence(capsys, *given)


def test_names_that_trainers_import():
    assert runner.DEEPSPEED_ENVIRONMENT_NAME == ".deepspeed_env"
    assert runner.DLTS_HOSTFILE == "/job/hostfile"
    assert "NCCL" in runner.EXPORT_ENVS


def test_the_process_id_is_in_a_file_while_the_job_runs(script, tmp_path):
    source = "import os, tempfile\nprint([name for name in os.listdir(tempfile.gettempdir()) if name.endswith('.ds')])"
    done = deepspeed("--save_pid", script(source), env={"TMPDIR": str(tmp_path)})
    assert done.stdout.count(".ds'") == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "job.py"]


@pytest.mark.parametrize("end", ["os._exit(9)", "os.abort()"])
def test_a_rank_that_dies_without_a_word_comes_before_the_peers_that_lose_it(script, end):
    source = f"""
    import os
    import torch
    import torch.distributed as dist
    dist.init_process_group("gloo")
    if os.environ["RANK"] == "1":
        {end}
    dist.all_reduce(torch.ones(1))
    """
    done = deepspeed("--num_gpus", 2, script(source))
    assert done.returncode == (9 if "9" in end else 134)
    assert "deepspeed: rank 1 " in done.stderr
