"""Named streams of random numbers on the device, so that model-parallel ranks can draw alike or differently."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from deepspeed.accelerator import get_accelerator
from deepspeed.errors import UsageError

MODEL_PARALLEL = "model-parallel-rng"


def set_device_state(new_state: Tensor, device: int = -1) -> None:
    """Put the device's generator into a state; -1 is the current device."""
    get_accelerator().set_rng_state(new_state, None if device == -1 else device)


@contextmanager
def device_at(state: Tensor) -> Iterator[None]:
    """Let the device draw from `state` inside the context, and go on as before after it."""
    before = get_accelerator().get_rng_state()
    get_accelerator().set_rng_state(state)
    try:
        yield
    finally:
        get_accelerator().set_rng_state(before)


class CudaRNGStatesTracker:
    """States of the device's generator by name; inside `fork` the device draws from one of them.

    Attributes:
        states_: the states, byte tensors.
        seeds_: the seeds they started from.
    """

    def __init__(self) -> None:
        self.states_: dict[str, Tensor] = {}
        self.seeds_: set[int] = set()

    def reset(self) -> None:
        """Forget all streams."""
        self.states_ = {}
        self.seeds_ = set()

    def get_states(self) -> dict[str, Tensor]:
        """Return a copy of the states by name."""
        return dict(self.states_)

    def set_states(self, states: dict[str, Tensor]) -> None:
        """Replace all states by those that `get_states` returned."""
        self.states_ = dict(states)

    def add(self, name: str, seed: int) -> None:
        """Start a stream from `seed`; both must be new."""
        if seed in self.seeds_ or name in self.states_:
            taken = f"seed {seed}" if seed in self.seeds_ else f"name {name!r}"
            raise UsageError(f"add: expected a new name and a new seed, got the {taken} again; reset() first")
        accelerator = get_accelerator()
        with device_at(accelerator.get_rng_state()):
            accelerator.manual_seed(seed)
            self.states_[name] = accelerator.get_rng_state()
        self.seeds_.add(seed)

    @contextmanager
    def fork(self, name: str = MODEL_PARALLEL) -> Iterator[None]:
        """Draw from the stream `name` inside the context; the device goes on as before after it."""
        if name not in self.states_:
            raise UsageError(
                f"fork: expected one of the streams {sorted(self.states_)}, got {name!r}; "
                "start it with add() or model_parallel_cuda_manual_seed()"
            )
        with device_at(self.states_[name]):
            try:
                yield
            finally:
                self.states_[name] = get_accelerator().get_rng_state()

    @contextmanager
    def replayed(self, states: dict[str, Tensor]) -> Iterator[None]:
        """Let every stream go on from `states` inside the context, and from where it was after it."""
        before = self.get_states()
        self.set_states(states)
        try:
            yield
        finally:
            self.set_states(before)
