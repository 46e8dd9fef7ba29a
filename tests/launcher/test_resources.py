"""The grammar of hostfile, --include, --exclude and core lists; which devices and cores ranks get."""

from __future__ import annotations

import argparse

import pytest

from deepspeed.errors import ConfigError, NotBuiltError
from deepspeed.launcher import cores
from deepspeed.launcher.runner import fetch_hostfile, parse_inclusion_exclusion, parse_resource_filter
from deepspeed.launcher.slots import Devices, Slots, choose_slots

HOSTS = {"a": 4, "b": 2}
GPUS = Devices(("0", "1", "2", "3"), "CUDA_VISIBLE_DEVICES")


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        ("", "", {"a": [0, 1, 2, 3], "b": [0, 1]}),
        ("a", "", {"a": [0, 1, 2, 3]}),
        ("a:0,2@b:1", "", {"a": [0, 2], "b": [1]}),
        ("a:0@a:2", "", {"a": [0, 2]}),
        ("", "a:0,2", {"a": [1, 3], "b": [0, 1]}),
        ("", "b", {"a": [0, 1, 2, 3]}),
    ],
)
def test_filters(include, exclude, left):
    assert parse_inclusion_exclusion(HOSTS, include, exclude) == left
    assert parse_resource_filter({"a": [0, 1, 2, 3], "b": [0, 1]}, include, exclude) == left


@pytest.mark.parametrize(
    ("include", "exclude", "text"),
    [
        ("a", "b", "stand alone"),
        ("c", "", "--include: expected one of a, b, got host 'c'"),
        ("", "a:9", "--exclude: expected slots of a among 0, 1, 2, 3, got 9"),
        ("a:x", "", "host:slot,slot"),
        ("a:", "", "host:slot,slot"),
        ("@", "", "host:slot,slot"),
        ("", "a@b", "leaves none"),
    ],
)
def test_wrong_filters_are_named(include, exclude, text):
    with pytest.raises(ConfigError, match=text):
        parse_inclusion_exclusion(HOSTS, include, exclude)


def test_hostfile(tmp_path):
    file = tmp_path / "hosts"
    assert fetch_hostfile(str(file)) is None
    file.write_text("# nodes\na slots=4\n\nb slots=2  # two\n")
    assert fetch_hostfile(str(file)) == HOSTS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=4\na slots=2\n", "line 2: expected each host once"),
        ("a 4\n", "line 1: expected 'host slots=N', got 'a 4'"),
        ("# nothing\n", "at least one line"),
        ("\udcff\n", "expected a readable UTF-8 text"),
    ],
)
def test_wrong_hostfiles_are_named(tmp_path, text, message):
    file = tmp_path / "hosts"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=message):
        fetch_hostfile(str(file))


def asked(num_gpus=-1, include="", exclude="", hostfile="", num_nodes=-1):
    return argparse.Namespace(
        num_gpus=num_gpus, include=include, exclude=exclude, hostfile=hostfile, num_nodes=num_nodes
    )


@pytest.fixture
def on(monkeypatch):
    """Choose slots on a machine with the given devices."""

    def choose(devices, **options):
        monkeypatch.setattr(Devices, "here", classmethod(lambda cls: devices))
        return choose_slots(asked(**options))

    return choose


@pytest.mark.parametrize(
    ("options", "ranks", "visible"),
    [
        ({}, 4, None),
        ({"num_gpus": 2}, 2, "0,1"),
        ({"include": "localhost:1,3"}, 2, "1,3"),
        ({"include": "localhost:3@localhost:1"}, 2, "1,3"),
        ({"include": "localhost"}, 4, None),
        ({"exclude": "localhost:0"}, 3, "1,2,3"),
        ({"exclude": "localhost:0@127.0.0.1:3"}, 2, "1,2"),
    ],
)
def test_ranks_get_the_devices_that_were_chosen(on, options, ranks, visible):
    assert on(GPUS, **options) == Slots(ranks, {"CUDA_VISIBLE_DEVICES": visible} if visible else {})


