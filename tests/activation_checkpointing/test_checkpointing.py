"""`deepspeed.checkpointing`: the same gradients, to the bit, with every way of keeping inputs."""

import gc
import json
import weakref

import pytest
import torch
from layers import LAYERS, WIDTH, Stack, assert_same, batch, gradients_of
from torch import nn

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.accelerator.accelerator import Accelerator, set_accelerator
from deepspeed.activation_checkpointing import checkpointing
from deepspeed.config import load_config
from deepspeed.errors import ConfigError, UsageError

CONTIGUOUS = {"contiguous_checkpointing": True, "num_checkpoints": LAYERS}
WAYS = {
    "plain": {},
    "host": {"checkpoint_in_cpu": True},
    "contiguous": CONTIGUOUS,
    "contiguous on host": {**CONTIGUOUS, "checkpoint_in_cpu": True},
    "partition without an mpu": {"partition_activations": True},
    "synchronize": {"synchronize": True},
    "everything": {
        **CONTIGUOUS,
        "partition_activations": True,
        "checkpoint_in_cpu": True,
        "synchronize": True,
        "profile": True,
    },
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tracked", [False, True])
def test_gradients_are_those_of_plain_pytorch(way, tracked):
    expected = gradients_of(Stack())
    if tracked:
        checkpointing.model_parallel_cuda_manual_seed(5)
    checkpointing.configure(None, **WAYS[way])
    model = Stack(checkpointing.checkpoint)
    for _ in range(3):
        assert_same(gradients_of(model), expected)
    assert_same(gradients_of(model, keep=True), expected)


@pytest.mark.parametrize("way", WAYS)
def test_checkpoints_inside_checkpoints(way):
    checkpointing.configure(None, **{**WAYS[way], "num_checkpoints": LAYERS + 1})

    def nested(layer, *args):
        return checkpointing.checkpoint(lambda *inner: checkpointing.checkpoint(layer, *inner), *args)

    assert_same(gradients_of(Stack(nested)), gradients_of(Stack()))


@pytest.mark.parametrize("way", ["contiguous", "contiguous on host"])
def test_inputs_are_given_up_where_a_copy_is_kept(way):
    def alive(model):
        loss = model(batch(1))
        found = sum(not storage.expired() for storage in model.storages)
        loss.backward()
        return found

    model = Stack(checkpointing.checkpoint)
    assert alive(model) == LAYERS
    checkpointing.configure(None, **WAYS[way])
    assert alive(model) == 0


def test_every_input_goes_through_host_memory_as_torch_does_it():
    checkpointing.configure(None, checkpoint_in_cpu=True)
    (store,) = checkpointing._settings.stores
    hooks, moved = store._hooks, []

    def pack(tensor, pack_to_cpu=hooks.pack_hook):
        moved.append(tensor.numel())
        return pack_to_cpu(tensor)

    hooks.pack_hook = pack
    gradients_of(Stack(checkpointing.checkpoint))
    assert moved == [5 * WIDTH, WIDTH] * LAYERS


def test_only_what_is_inside_is_recomputed():
    calls = []

    def layer(hidden):
        calls.append(torch.is_grad_enabled())
        return hidden.sin()

    hidden = torch.ones(2, requires_grad=True)
    checkpointing.checkpoint(layer, hidden).sum().backward()
    assert len(calls) == 2
    with torch.no_grad():
        checkpointing.checkpoint(layer, hidden)
    assert calls[2:] == [False]


def test_outputs_are_whatever_the_function_returns():
    hidden = torch.ones(2, requires_grad=True)
    outputs = checkpointing.checkpoint(lambda x: {"twice": 2 * x, "rest": ["a", None]}, hidden)
    assert outputs["rest"] == ["a", None]
    outputs["twice"].sum().backward()
    assert hidden.grad.tolist() == [2.0, 2.0]


def test_parameters_train_though_no_input_needs_a_gradient():
    layer = nn.Linear(3, 3)
    checkpointing.configure(None, **CONTIGUOUS)
    checkpointing.checkpoint(layer, torch.ones(2, 3)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((3,), 2.0))


def test_parameters_among_the_arguments_are_not_copied():
    checkpointing.configure(None, **{**CONTIGUOUS, "num_checkpoints": 1})
    weights = [nn.Parameter(torch.randn(4, 4)) for _ in range(3)]
    loss = sum(checkpointing.checkpoint(lambda w: w.square().sum(), weight) for weight in weights)
    loss.backward()
    assert all(torch.equal(weight.grad, 2 * weight) for weight in weights)


@pytest.mark.parametrize("way", WAYS)
def test_inputs_with_holes_overlaps_and_other_orders_come_back(way):
    checkpointing.configure(None, **WAYS[way])
    for make in (
        lambda x: x.t(),
        lambda x: x[:, ::2],
        lambda x: x[:1].expand(5, WIDTH),
        lambda x: x[0, 0],
        lambda x: x[:0],
        lambda x: x.double(),
    ):
        results = []
        for run in (lambda f, *args: f(*args), checkpointing.checkpoint):
            source = batch(0).requires_grad_()
            run(lambda x: x.sin() * x, make(source)).sum().backward()
            results.append(source.grad)
        assert torch.equal(*results)


def test_gradients_of_gradients_and_by_name():
    checkpointing.configure(None, **CONTIGUOUS)
    source = batch(0).requires_grad_()
    (grad,) = torch.autograd.grad(
        checkpointing.checkpoint(lambda x: x.sin().sum(), source), source, create_graph=True
    )
    grad.sum().backward()
    torch.testing.assert_close(source.grad, -source.detach().sin())


def test_autocast_is_the_same_in_the_second_run():
    seen = []
    layer = nn.Linear(WIDTH, WIDTH)

    def run(x):
        output = layer(x)
        seen.append(output.dtype)
        return output.sin()

    with torch.autocast("cpu", torch.bfloat16):
        loss = checkpointing.checkpoint(run, batch(0)).float().sum()
    loss.backward()
    assert seen == [torch.bfloat16, torch.bfloat16]


def test_the_buffer_is_one_and_is_filled_again():
    checkpointing.configure(None, **CONTIGUOUS)
    (store,) = checkpointing._settings.stores
    model = Stack(checkpointing.checkpoint)
    gradients_of(model)
    buffers = dict(store._buffers)
    places = {(kind[0], kind[1]): len(buffer.memory) for kind, buffer in buffers.items()}
    assert places == {(0, 5 * WIDTH): LAYERS, (1, WIDTH): LAYERS}
    gradients_of(model)
    assert store._buffers == buffers
    assert not any(buffer.is_used for buffer in buffers.values())


def test_inputs_of_another_size_take_the_room_of_unused_buffers():
    checkpointing.configure(None, **CONTIGUOUS)
    (store,) = checkpointing._settings.stores
    for length in (3, 4, 5):
        source = torch.ones(length, requires_grad=True)
        checkpointing.checkpoint(torch.sin, source).sum().backward()
    assert [kind[1] for kind in store._buffers] == [5]


def test_reset_gives_the_buffers_back_and_training_goes_on():
    checkpointing.configure(None, **CONTIGUOUS)
    (store,) = checkpointing._settings.stores
    model = Stack(checkpointing.checkpoint)
    torch.manual_seed(3)
    loss = model(batch(1))
    memory = weakref.ref(next(iter(store._buffers.values())))
    checkpointing.reset()
    assert memory() is not None  # backward still needs it
    loss.backward()
    del loss
    gc.collect()
    assert memory() is None
    assert_same(gradients_of(model), gradients_of(Stack()))


def test_a_tensor_that_recomputation_leaves_behind_keeps_its_values():
    checkpointing.configure(None, **{**CONTIGUOUS, "num_checkpoints": 1})
    left = []

    def layer(x):
        left.append(x.detach())
        return x.sin()

    for value in (1.0, 2.0):
        checkpointing.checkpoint(layer, torch.full((2,), value, requires_grad=True)).sum().backward()
    assert [float(x[0]) for x in left] == [1.0, 1.0, 2.0, 2.0]


def test_more_checkpoints_than_places_are_refused_by_name():
    checkpointing.configure(None, **{**CONTIGUOUS, "num_checkpoints": 2})
    with pytest.raises(ConfigError, match=r"number_checkpoints: expected .* got 2 and one more checkpoint"):
        Stack(checkpointing.checkpoint)(batch(1))


def test_waiting_for_the_device_at_each_edge():
    class Waiting(Accelerator):
        waits = 0

        def synchronize(self, device_index=None):
            Waiting.waits += 1

    before = get_accelerator()
    set_accelerator(Waiting("cpu"))
    try:
        model = Stack(checkpointing.checkpoint)
        gradients_of(model)
        assert Waiting.waits == 0
        checkpointing.configure(None, synchronize=True)
        gradients_of(model)
        assert Waiting.waits == 4 * LAYERS
    finally:
        set_accelerator(before)


def test_profile_is_one_line_per_backward(log):
    checkpointing.configure(None, profile=True)
    model = Stack(checkpointing.checkpoint)
    gradients_of(model)
    gradients_of(model)
    assert len(log) == 2
    assert all("checkpoint forward: " in line and "checkpoint recompute: " in line for line in log)


def test_nothing_is_logged_unasked(log):
    checkpointing.configure(None, **CONTIGUOUS)
    gradients_of(Stack(checkpointing.checkpoint))
    assert log == []


# -- settings -------------------------------------------------------------------------------------

SECTION = {"contiguous_memory_optimization": True, "number_checkpoints": 7}


def number_of_places():
    (store,) = checkpointing._settings.stores
    return store.number


def test_is_configured_once_somebody_asked():
    assert not deepspeed.checkpointing.is_configured()
    deepspeed.checkpointing.configure(None)
    assert deepspeed.checkpointing.is_configured()
    deepspeed.checkpointing.reset()
    assert deepspeed.checkpointing.is_configured()


@pytest.mark.parametrize("as_file", [False, True])
def test_arguments_override_the_file(tmp_path, as_file):
    tree = {"train_batch_size": 2, "activation_checkpointing": SECTION}
    if as_file:
        (tmp_path / "config.json").write_text(json.dumps(tree))
        tree = str(tmp_path / "config.json")
    checkpointing.configure(None, tree)
    assert number_of_places() == 7
    checkpointing.configure(None, tree, num_checkpoints=3)
    assert number_of_places() == 3
    checkpointing.configure(None, tree, contiguous_checkpointing=False)
    assert checkpointing._settings.stores == []


@pytest.mark.parametrize("engine_first", [False, True])
def test_arguments_override_an_engines_section_in_either_order(engine_first):
    section = load_config(
        {"train_batch_size": 2, "activation_checkpointing": SECTION}
    ).activation_checkpointing
    if engine_first:
        checkpointing.configure_from(section)
        assert checkpointing.is_configured()
        assert number_of_places() == 7
        checkpointing.configure(None, num_checkpoints=3)
    else:
        checkpointing.configure(None, num_checkpoints=3)
        checkpointing.configure_from(section)
    assert number_of_places() == 3
    assert section.number_checkpoints == 7


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"contiguous_checkpointing": True}, r"number_checkpoints: expected a number with .* got null; add"),
        ({"num_checkpoints": 0}, r"number_checkpoints: expected an integer of at least 1, got 0"),
        ({"profile": "often"}, r"profile: expected true or false, got \"often\""),
        ({"deepspeed_config": 3}, r"deepspeed_config: expected a dict, a path or a DeepSpeedConfig, got int"),
        (
            {"deepspeed_config": {"activation_checkpointing": {"cpu": 1}}},
            r"activation_checkpointing\.cpu: exp",
        ),
    ],
)
def test_wrong_settings_are_refused_and_change_nothing(asked, message):
    checkpointing.configure(None, **CONTIGUOUS)
    with pytest.raises(ConfigError, match=message):
        checkpointing.configure(None, **asked)
    assert number_of_places() == LAYERS
    checkpointing.configure(None, checkpoint_in_cpu=True)


