"""torch.distributed starts under every launcher and without one, or says in a sentence why not."""

import os
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
from harness import free_port, on_ranks

from deepspeed import comm
from deepspeed.comm.environment import Place, current_place, fair_threads, from_mpi
from deepspeed.comm.init import default_timeout
from deepspeed.errors import CommunicationError, ConfigError, UsageError

LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


def run(script: str, **environ: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if name not in LAUNCHER_NAMES}
    return subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", "-W", "error::UserWarning", "-c", script],
        env=clean | environ,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def start(script: str, **environ: str) -> subprocess.Popen:
    clean = {name: value for name, value in os.environ.items() if name not in LAUNCHER_NAMES}
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env=clean | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_plain_script_is_one_rank_without_a_port_or_a_trace_in_the_environment():
    done = run(
        "import os; before = dict(os.environ)\n"
        "from deepspeed import comm; comm.init_distributed()\n"
        "assert comm.get_world_size() == 1 and comm.get_rank() == 0\n"
        "comm.barrier(); comm.new_group([0])\n"
        "assert dict(os.environ) == before\n"
        "comm.destroy_process_group(); comm.init_distributed(); comm.destroy_process_group(); print('fine')"
    )
    assert done.stdout == "fine\n", done.stderr
    assert done.stderr == ""


def test_one_rank_under_a_launcher_does_not_need_the_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run(
            "from deepspeed import comm\ncomm.init_distributed()\n"
            "comm.destroy_process_group()\nprint('fine')",
            RANK="0",
            WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(taken.getsockname()[1]),
        )
    assert done.stdout == "fine\n", done.stderr


def test_a_port_in_use_is_one_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run(
            "from deepspeed import comm\nfrom deepspeed.errors import CommunicationError\n"
            "try: comm.init_distributed()\nexcept CommunicationError as error: print(error)",
            RANK="0",
            WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
    assert done.stdout == (
        f"master_port: expected a free port, got {port}, which another process is using; "
        "choose another with --master_port or distributed_port\n"
    ), done.stderr


def test_a_missing_rank_is_reported_after_the_timeout():
    done = run(
        "from datetime import timedelta\nfrom deepspeed import comm\n"
        "from deepspeed.errors import CommunicationError\n"
        "try: comm.init_distributed(timeout=timedelta(seconds=1))\n"
        "except CommunicationError as error: print(error)",
        RANK="0",
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
    )
    assert done.stdout.startswith("rank 0 of 2 could not meet the others at 127.0.0.1:"), done.stderr


def test_ranks_given_as_arguments_meet_too():
    script = (
        "import os\nfrom deepspeed import comm\n"
        "comm.init_distributed(rank=int(os.environ['ME']), world_size=2)\n"
        "print(comm.get_world_size())\ncomm.destroy_process_group()"
    )
    port = str(free_port())
    ranks = [start(script, ME=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in range(2)]
    assert [rank.communicate(timeout=100)[0] for rank in ranks] == ["2\n", "2\n"]


def test_several_ranks_without_a_meeting_place_are_explained(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(CommunicationError, match="MASTER_ADDR: expected the address of rank 0's machine"):
        comm.init_distributed(rank=0, world_size=2)


def test_mpi_ranks_meet_and_see_torchruns_names():
    script = (
        "import os, torch\nfrom deepspeed import comm\ncomm.init_distributed()\n"
        "total = torch.tensor([comm.get_rank() + 1.0]); comm.all_reduce(total)\n"
        "assert total.item() == 3 and os.environ['RANK'] == str(comm.get_rank())\n"
        "assert os.environ['LOCAL_RANK'] == str(comm.get_local_rank()) == os.environ['RANK']\n"
        "comm.destroy_process_group(); print('fine')"
    )
    port = str(free_port())
    ranks = [
        start(
            script,
            OMPI_COMM_WORLD_RANK=str(rank),
            OMPI_COMM_WORLD_SIZE="2",
            OMPI_COMM_WORLD_LOCAL_RANK=str(rank),
            MASTER_PORT=port,
            OMP_NUM_THREADS="1",
        )
        for rank in range(2)
    ]
    assert [rank.communicate(timeout=100)[0] for rank in ranks] == ["fine\n", "fine\n"]


@on_ranks(2)
def test_a_running_torch_distributed_is_adopted():
    comm.init_distributed(dist_backend="nccl", timeout=timedelta(seconds=1), rank=5)
    assert comm.get_world_size() == 2


def test_a_backend_that_torch_lacks_is_named():
    with pytest.raises(ConfigError, match=r"dist_backend: .*gloo.*, got 'pigeon'"):
        comm.init_distributed(dist_backend="pigeon")


def test_refusing_to_start_needs_a_running_group():
    with pytest.raises(UsageError, match="dist_init_required"):
        comm.init_distributed(dist_init_required=False)


def test_the_timeout_comes_from_the_environment_in_minutes(monkeypatch):
    assert default_timeout() == timedelta(minutes=30)
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "2")
    assert default_timeout() == timedelta(minutes=2)
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "soon")
    with pytest.raises(CommunicationError, match="DEEPSPEED_TIMEOUT: expected an integer, got 'soon'"):
        default_timeout()


def test_without_a_launcher_there_is_one_rank_and_nothing_is_written():
    environ: dict[str, str] = {}
    assert current_place(29500, environ=environ) == Place()
    assert environ == {}


def test_torchruns_variables_come_first():
    environ = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "host",
        "MASTER_PORT": "7",
        "OMPI_COMM_WORLD_RANK": "0",
        "OMPI_COMM_WORLD_SIZE": "9",
    }
    assert current_place(29500, environ=environ) == Place(3, 4, 1, "host", 7)


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MASTER_ADDR": "head"}, Place(1, 2, 0, "head", 29500)),
        ({"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "2"}, Place(1, 2, 0, "127.0.0.1", 29500)),
        (
            {
                "OMPI_COMM_WORLD_RANK": "1",
                "OMPI_COMM_WORLD_SIZE": "2",
                "AZ_BATCH_MASTER_NODE": "10.0.0.4:6000",
            },
            Place(1, 2, 0, "10.0.0.4", 6000),
        ),
        (
            {
                "OMPI_COMM_WORLD_RANK": "1",
                "OMPI_COMM_WORLD_SIZE": "2",
                "AZ_BATCHAI_MPI_MASTER_NODE": "10.0.0.5",
            },
            Place(1, 2, 0, "10.0.0.5", 29500),
        ),
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "SM_HOSTS": '["algo-2", "algo-1"]'},
            Place(1, 2, 0, "algo-1", 29500),
        ),
    ],
    ids=["pmi", "mvapich", "azureml", "azure batch", "sagemaker"],
)
def test_mpi_and_clouds_are_recognised(environ, place):
    assert from_mpi(environ, 29500) == place
    exported = dict(environ)
    assert current_place(29500, environ=exported) == place
    assert exported["RANK"] == "1"
    assert exported["MASTER_ADDR"] == place.master_addr
    assert current_place(29500, mpi=False, environ=dict(environ)) == Place()


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (
            {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a"},
            "RANK: expected less than WORLD_SIZE=2, got 2",
        ),
        ({"RANK": "0"}, "WORLD_SIZE: expected an integer, got ''"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "RANK: expected an integer, got ''"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK: expected an integer, got 'one'"),
    ],
)
def test_half_an_environment_is_explained(environ, message):
    with pytest.raises(CommunicationError, match=message):
        current_place(29500, environ=environ)


