"""TiledLinear: a linear layer cut into tiles, so that stage 3 never gathers more than one tile of it.

    weight  [ tile 0,0 | tile 0,1 ]   ->  output part 0    input parts run along the columns,
            [ tile 1,0 | tile 1,1 ]   ->  output part 1    output parts along the rows

Each tile is a module with parameters of its own, marked as gathered by itself (leaf_modules.py), inside a
repeated block too. The tiles of a row add up; the last one has the row's part of the bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.errors import ConfigError, UsageError
from deepspeed.zero.gathered import GatheredParameters
from deepspeed.zero.leaf_modules import set_z3_leaf_module
from deepspeed.zero.slot import slot_of


class TiledLinear(nn.Module):
    """A linear layer of ``in_splits * out_splits`` tiles, equal to the whole one in result and gradients.

    Args:
        in_features: size of the input's last dimension.
        out_features: size of the output's last dimension.
        bias: whether to add a bias.
        in_splits: parts of the input; the first parts are one larger where it does not divide.
        out_splits: parts of the output; likewise.
        input_is_already_split: forward takes the list of `in_splits` tensors instead of one.
        combine_out_splits: forward returns one tensor; False: the list of `out_splits` of them.
        linear_cls: makes a tile: ``linear_cls(in_features, out_features, bias=..., **kwargs)``.
        init_linear: a whole layer to take the values from.
        kwargs: further arguments of `linear_cls`.

    Attributes:
        linears: the tiles, ``linears[out][in]``.
        in_parts: where the parts of the input begin, and the end.
        out_parts: likewise of the output.

    Raises:
        ConfigError: a number of parts below 1 or above the features.
        UsageError: `init_linear` has other sizes.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        in_splits: int = 1,
        out_splits: int = 1,
        input_is_already_split: bool = False,
        combine_out_splits: bool = True,
        linear_cls: Callable[..., nn.Module] = nn.Linear,
        init_linear: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.in_splits, self.out_splits = in_splits, out_splits
        self.input_is_already_split = input_is_already_split
        self.combine_out_splits = combine_out_splits
        self.in_parts = _bounds("in_splits", in_features, in_splits)
        self.out_parts = _bounds("out_splits", out_features, out_splits)
        self.linears = nn.ModuleList(
            nn.ModuleList(
                linear_cls(cols, rows, bias=bias and index == in_splits - 1, **kwargs)
                for index, cols in enumerate(_sizes(self.in_parts))
            )
            for rows in _sizes(self.out_parts)
        )
        for tile in self._tiles():
            set_z3_leaf_module(tile)
        if init_linear is not None:
            self.copy_params_from(init_linear)
        elif in_splits > 1 and getattr(linear_cls, "reset_parameters", None) is nn.Linear.reset_parameters:
            self._scale_to_whole()

    def forward(self, input_: Tensor | Sequence[Tensor]) -> Any:
        """Apply the layer to [..., in_features], or to its parts where they come split."""
        inputs = self._split(input_)
        rows = [
            self._add([tile(part) for tile, part in zip(row, inputs, strict=True)]) for row in self._rows()
        ]
        return self._join(rows) if self.combine_out_splits else rows

    @torch.no_grad()
    def copy_params_from(self, other: nn.Module) -> None:
        """Take the values of a whole layer; either may be sharded, then all ranks call it.

        Raises:
            UsageError: `other` has other sizes, or only one of the two has a bias.
        """
        whole: Any = other
        self._check_like(whole)
        with GatheredParameters(list(other.parameters())):
            for row, (top, bottom) in zip(self._rows(), pairwise(self.out_parts), strict=True):
                for tile, (left, right) in zip(row, pairwise(self.in_parts), strict=True):
                    with _changing(tile):
                        tile.weight.copy_(whole.weight[top:bottom, left:right])
                        if tile.bias is not None:
                            tile.bias.copy_(whole.bias[top:bottom])

    def extra_repr(self) -> str:
        """Name the sizes and the tiles."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.use_bias}, "
            f"in_splits={self.in_splits}, out_splits={self.out_splits}"
        )

    def _rows(self) -> Iterator[Any]:
        yield from self.linears

    def _tiles(self) -> Iterator[Any]:
        for row in self._rows():
            yield from row

    @torch.no_grad()
    def _scale_to_whole(self) -> None:
        """Bring initial values from the scale of a layer with few inputs to that of the whole one."""
        for tile in self._tiles():
            with _changing(tile):
                for param in tile.parameters():
                    param.mul_((tile.in_features / self.in_features) ** 0.5)

    def _split(self, input_: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
        sizes = _sizes(self.in_parts)
        if isinstance(input_, Tensor):
            expected, got = [self.in_features], [input_.shape[-1]]
        else:
            expected, got = sizes, [part.shape[-1] for part in input_]
        if isinstance(input_, Tensor) is self.input_is_already_split or expected != got:
            form = f"{len(sizes)} tensors of {sizes}" if self.input_is_already_split else f"one of {expected}"
            raise UsageError(
                f"TiledLinear.forward: expected {form} features (input_is_already_split="
                f"{self.input_is_already_split}), got {len(got)} of {got}; split the input as in_parts says, or not"
            )
        return input_.split(sizes, dim=-1) if isinstance(input_, Tensor) else input_

    def _check_like(self, other: Any) -> None:
        expected, bias = (self.out_features, self.in_features), getattr(other, "bias", None)
        got = tuple(getattr(getattr(other, "weight", None), "shape", ()))
        if got != expected or (bias is not None) is not self.use_bias:
            raise UsageError(
                f"TiledLinear.copy_params_from: expected a layer with a weight of shape {expected} and "
                f"bias={self.use_bias}, got {got} and bias={bias is not None}; copy from a layer of the same sizes"
            )

    def _add(self, partial: list[Any]) -> Any:
        """Add up what the tiles of a row give."""
        total = partial[0]
        for one in partial[1:]:
            total = total + one
        return total

    def _join(self, rows: list[Any]) -> Any:
        """Put the parts of the output side by side."""
        return torch.cat(rows, dim=-1)


class TiledLinearReturnBias(TiledLinear):
    """TiledLinear of layers that return ``(output, bias)`` and leave adding the bias to the caller.

    Forward returns such a pair too (bias None where there is none), or the list of one for each output part.
    """

    def _add(self, partial: list[Any]) -> Any:
        biases = [bias for _, bias in partial if bias is not None]
        return super()._add([out for out, _ in partial]), super()._add(biases) if biases else None

    def _join(self, rows: list[Any]) -> Any:
        biases = [bias for _, bias in rows if bias is not None]
        return super()._join([out for out, _ in rows]), super()._join(biases) if biases else None


def _bounds(name: str, features: int, splits: int) -> list[int]:
    """Return where the parts of `features` begin, and the end."""
    if not 1 <= splits <= features:
        raise ConfigError(
            f"TiledLinear: {name}: expected 1 to {features}, the features that are split, got {splits}"
        )
    size, larger = divmod(features, splits)
    return [index * size + min(index, larger) for index in range(splits + 1)]


def _sizes(bounds: list[int]) -> list[int]:
    return [stop - start for start, stop in pairwise(bounds)]


@contextmanager
def _changing(tile: nn.Module) -> Iterator[None]:
    """Change a tile's parameters inside; where they are sharded the first rank's values count."""
    params = list(tile.parameters())
    slot = slot_of(params[0])
    first = None if slot is None else slot.unit.sharding.everyone.first_rank
    with GatheredParameters(params, modifier_rank=first):
        yield