# -- random numbers -------------------------------------------------------------------------------


def test_streams_are_replayed_and_go_on_afterwards():
    def layer(x):
        with checkpointing.get_cuda_rng_tracker().fork():
            return nn.functional.dropout(x, 0.5) * torch.rand(4)

    def run(run_layer):
        checkpointing.model_parallel_cuda_manual_seed(11)
        source = torch.ones(4, requires_grad=True)
        for _ in range(2):
            (run_layer(layer, source) * 1.0).sum().backward()
        with checkpointing.get_cuda_rng_tracker().fork():
            stream = torch.rand(1)
        return [source.grad, stream, torch.rand(1)]

    assert_same(run(checkpointing.checkpoint), run(lambda function, *args: function(*args)))


def test_a_device_without_inputs_on_it_draws_the_same_too():
    generator = torch.Generator().manual_seed(4)

    class Elsewhere(Accelerator):
        on_host = False

        def get_rng_state(self, device_index=None):
            return generator.get_state()

        def set_rng_state(self, new_state, device_index=None):
            generator.set_state(new_state)

    before = get_accelerator()
    set_accelerator(Elsewhere("cpu"))
    try:
        source = torch.ones(4, requires_grad=True)
        output = checkpointing.checkpoint(lambda x: x * torch.rand(4, generator=generator), source)
        following = generator.get_state()
        output.sum().backward()
        assert torch.equal(source.grad, output)
        assert torch.equal(generator.get_state(), following)
    finally:
        set_accelerator(before)


