"""The data loader of a rank: every rank sees its own part of each epoch, and each epoch another order.

    map-style dataset   torch's DistributedSampler: shuffled from `seed` and the epoch, the same on all ranks
    iterable dataset    rank r takes items r, r + world, r + 2 * world, ... of the stream
    sampler given       used as it is; its owner decides what each rank sees

Note [Last batch]
A rank's last batch may be smaller than `batch_size`, unless `drop_last`. Every rank yields equally many
batches: a map-style dataset that the ranks do not divide is filled up with items from its beginning, or cut
with `drop_last`; of an iterable one the last items that do not make a whole round of the ranks are left out.

Note [Position]
What was read of an epoch is a number of samples over all ranks: the ranks take turns, so any number of ranks can
go on from there (`state_dict`). It counts batches that were handed out, not what workers have read ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, get_worker_info

from deepspeed.errors import ConfigError


class DeepSpeedDataLoader:
    """Load this rank's batches; each ``iter()`` begins the next epoch, or goes on in one that was loaded.

    Args:
        dataset: map-style, or iterable. An iterable dataset that shards itself (it has a true attribute
            ``handles_sharding``) is read as it comes.
        batch_size: samples per batch of this rank (the micro-batch).
        collate_fn: how samples become a batch; torch's default if None.
        num_workers: loading processes of this rank.
        drop_last: see note [Last batch].
        rank, world_size: place among the data-parallel ranks; those of torch.distributed if None.
        seed: of the shuffling.
        sampler: replaces the sampling by rank.
        pin_memory: put batches into page-locked memory.
        shuffle: whether epochs are in random order (map-style datasets).
        data_sampler, num_local_io_workers: the original's names of `sampler` and `num_workers`.

    `epoch` is the epoch that the next ``iter()`` begins. Raises ConfigError for a batch size below 1.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        collate_fn: Callable[..., Any] | None = None,
        num_workers: int = 0,
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        seed: int = 0,
        sampler: Any = None,
        pin_memory: bool = False,
        shuffle: bool = True,
        data_sampler: Any = None,
        num_local_io_workers: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size: expected at least 1, got {batch_size}")
        sampler = sampler if sampler is not None else data_sampler
        self.dataset = dataset
        self.batch_size = batch_size
        self.epoch = 0
        started = dist.is_initialized()
        place = (
            rank if rank is not None else (dist.get_rank() if started else 0),
            world_size if world_size is not None else (dist.get_world_size() if started else 1),
        )
        source = dataset
        if isinstance(dataset, IterableDataset):
            source = dataset if getattr(dataset, "handles_sharding", False) else RankStream(dataset, *place)
        elif sampler is None:
            sampler = EpochSampler(
                dataset, place[1], place[0], shuffle=shuffle, seed=seed, drop_last=drop_last
            )
        self._world_size = place[1]
        self._taken = 0  # samples of this epoch, over all ranks
        self._resumed: dict[str, int] | None = None
        self._source = source
        self.sampler = self.data_sampler = sampler
        self.dataloader: DataLoader[Any] = DataLoader(
            source,
            batch_size,
            sampler=sampler,
            collate_fn=collate_fn,
            num_workers=num_workers if num_local_io_workers is None else num_local_io_workers,
            drop_last=drop_last,
            pin_memory=pin_memory,
        )

    def __len__(self) -> int:
        """Return the number of batches in an epoch; a stream without a length has none (TypeError)."""
        return len(self.dataloader)

    def __iter__(self) -> Iterator[Any]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        return self._batches(epoch)

    def _batches(self, epoch: int) -> Iterator[Any]:
        start = self._begin(epoch)
        batches = iter(self.dataloader)
        if start and self._seekable is None:
            for _ in range(start // (self.batch_size * self._world_size)):
                next(batches, None)
        for batch in batches:
            self._taken += self.batch_size * self._world_size
            yield batch
        self._taken = 0
        if self._seekable is not None:
            self._seekable.start = 0

    def _begin(self, epoch: int) -> int:
        """Set sampler and dataset to where the epoch begins, or goes on; return how many samples were taken."""
        resumed, self._resumed = self._resumed, None
        if resumed is not None:
            epoch, self.epoch = resumed["epoch"], resumed["epoch"] + 1
        self._taken = 0 if resumed is None else resumed["samples"]
        for part in (self.sampler, self.dataset):
            set_epoch = getattr(part, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)
        if self._seekable is not None:
            self._seekable.start = self._taken
        return self._taken

    @property
    def _seekable(self) -> EpochSampler | RankStream | None:
        """What can begin in the middle of an epoch; batches of others are read and left."""
        found = self._source if isinstance(self._source, RankStream) else self.sampler
        return found if isinstance(found, (RankStream, EpochSampler)) else None

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and how many of its samples all ranks together have taken. See note [Position]."""
        if self._resumed is not None:
            return dict(self._resumed)
        running = self.epoch - 1 if self._taken else self.epoch
        seekable = self._seekable
        if isinstance(seekable, EpochSampler) and self._taken >= seekable.whole_size:
            return {"epoch": running + 1, "samples": 0}
        return {"epoch": running, "samples": self._taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next batches be those that would have followed; an iteration that has begun is not changed."""
        self._resumed = dict(state)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next ``iter()`` begins."""
        if self._resumed is None or self._resumed["epoch"] != epoch:
            self._resumed = None
        self.epoch = epoch


class EpochSampler(DistributedSampler[Any]):
    """Deal an epoch's samples out to the ranks in turn, those before `start` left out.

    Attributes:
        start: samples that all ranks together have taken already.
    """

    start = 0

    @property
    def whole_size(self) -> int:
        """Samples of an epoch over all ranks."""
        return self._size(0)

    def _size(self, start: int) -> int:
        count = max(0, len(self.dataset) - start)  # type: ignore[arg-type]
        return (
            (count if self.drop_last else count + self.num_replicas - 1)
            // self.num_replicas
            * self.num_replicas
        )

    def __iter__(self) -> Iterator[int]:
        count = len(self.dataset)  # type: ignore[arg-type]
        order = list(range(count))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(count, generator=generator).tolist()
        size, rest = self._size(self.start), order[self.start :]
        while rest and len(rest) < size:
            rest += order[: size - len(rest)]
        return iter(rest[self.rank : size : self.num_replicas])

    def __len__(self) -> int:
        return self._size(self.start) // self.num_replicas


class RankStream(IterableDataset[Any]):
    """One rank's items of a stream, in whole rounds: every rank gets equally many.

    With loading processes, whole rounds are dealt out among them in turn.
    """

    def __init__(self, stream: Dataset[Any], rank: int, world_size: int) -> None:
        self.stream: Iterable[Any] = stream  # type: ignore[assignment]
        self.rank = rank
        self.world_size = world_size
        self.start = 0  # items that all ranks together have taken already

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        items = islice(iter(self.stream), self.start, None)
        index = 0
        while len(round_ := list(islice(items, self.world_size))) == self.world_size:
            if index % workers == worker:
                yield round_[self.rank]
            index += 1

    def __len__(self) -> int:
        return len(self.stream) // self.world_size  # type: ignore[arg-type]
