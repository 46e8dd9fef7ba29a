"""Generate from a model whose parameters are sharded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from deepspeed.zero.gathered import GatheredParameters


@contextmanager
def unwrap_model_for_generation(model: Any) -> Iterator[nn.Module]:
    """Give the module of an engine with all its parameters whole, gathered once instead of at every token.

    Args:
        model: an engine, or a module.
    """
    module = getattr(model, "module", model)
    with GatheredParameters(module.parameters()):
        yield module
