"""Seeds and generator states of the device."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from deepspeed.accelerator.devices import Devices


class Random(Devices):
    """The device's random numbers; on the CPU torch's default generator."""

    @property
    def _source(self) -> Any:
        return torch if self.on_host else self.module

    def random(self) -> ModuleType:
        """Return torch's module of random functions."""
        return torch.random

    def get_rng_state(self, device_index: int | None = None) -> torch.Tensor:
        """Return the generator's state, a byte tensor."""
        state = self._source.get_rng_state(*self._where(device_index))
        assert isinstance(state, torch.Tensor)
        return state

    def set_rng_state(self, new_state: torch.Tensor, device_index: int | None = None) -> None:
        """Put the generator into a state that `get_rng_state` returned."""
        self._source.set_rng_state(new_state, *self._where(device_index))

    def manual_seed(self, seed: int) -> None:
        """Seed the current device."""
        self._source.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        """Seed every device."""
        getattr(self._source, "manual_seed_all", self._source.manual_seed)(seed)

    def initial_seed(self) -> int:
        """Return the seed the current device started from."""
        return int(self._source.initial_seed())

    def default_generator(self, device_index: int = 0) -> torch.Generator:
        """Return the device's default generator."""
        generators = getattr(self.module, "default_generators", None)
        return torch.default_generator if not generators else generators[device_index]

    def _where(self, device_index: int | None) -> tuple[int, ...]:
        return () if self.on_host or device_index is None else (device_index,)
