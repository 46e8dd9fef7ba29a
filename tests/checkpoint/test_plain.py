"""What a user's state may hold, and that the rest is refused by its key when it is saved."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deepspeed.checkpoint.plain import from_plain, to_plain
from deepspeed.errors import UsageError

LARGEST = 2**2032 - 1
ENDLESS: dict[str, object] = {}
ENDLESS["again"] = ENDLESS


@pytest.mark.parametrize(
    "value",
    [
        np.uint64(2**63 + 1),
        np.arange(5)[::-1],
        np.zeros((0, 3)),
        -LARGEST,
        {None: 1, torch.float16: {2, (None)}, b"key": 1 + 2j},
        torch.tensor([1 + 2j]).conj(),
        torch.tensor([1 + 2j]).conj().imag,
        torch.arange(6).reshape(2, 3).t(),
    ],
    ids=str,
)
def test_it_comes_back_from_a_file(tmp_path, value):
    plain, types = to_plain({"key": [value]}, "client_state")
    torch.save(plain, tmp_path / "file")
    (found,) = from_plain(torch.load(tmp_path / "file", weights_only=True), types)["key"]
    assert type(found) is type(value)
    if isinstance(value, (np.ndarray, torch.Tensor)):
        assert found.dtype == value.dtype
        assert found.tolist() == value.tolist()
    else:
        assert found == value


def test_values_are_saved_as_they_are_seen_not_as_they_lie_in_memory():
    plain, _ = to_plain(torch.tensor([1 + 2j]).conj(), "client_state")
    assert not plain.is_conj()
    assert plain.tolist() == [1 - 2j]


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (ENDLESS, r"\['again'\]\['again'\]: .*in itself"),
        (LARGEST + 1, "an int of 2033 bits"),
        ({LARGEST + 1}, "a builtins.set"),
        ({float("nan"): 1}, "a key of float"),
        (np.arange(3, dtype=">i4"), "a numpy.ndarray of dtype >i4"),
        (np.longdouble(1), "of dtype (longdouble|float)"),
        (np.array(["text"]), "a numpy.ndarray of dtype <U4"),
        (np.datetime64("2020"), r"a numpy.datetime64 of dtype datetime64\[Y\]"),
        (torch.eye(2).to_sparse(), "a tensor that is sparse"),
        (torch.empty(2, device="meta"), "a tensor that is .*without values"),
    ],
    ids=str,
)
def test_what_no_file_can_hold_is_refused_by_its_key(value, found):
    with pytest.raises(UsageError, match=rf"^client_state\['key'\].*{found}"):
        to_plain({"key": value}, "client_state")
