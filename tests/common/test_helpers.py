"""Small helpers that scripts use."""

import random
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch

from deepspeed.common.lazy import lazy_names
from deepspeed.utils import instrument_w_nvtx, move_to_device, see_memory_usage, set_random_seed

Pair = namedtuple("Pair", ["left", "right"])


def test_containers_keep_their_type_when_tensors_move():
    batch = {
        "a": torch.ones(1),
        "b": [torch.ones(1), "text"],
        "c": Pair(torch.ones(1), (torch.ones(1), None)),
        "d": OrderedDict(x=torch.ones(1)),
    }
    moved = move_to_device(batch, "meta")
    assert moved["a"].device.type == "meta"
    assert moved["b"][0].device.type == "meta"
    assert moved["b"][1] == "text"
    assert isinstance(moved["c"], Pair)
    assert moved["c"].right[0].device.type == "meta"
    assert moved["c"].right[1] is None
    assert isinstance(moved["d"], OrderedDict)
    assert moved["d"]["x"].device.type == "meta"
    assert batch["a"].device.type == "cpu"


def test_one_seed_for_every_source():
    draws = []
    for _ in range(2):
        set_random_seed(5)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]


def test_memory_is_shown_only_when_asked_for(capfd):
    see_memory_usage("after step")
    assert capfd.readouterr().err == ""
    see_memory_usage("after step", force=True)
    assert "after step | " in capfd.readouterr().err


def test_an_instrumented_function_stays_itself():
    @instrument_w_nvtx
    def double(value):
        """Double."""
        return 2 * value

    assert double(4) == 8
    assert double.__name__ == "double"


def test_lazy_names_find_what_the_table_says_and_nothing_else():
    find = lazy_names("here", {"sqrt": "math", "root": "math:sqrt"})
    assert find("sqrt")(4) == find("root")(4) == 2
    with pytest.raises(AttributeError, match="module 'here' has no attribute 'pi'"):
        find("pi")