def test_seeds_are_megatrons_and_the_common_stream_is_untouched():
    checkpointing.model_parallel_cuda_manual_seed(11)
    common = torch.rand(2)
    assert torch.equal(common, torch.rand(2, generator=torch.Generator().manual_seed(11)))
    with checkpointing.get_cuda_rng_tracker().fork(checkpointing._MODEL_PARALLEL_RNG_TRACKER_NAME):
        drawn = torch.rand(2)
    assert torch.equal(drawn, torch.rand(2, generator=torch.Generator().manual_seed(11 + 2718)))
    checkpointing.model_parallel_reconfigure_tp_seed(12)
    with checkpointing._CUDA_RNG_STATE_TRACKER.fork():
        drawn = torch.rand(2)
    assert torch.equal(drawn, torch.rand(2, generator=torch.Generator().manual_seed(12 + 2718)))


def test_states_can_be_saved_and_put_back():
    tracker = checkpointing.get_cuda_rng_tracker()
    tracker.add("mine", 3)
    states = tracker.get_states()
    with tracker.fork("mine"):
        first = torch.rand(2)
    tracker.set_states(states)
    with tracker.fork("mine"):
        assert torch.equal(first, torch.rand(2))
    state = get_accelerator().get_rng_state()
    first = torch.rand(2)
    checkpointing._set_cuda_rng_state(state)
    assert torch.equal(first, torch.rand(2))