def test_devices_chosen_from_outside_are_not_left(on):
    given = Devices(("2", "5"), "CUDA_VISIBLE_DEVICES")
    assert on(given, num_gpus=1) == Slots(1, {"CUDA_VISIBLE_DEVICES": "2"})
    assert on(given, include="localhost:5") == Slots(1, {"CUDA_VISIBLE_DEVICES": "5"})
    with pytest.raises(ConfigError, match="among 2, 5, got 0"):
        on(given, include="localhost:0")
    unnumbered = Devices(("GPU-a", "GPU-b"), "CUDA_VISIBLE_DEVICES")
    assert on(unnumbered, include="localhost:1") == Slots(1, {"CUDA_VISIBLE_DEVICES": "GPU-b"})


@pytest.mark.parametrize(
    ("options", "ranks"),
    [({}, 1), ({"num_gpus": 3}, 3), ({"include": "localhost:0,2"}, 2), ({"exclude": "localhost:1"}, 1)],
)
def test_without_devices_slots_are_ranks(on, options, ranks):
    assert on(Devices(), **options) == Slots(ranks, {})


def test_a_hostfile_that_names_only_this_machine_counts_its_slots(on, tmp_path):
    file = tmp_path / "hosts"
    file.write_text("localhost slots=3\n")
    assert on(Devices(), hostfile=str(file)) == Slots(3, {})
    assert on(GPUS, hostfile=str(file)) == Slots(3, {"CUDA_VISIBLE_DEVICES": "0,1,2"})
    with pytest.raises(ConfigError, match="among 0, 1, 2, got 3"):
        on(GPUS, hostfile=str(file), include="localhost:3")


def test_several_nodes_are_refused(on, tmp_path):
    file = tmp_path / "hosts"
    file.write_text("localhost slots=3\nworker slots=3\n")
    with pytest.raises(NotBuiltError, match="several nodes is not built yet, got localhost, worker"):
        on(Devices(), hostfile=str(file))
    assert on(Devices(), hostfile=str(file), num_nodes=1).ranks == 3
    with pytest.raises(NotBuiltError, match="got host 'worker'"):
        on(Devices(), include="worker:0")


def test_more_ranks_than_devices_is_one_sentence(on):
    with pytest.raises(
        ConfigError, match="--num_gpus: expected at most 4, the devices this machine has, got 5"
    ):
        on(GPUS, num_gpus=5)


def test_lists_of_processors():
    assert cores.parse_cpus("0-3,8,2") == [0, 1, 2, 3, 8]


@pytest.mark.parametrize("wrong", ["x", "0;1", "", "0-"])
def test_wrong_lists_of_processors_are_named(wrong):
    with pytest.raises(ConfigError, match="--bind_core_list: expected numbers and ranges"):
        cores.listed_cores(wrong)


def test_processors_of_others_are_refused():
    with pytest.raises(ConfigError, match=r"processors this process may use, got \[4000\]"):
        cores.listed_cores("4000")


def test_cores_are_shared_equally_and_both_threads_of_a_core_stay_together():
    pairs = [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert cores.share(pairs, 2) == [[[0, 4], [1, 5]], [[2, 6], [3, 7]]]
    assert cores.share(pairs, 3) == [[[0, 4]], [[1, 5]], [[2, 6]]]
    with pytest.raises(ConfigError, match="expected at least 5 cores, one for each rank, got 4"):
        cores.share(pairs, 5)


def test_threads_of_one_core_are_found(monkeypatch, tmp_path):
    for cpu, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        (tmp_path / str(cpu)).write_text(f"{siblings}\n")
    monkeypatch.setattr(cores, "SIBLINGS", f"{tmp_path}/{{}}")
    monkeypatch.setattr(cores, "usable_processors", lambda: [0, 1, 2])
    assert cores.usable_cores() == [[0, 2], [1]]
