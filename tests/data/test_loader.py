"""Every rank sees its own part of each epoch, and together the ranks see all of it."""

import pytest
import torch
from harness import on_ranks
from torch.utils.data import IterableDataset, SequentialSampler

from deepspeed.data import DeepSpeedDataLoader, RepeatingLoader
from deepspeed.errors import ConfigError, UsageError


class Numbers(torch.utils.data.Dataset):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index >= self.count:
            raise IndexError
        return index


class Stream(IterableDataset):
    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return iter(range(self.count))


class SizedStream(Stream):
    def __len__(self):
        return self.count


class OwnSharding(Stream):
    handles_sharding = True
    epochs: tuple = ()

    def set_epoch(self, epoch):
        self.epochs += (epoch,)


def epochs(loader, count=1):
    return [[batch.tolist() for batch in loader] for _ in range(count)]


def flat(batches):
    return [item for batch in batches for item in batch]


def of_ranks(dataset, world, **options):
    return [DeepSpeedDataLoader(dataset, 2, rank=rank, world_size=world, **options) for rank in range(world)]


def test_ranks_share_an_epoch_without_overlap():
    parts = [flat(epochs(loader)[0]) for loader in of_ranks(Numbers(12), 3)]
    assert sorted(flat(parts)) == list(range(12))
    assert [len(part) for part in parts] == [4, 4, 4]


def test_each_epoch_has_another_order_and_a_seed_repeats_all_of_them():
    first, second = epochs(DeepSpeedDataLoader(Numbers(16), 4, seed=3), 2)
    assert sorted(flat(first)) == sorted(flat(second))
    assert first != second
    assert epochs(DeepSpeedDataLoader(Numbers(16), 4, seed=3), 2) == [first, second]
    assert epochs(DeepSpeedDataLoader(Numbers(16), 4, seed=4))[0] != first


def test_an_epoch_can_be_chosen():
    loader = DeepSpeedDataLoader(Numbers(16), 4)
    _, second = epochs(loader, 2)
    assert loader.epoch == 2
    loader.set_epoch(1)
    assert epochs(loader) == [second]


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [2, 2]), (True, [2])])
def test_ranks_always_have_equally_many_batches(drop_last, sizes):
    for loader in of_ranks(Numbers(7), 2, drop_last=drop_last):
        batches = epochs(loader)[0]
        assert [len(batch) for batch in batches] == sizes
        assert len(loader) == len(sizes)


def test_the_last_batch_may_be_smaller():
    loader = DeepSpeedDataLoader(Numbers(5), 2, shuffle=False)
    assert epochs(loader) == [[[0, 1], [2, 3], [4]]]
    assert loader.batch_size == 2


@pytest.mark.parametrize("name", ["sampler", "data_sampler"])
def test_a_given_sampler_is_used_as_it_is(name):
    data = Numbers(4)
    loader = DeepSpeedDataLoader(data, 2, rank=1, world_size=2, **{name: SequentialSampler(data)})
    assert epochs(loader) == [[[0, 1], [2, 3]]]


def test_collate_fn_makes_the_batches():
    loader = DeepSpeedDataLoader(
        Numbers(4), 2, shuffle=False, collate_fn=lambda items: torch.tensor(items) * 10
    )
    assert epochs(loader) == [[[0, 10], [20, 30]]]


def test_a_stream_is_dealt_out_in_whole_rounds():
    parts = [flat(epochs(loader)[0]) for loader in of_ranks(Stream(8), 3)]
    assert parts == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("workers", [1, 2])
def test_loading_processes_read_every_item_once(workers):
    loader = DeepSpeedDataLoader(Stream(12), 2, rank=1, world_size=2, num_local_io_workers=workers)
    assert sorted(flat(epochs(loader)[0])) == [1, 3, 5, 7, 9, 11]


def test_a_streams_length_is_this_ranks():
    assert len(DeepSpeedDataLoader(SizedStream(9), 2, rank=0, world_size=2)) == 2
    with pytest.raises(TypeError):
        len(DeepSpeedDataLoader(Stream(9), 2))


