"""The log of collectives counts what was asked for, and nothing while it is off."""

import logging
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from harness import on_ranks

from deepspeed import comm
from deepspeed.comm.log import CommsLogger, bus_factor, comms_logger
from deepspeed.common.logging import logger
from deepspeed.errors import ConfigError


def begin(**settings):
    comms_logger.reset()
    comm.configure(
        **{"enabled": True, "prof_all": True, "prof_ops": [], "verbose": False, "debug": False} | settings
    )


@on_ranks(2)
def test_every_call_is_counted_under_its_name_and_size():
    begin()
    for _ in range(3):
        comm.all_reduce(torch.ones(4))
    comm.all_gather_single(torch.empty(8), torch.ones(4))
    work = comm.reduce_scatter_single(torch.empty(4), torch.ones(8), async_op=True)
    assert ("reduce_scatter_single", 32) not in comms_logger.tallies
    assert isinstance(work, dist.Work)
    work.wait()
    work.wait()
    assert work.is_completed()
    comm.configure(enabled=False)
    comm.all_reduce(torch.ones(4))
    counts = {key: tally.count for key, tally in comms_logger.tallies.items()}
    assert counts == {("all_reduce", 16): 3, ("all_gather_single", 32): 1, ("reduce_scatter_single", 32): 1}


@on_ranks(2)
def test_only_the_named_operations_are_counted():
    begin(prof_all=False, prof_ops=["all_gather"])
    comm.all_reduce(torch.ones(4))
    comm.all_gather_single(torch.empty(8), torch.ones(4))
    comm.configure(enabled=False)
    assert list(comms_logger.tallies) == [("all_gather_single", 32)]


def test_operations_may_be_named_as_torch_named_them_before():
    log = CommsLogger()
    log.configure(prof_all=False, prof_ops=["reduce_scatter_tensor", "all_gather_into_tensor"])
    assert log.watches("reduce_scatter_single")
    assert log.watches("all_gather_single")
    assert not log.watches("all_reduce")


@on_ranks(2)
def test_stragglers_are_found_with_all_ranks():
    begin()
    comm.all_reduce(torch.ones(4))
    comm.configure(enabled=False)
    comm.log_summary(show_straggler=True)


def test_the_table_shows_bandwidths_from_bytes_and_time(capsys):
    log = CommsLogger()
    log.record("all_reduce", 2 * 10**9, 1.0, world=4, caller="")
    log.record("all_reduce", 2 * 10**9, 3.0, world=4, caller="")
    row = log.table({("all_reduce", 2 * 10**9): 0.5}).splitlines()[1].split()
    assert row == ["all_reduce", "1907.35", "MB", "2", "4000.00", "2000.000", "1.00", "1.50", "500.00"]
    comms_logger.reset()
    comm.log_summary()
    assert "busbw" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("op", "factor"),
    [("all_reduce", 1.5), ("all_gather_single", 0.75), ("reduce_scatter", 0.75), ("broadcast", 1.0)],
)
def test_bus_bandwidth_counts_what_the_links_carry(op, factor):
    assert bus_factor(op, 4) == factor


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def test_verbose_logs_a_line_per_call_and_debug_its_caller():
    log, seen = CommsLogger(), Lines()
    logger.addHandler(seen)
    try:
        log.configure(verbose=True)
        log.record("broadcast", 8, 0.001, 2, "train")
        log.configure(debug=True)
        log.record("broadcast", 8, 0.001, 2, "train")
    finally:
        logger.removeHandler(seen)
    assert seen.lines[0] == "comm broadcast | 8 bytes | 1.000 ms | 0.00 GB/s"
    assert seen.lines[1].endswith("from train")


@pytest.mark.parametrize("as_dict", [True, False])
def test_configure_reads_a_config_section(as_dict):
    section = {"enabled": True, "prof_all": False, "prof_ops": ["send"], "verbose": True, "debug": True}
    config = (
        {"comms_logger": section} if as_dict else SimpleNamespace(comms_logger=SimpleNamespace(**section))
    )
    try:
        comm.configure(config)
        assert comms_logger.enabled
        assert comms_logger.verbose
        assert comms_logger.debug
        assert comms_logger.watches("send")
        assert not comms_logger.watches("recv")
    finally:
        begin(enabled=False)


def test_an_operation_that_does_not_exist_is_named_with_the_nearest():
    with pytest.raises(
        ConfigError, match=r"prof_ops: expected names .*, got 'all_redcue' \(did you mean 'all_reduce'"
    ):
        begin(prof_all=False, prof_ops=["all_redcue"])