def test_mpi_discovery_outside_mpi_is_explained(monkeypatch):
    for name in ("OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(CommunicationError, match="mpi_discovery: expected to run under mpirun"):
        comm.mpi_discovery()


@pytest.mark.parametrize(
    ("environ", "threads"),
    [
        ({}, 8),
        ({"LOCAL_WORLD_SIZE": "4"}, 2),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "3"}, 2),
        ({"MPI_LOCALNRANKS": "16"}, 1),
        ({"LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "8"}, 8),
        ({"LOCAL_WORLD_SIZE": "4", "MKL_NUM_THREADS": "5"}, 8),
    ],
    ids=str,
)
def test_ranks_of_a_host_share_its_processors_unless_the_user_has_chosen(environ, threads):
    assert fair_threads(environ, threads=8, own=8, host=8) == threads


@pytest.mark.parametrize(
    ("threads", "own", "host", "fair"),
    [
        (2, 2, 8, 2),  # each rank is bound to processors of its own
        (4, 4, 8, 2),  # two ranks are bound to the same ones
        (4, 8, 8, 2),  # torch has begun with one thread for each core of two
        (3, 8, 8, 3),  # set_num_threads was called
        (1, 1, 1, 1),
    ],
)
def test_threads_follow_what_ranks_are_bound_to_and_what_the_user_has_set(threads, own, host, fair):
    assert fair_threads({"LOCAL_WORLD_SIZE": "4"}, threads, own, host) == fair


LONE_RANK_OF_MANY = {
    "OMPI_COMM_WORLD_RANK": "0",
    "OMPI_COMM_WORLD_SIZE": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1000",
}


def test_a_rank_that_takes_fewer_threads_says_so_once():
    script = (
        "import torch; torch.set_num_threads(64)\n"
        "from deepspeed import comm; comm.init.usable_processors = lambda pid=0: range(64)\n"
        "comm.init_distributed(); print(torch.get_num_threads())"
    )
    done = run(script, **LONE_RANK_OF_MANY)
    assert done.stdout.splitlines()[-1] == "1", done.stderr
    assert (done.stdout + done.stderr).count("set OMP_NUM_THREADS to choose") == 1


def test_threads_that_a_script_has_set_stay():
    script = (
        "import torch; torch.set_num_threads(64)\n"
        "from deepspeed import comm; comm.init_distributed(); print(torch.get_num_threads())"
    )
    done = run(script, **LONE_RANK_OF_MANY)
    assert done.stdout.splitlines()[-1] == "64", done.stderr
    assert "OMP_NUM_THREADS" not in done.stdout + done.stderr
