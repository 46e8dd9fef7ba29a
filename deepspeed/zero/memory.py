"""Memory of a flat that comes and goes while tensors share it.

Note [Memory that comes and goes]
Where a unit is released between uses, the storage of its flat is resized to nothing and back. The parameters
stay views of it and keep their shapes, and so do the views that autograd has saved: gathering the unit again
brings all of them back to life. What reads a released view would read freed memory, so nothing may: a
released parameter is of a class that says so (released.py), and what autograd saved is handed out only after
its unit was gathered (gatherer.py).

Note [Kept views]
Python can keep a view that neither knows of: ``self.cache = self.weight.t()``, ``[p.data for p in params]``. A
storage counts its tensors, so a release sees that there are more than it knows of; the memory stays then, with
the values of that moment, until a later release finds the view gone. ``param.numpy()`` forbids the storage to be
resized ever again; the memory then stays for good, and gathers fill it anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepspeed.zero.meter import GatherMeter


class FlatMemory:
    """The storage of a flat.

    Args:
        flat: the tensor, whose memory is there.
        meter: counts what is there.

    Attributes:
        guarded: how many tensors share the storage, beside those there were at first, that nobody reads while it
            is gone.
    """

    def __init__(self, flat: Tensor, meter: GatherMeter) -> None:
        self._flat, self._meter = flat, meter
        self._storage = flat.untyped_storage()
        self._first = self._owners
        self.guarded = 0

    @property
    def key(self) -> int:
        """What identifies the storage among others."""
        return int(self._storage._cdata)

    @property
    def is_viewed(self) -> bool:
        """Whether somebody keeps, or has lent to numpy, a view that is not guarded. See note [Kept views]."""
        return self._owners > self._first + self.guarded or not self._storage.resizable()

    @property
    def _owners(self) -> int:
        return int(torch._C._storage_Use_Count(self._storage._cdata))

    def bring(self) -> None:
        """Make the memory be there, with any values."""
        if self._storage.nbytes() == 0:
            self._storage.resize_(self._flat.numel() * self._flat.element_size())
            self._meter.gathered(self._flat.numel(), self._flat.element_size())

    def free(self) -> None:
        """Give the memory back, unless somebody can still read it."""
        if self._storage.nbytes() > 0 and not self.is_viewed:
            self._storage.resize_(0)
            self._meter.released(self._flat.numel(), self._flat.element_size())