def test_a_stream_that_shards_itself_is_read_as_it_comes():
    stream = OwnSharding(4)
    loader = DeepSpeedDataLoader(stream, 2, rank=1, world_size=2)
    assert epochs(loader, 2) == [[[0, 1], [2, 3]]] * 2
    assert stream.epochs == (0, 1)


@on_ranks(2)
def test_ranks_come_from_torch_distributed():
    seen = torch.zeros(6)
    for batch in DeepSpeedDataLoader(Numbers(6), 2):
        seen[batch] += 1
    torch.distributed.all_reduce(seen)
    assert seen.tolist() == [1] * 6


def test_a_batch_needs_samples():
    with pytest.raises(ConfigError, match="batch_size: expected at least 1, got 0"):
        DeepSpeedDataLoader(Numbers(4), 0)


def test_a_repeating_loader_goes_on_into_the_next_epoch():
    loader = RepeatingLoader(DeepSpeedDataLoader(Numbers(4), 2))
    batches = [next(loader).tolist() for _ in range(6)]
    reference = DeepSpeedDataLoader(Numbers(4), 2)
    assert batches == flat(epochs(reference, 3))
    assert len(loader) == 2
    assert iter(loader) is loader


def test_an_empty_or_used_up_loader_is_explained():
    with pytest.raises(UsageError, match="RepeatingLoader: expected a loader that can be iterated again"):
        next(RepeatingLoader([]))
    once = RepeatingLoader(iter([1]))
    assert next(once) == 1
    with pytest.raises(UsageError, match="not a generator"):
        next(once)


def taken(loaders, batches):
    """Take batches in turn from the loaders of all ranks; return the samples of each round, sorted."""
    iterators = [iter(loader) for loader in loaders]
    return [sorted(item for one in iterators for item in next(one).tolist()) for _ in range(batches)]


@pytest.mark.parametrize("data", [Numbers(28), Stream(28)], ids=["map", "stream"])
@pytest.mark.parametrize("worlds", [(2, 2), (2, 1), (1, 3), (3, 2)], ids=str)
def test_an_epoch_goes_on_where_it_stopped_on_any_number_of_ranks(data, worlds):
    whole = [item for batch in DeepSpeedDataLoader(data, 1, rank=0, world_size=1) for item in batch.tolist()]
    before = of_ranks(data, worlds[0])
    first = taken(before, 2)
    after = of_ranks(data, worlds[1])
    for loader in after:
        loader.load_state_dict(before[0].state_dict())
    rest = [flat(epochs(loader)[0]) for loader in after]
    assert sorted(flat(first) + flat(rest)) == sorted(whole)
    assert sorted(flat(first)) == sorted(whole[: len(flat(first))])
    assert [loader.epoch for loader in after] == [1] * worlds[1]


def test_the_position_counts_what_was_handed_out_and_a_finished_epoch_is_not_gone_on_with():
    loader = DeepSpeedDataLoader(Numbers(6), 2, num_workers=1)
    assert loader.state_dict() == {"epoch": 0, "samples": 0}
    batches = iter(loader)
    next(batches)
    assert loader.state_dict() == {"epoch": 0, "samples": 2}
    next(batches)
    next(batches)
    assert loader.state_dict() == {"epoch": 1, "samples": 0}
    assert list(batches) == []
    assert loader.state_dict() == {"epoch": 1, "samples": 0}


def test_a_repeating_loader_goes_on_too():
    loader = DeepSpeedDataLoader(Numbers(8), 2, seed=5)
    first, second = epochs(DeepSpeedDataLoader(Numbers(8), 2, seed=5), 2)
    repeating = RepeatingLoader(loader)
    loader.load_state_dict({"epoch": 0, "samples": 4})
    assert [next(repeating).tolist() for _ in range(6)] == first[2:] + second


def test_a_sampler_of_the_user_s_is_read_up_to_the_position():
    loader = DeepSpeedDataLoader(Numbers(8), 2, sampler=SequentialSampler(Numbers(8)))
    loader.load_state_dict({"epoch": 0, "samples": 4})
    assert epochs(loader) == [[[4, 5], [6, 7]]]
