"""The process grid's arithmetic, checked against the picture in its docstring."""

import pytest

from deepspeed.errors import ConfigError, UsageError
from deepspeed.parallel import PipeDataParallelTopology, PipeModelDataParallelTopology, ProcessTopology


def test_the_last_axis_varies_fastest():
    grid = ProcessTopology(["row", "col"], [2, 3])
    assert [[grid.get_rank(row=row, col=col) for col in range(3)] for row in range(2)] == [
        [0, 1, 2],
        [3, 4, 5],
    ]
    assert grid.world_size() == 6
    assert grid.get_axis_names() == ["row", "col"]
    assert (grid.get_dim("row"), grid.get_dim("col"), grid.get_dim("depth")) == (2, 3, 0)
    assert str(grid) == "ProcessTopology(axes=['row', 'col'], dims=[2, 3])"


def test_coordinates_and_ranks_are_inverse():
    grid = PipeModelDataParallelTopology(num_pp=2, num_mp=3, num_dp=2)
    for rank in range(grid.world_size()):
        assert grid.get_rank(**grid.get_coord(rank)._asdict()) == rank
    assert grid.get_coord(7) == (1, 0, 1)
    assert grid.get_coord(7).model == 1


def test_groups_differ_on_one_axis_only():
    grid = PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=2)
    assert grid.get_axis_comm_lists("pipe") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert grid.get_axis_comm_lists("data") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert grid.get_axis_comm_lists("model") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert grid.get_axis_comm_lists("expert") == []


def test_ranks_are_found_by_coordinates():
    grid = PipeDataParallelTopology(num_pp=2, num_dp=3)
    assert grid.get_axis_list("pipe", 1) == [3, 4, 5]
    assert grid.filter_match(pipe=0, data=2) == [2]
    assert grid.filter_match() == list(range(6))


def test_file_names_leave_out_the_data_and_pipe_axes():
    grid = PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=1)
    assert grid.get_rank_repr(3) == "model_01"
    assert grid.get_rank_repr(3, omit_axes=["data"]) == "pipe_01-model_01"


def test_wrong_questions_are_answered_in_a_sentence():
    grid = ProcessTopology(["row", "col"], [2, 3])
    with pytest.raises(UsageError, match="get_rank: expected col from 0 to 2, got 3"):
        grid.get_rank(row=0, col=3)
    with pytest.raises(UsageError, match="expected a coordinate for each"):
        grid.get_rank(row=0)
    with pytest.raises(UsageError, match="expected a rank from 0 to 5, got 6"):
        grid.get_coord(6)
    with pytest.raises(ConfigError, match="dims"):
        ProcessTopology(["row"], [0])
    with pytest.raises(ConfigError, match="axes"):
        ProcessTopology(["row", "row"], [1, 1])
