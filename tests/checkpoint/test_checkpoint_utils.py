"""State dicts are copied so that a saved tensor is no larger than itself."""

from collections import OrderedDict

import torch

from deepspeed.checkpoint.utils import clone_tensors_for_torch_save


def test_copies_own_their_memory_and_keep_the_structure():
    flat = torch.arange(1000.0)
    state = OrderedDict(a=flat[:2], more=[flat[2:4], ("text", 3)])
    copied = clone_tensors_for_torch_save(state)
    assert isinstance(copied, OrderedDict)
    assert copied["a"].tolist() == [0, 1]
    assert copied["a"].untyped_storage().nbytes() == 8
    assert copied["more"][1] == ("text", 3)
    copied["a"].zero_()
    assert flat[1] == 1
