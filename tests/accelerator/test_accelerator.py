"""The accelerator answers every documented question, on whatever device there is."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from deepspeed.accelerator import Accelerator, get_accelerator, set_accelerator
from deepspeed.errors import ConfigError

CALLS = [
    "amp",
    "available_memory",
    "communication_backend_name",
    "communication_backend_version",
    "create_graph",
    "current_device",
    "current_device_name",
    "current_stream",
    "default_generator",
    "default_stream",
    "device",
    "device_count",
    "device_name",
    "empty_cache",
    "get_compile_backend",
    "get_rng_state",
    "handles_memory_backpressure",
    "initial_seed",
    "is_available",
    "is_bf16_supported",
    "is_fp16_supported",
    "is_synchronized_device",
    "is_triton_supported",
    "max_memory_allocated",
    "max_memory_cached",
    "max_memory_reserved",
    "memory_allocated",
    "memory_cached",
    "memory_reserved",
    "memory_stats",
    "random",
    "range_pop",
    "reset_max_memory_allocated",
    "reset_max_memory_cached",
    "reset_peak_memory_stats",
    "resolves_data_dependency",
    "supported_dtypes",
    "synchronize",
    "total_memory",
    "use_host_timers",
    "visible_devices_envs",
]


@pytest.fixture
def host():
    return Accelerator("cpu")


@pytest.mark.parametrize("name", CALLS)
def test_documented_methods_work_without_arguments(name):
    accelerator = get_accelerator()
    if name == "range_pop":
        accelerator.range_push("test")
    getattr(accelerator, name)()


def test_importing_touches_no_device():
    script = "import deepspeed.accelerator, torch; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)


def test_names_are_valid_torch_devices():
    accelerator = get_accelerator()
    torch.empty(1, device=accelerator.current_device_name())
    torch.empty(1, device=accelerator.device_name())
    assert accelerator.on_accelerator(torch.empty(1, device=accelerator.current_device_name()))


def test_the_cpu_has_no_index_and_uses_gloo(host):
    assert (host.device_name(), host.device_name(3), host.current_device_name()) == ("cpu", "cpu", "cpu")
    assert host.communication_backend_name() == "gloo"
    assert host.is_synchronized_device()
    assert not host.on_accelerator(torch.empty(1, device="meta"))


def test_on_the_cpu_devices_are_the_launchers_ranks(host, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert host.device_count() == 3
    assert host.current_device() == 2
    host.set_device(1)
    assert host.current_device() == 2


def test_numbers_are_sent_as_a_tensor(host):
    sent = host.send((1.5, 2.0), torch.device("cpu"), dtype=torch.float64)
    assert torch.equal(sent, torch.tensor([1.5, 2.0], dtype=torch.float64))
    assert torch.equal(host.send([True, False], torch.device("cpu")), torch.tensor([1.0, 0.0]))


def test_host_memory_is_what_the_process_occupies(host):
    before = host.memory_allocated()
    block = torch.ones(2**24)
    assert host.memory_allocated() >= before + block.nbytes // 2
    assert host.max_memory_allocated() >= block.nbytes
    assert host.total_memory() >= host.available_memory() > 0


def test_random_state_can_be_taken_and_put_back(host):
    state = host.get_rng_state()
    drawn = torch.rand(3)
    host.set_rng_state(state)
    assert torch.equal(torch.rand(3), drawn)
    host.manual_seed(7)
    assert host.initial_seed() == 7
    assert host.default_generator().initial_seed() == 7
    host.manual_seed_all(8)
    host.set_rng_state(state)


def test_streams_events_and_graphs_exist_and_do_nothing_on_the_cpu(host):
    first, second = host.Event(enable_timing=True), host.Event()
    first.record(host.current_stream())
    with host.stream(host.Stream()):
        torch.ones(3)
    second.record()
    second.synchronize()
    second.wait()
    assert second.query()
    assert first.elapsed_time(second) >= 0
    with host.capture_to_graph(host.create_graph()), host.device(0):
        torch.ones(3)
    host.replay_graph(None)
    assert host.is_pinned(host.pin_memory(torch.ones(3)))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("BFloat16Tensor", torch.bfloat16),
        ("HalfTensor", torch.float16),
        ("FloatTensor", torch.float32),
        ("DoubleTensor", torch.float64),
        ("ByteTensor", torch.uint8),
        ("IntTensor", torch.int32),
        ("LongTensor", torch.int64),
    ],
)
def test_old_tensor_classes_are_constructors(host, name, dtype):
    made = getattr(host, name)([1, 2])
    assert made.dtype == dtype
    assert made.tolist() == [1, 2]


def test_visible_devices_are_chosen_by_the_devices_own_variable(host):
    environ: dict[str, str] = {}
    host.set_visible_devices_envs(environ, [0, 2])
    assert environ == {}
    called = []
    host.lazy_call(lambda: called.append(1))
    assert called == [1]
    host.set_compile_backend("eager")
    assert host.get_compile_backend() == "eager"


def test_the_accelerator_can_be_chosen():
    before = get_accelerator()
    mine = Accelerator("cpu")
    try:
        set_accelerator(mine)
        assert get_accelerator() is mine
    finally:
        set_accelerator(before)


def test_the_environment_may_ask_for_the_cpu_but_not_for_what_is_not_there():
    script = "from deepspeed.accelerator import get_accelerator; print(get_accelerator().device_name())"

    def run(kind: str) -> subprocess.CompletedProcess:
        environ = os.environ | {"DS_ACCELERATOR": kind}
        return subprocess.run(
            [sys.executable, "-c", script],
            env=environ,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    assert run("cpu").stdout == "cpu\n"
    assert f"{ConfigError.__name__}: DS_ACCELERATOR: expected cpu or" in run("abacus").stderr


HOLES = """
import torch
from deepspeed import get_accelerator

accelerator = get_accelerator()
blocks = [(torch.ones(25_000), torch.ones(8)) for _ in range(400)]  # 40 MB with small ones between
kept = [small for _, small in blocks]
del blocks
before = accelerator.memory_allocated()
accelerator.empty_cache()
print(before - accelerator.memory_allocated())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives holes in its heap back")
def test_emptying_the_cache_on_the_host_gives_holes_in_the_heap_back():
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", HOLES], env=environment, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) > 20e6