def test_streams_are_named_when_they_are_missing_or_there_already():
    tracker = checkpointing.get_cuda_rng_tracker()
    tracker.add("mine", 3)
    with pytest.raises(UsageError, match="name 'mine' again"):
        tracker.add("mine", 4)
    with pytest.raises(UsageError, match="seed 3 again"):
        tracker.add("yours", 3)
    with (
        pytest.raises(UsageError, match=r"one of the streams \['mine'\], got 'yours'"),
        tracker.fork("yours"),
    ):
        pass


# -- other doors ----------------------------------------------------------------------------------


def test_old_paths_lead_to_one_module():
    from deepspeed.runtime.activation_checkpointing import checkpointing as old
    from deepspeed.runtime.activation_checkpointing.checkpointing import checkpoint

    assert deepspeed.checkpointing is checkpointing
    assert checkpoint is checkpointing.checkpoint
    assert old._CUDA_RNG_STATE_TRACKER is checkpointing.get_cuda_rng_tracker()


def test_the_original_pipelines_call_form():
    outputs = []
    source = torch.ones(2, requires_grad=True)
    checkpointing.CheckpointFunction.apply(lambda x: (x.sin(), x * 2), outputs, source)
    assert len(outputs) == 2
    sum(output.sum() for output in outputs).backward()
    assert torch.equal(source.grad, source.detach().cos() + 2)


def test_plain_checkpoints_compile_in_one_graph():
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph

    layer = nn.Linear(WIDTH, WIDTH)
    compiled = torch.compile(
        lambda x: checkpointing.checkpoint(layer, x).sin(), backend=backend, fullgraph=True
    )
    compiled(batch(0)).sum().backward()
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own, after a graph break
@pytest.mark.parametrize("way", WAYS)
def test_every_way_may_stand_in_a_compiled_function(way):
    checkpointing.configure(None, **WAYS[way])
    layer = nn.Linear(WIDTH, WIDTH)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: checkpointing.checkpoint(layer, x.sin()).sum(), backend="eager")
    compiled(batch(0)).backward()
    torch.testing.assert_close(layer.weight.grad, batch(0).sin().sum(0).expand(WIDTH, WIDTH))
