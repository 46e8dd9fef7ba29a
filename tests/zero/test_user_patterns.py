"""Generation, averages and reference models around a sharded one, the ways trainers do them, beside plain PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import transformers
from harness import run_on_ranks
from torch import nn
from twins import EVERYTHING_RELEASED, Twins, data, refused, seeded

import deepspeed
from deepspeed.zero import GatheredParameters, unwrap_model_for_generation


def llama():
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=31,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return seeded(0, lambda: transformers.LlamaForCausalLM(config))


def token_loss(model, rank):
    tokens = torch.arange(12).view(2, 6) * (rank + 2) % 31
    return nn.functional.cross_entropy(model(input_ids=tokens).logits.flatten(0, 1), tokens.flatten())


def generated(model, new_tokens):
    prompt = torch.arange(4)[None] + dist.get_rank()
    return model.generate(prompt, max_new_tokens=new_tokens, do_sample=False)


def inference_engine(model):
    zero = {"stage": 3, **EVERYTHING_RELEASED}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    return deepspeed.initialize(model=model, config=config)[0].eval()


def lengths_that_differ():
    twins = Twins(llama())
    twins.step(token_loss)
    length = 3 + 4 * dist.get_rank()  # nobody waits for the slower rank
    assert torch.equal(generated(twins.engine.module, length), generated(twins.plain, length))
    before = twins.engine.memory_report().gathers
    with unwrap_model_for_generation(twins.engine) as module:
        once = twins.engine.memory_report().gathers - before
        assert torch.equal(generated(module, 10 - length), generated(twins.plain, 10 - length))
        assert twins.engine.memory_report().gathers - before == once  # not once more for each token
    twins.step(token_loss)
    twins.finish(1e-5)


def test_ranks_generate_different_lengths():
    run_on_ranks(2, lengths_that_differ)


def take_hooks_off(offload):
    """Do what TRL does before it generates."""
    for param in offload.module.parameters():
        param.ds_active_sub_modules.clear()
    for hook in (*offload.forward_hooks, *offload.backward_hooks):
        hook.remove()
    offload.forward_hooks, offload.backward_hooks = [], []


def generated_without_hooks(engine, offload):
    with GatheredParameters(engine.parameters()):
        take_hooks_off(offload)
        assert not any(module._forward_pre_hooks for module in engine.module.modules())
        tokens = generated(engine.module, 3)
        offload._register_deepspeed_module(offload.module)
    return tokens


def hooks_off_and_on():
    twins = Twins(llama())
    for _ in range(3):
        twins.step(token_loss)
        tokens = generated_without_hooks(twins.engine, twins.engine.optimizer.parameter_offload)
        assert torch.equal(tokens, generated(twins.plain, 3))
    twins.step(token_loss)
    twins.finish(1e-5)
    engine, plain = inference_engine(llama()), llama()
    assert torch.equal(generated_without_hooks(engine, engine.optimizer), generated(plain, 3))
    prompt = torch.arange(4)[None]
    torch.testing.assert_close(engine(input_ids=prompt).logits, plain(input_ids=prompt).logits)
    engine.destroy()


def test_hooks_are_taken_off_for_generation_and_put_on_again():
    run_on_ranks(2, hooks_off_and_on)


def net():
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.Linear(9, 6))


def loss_of(model, rank):
    return model(data(rank)).square().mean()


def averages():
    twins = Twins(seeded(1, net))
    reference, plain_reference = inference_engine(seeded(1, net)), seeded(1, net)
    with GatheredParameters(twins.engine.module.parameters()):
        average = copy.deepcopy(twins.engine.module)
    plain_average = copy.deepcopy(twins.plain)
    for _ in range(3):
        twins.step(loss_of)
        module, plain = twins.engine.module, twins.plain
        with torch.no_grad():
            for mean, param in zip(average.parameters(), module.parameters(), strict=True):
                with GatheredParameters(param):
                    mean.lerp_(param, 0.1)
            for ours, theirs in zip(reference.module.parameters(), module.parameters(), strict=True):
                with GatheredParameters([ours, theirs], modifier_rank=0):
                    if dist.get_rank() == 0:
                        ours.data.copy_(0.9 * ours.data + 0.1 * theirs.data)
            for copied in (plain_average, plain_reference):
                for mean, param in zip(copied.parameters(), plain.parameters(), strict=True):
                    mean.lerp_(param, 0.1)
    state = reference.module_state_dict()
    for name, value in plain_average.state_dict().items():
        torch.testing.assert_close(average.state_dict()[name], value)
        torch.testing.assert_close(state[name], value)
    with GatheredParameters(module.parameters()):  # the average becomes the model, on all ranks alike
        module.load_state_dict(average.state_dict())
    plain.load_state_dict(plain_average.state_dict())
    twins.step(loss_of)
    twins.finish(1e-5)
    reference.destroy()


def test_averages_and_a_reference_model_that_follows():
    run_on_ranks(2, averages)


def three_engines(stages):
    first, second = (Twins(seeded(k, net), stage=stage) for k, stage in enumerate(stages))
    teacher, plain_teacher = inference_engine(seeded(3, net)), seeded(3, net)
    ranks, rank = dist.get_world_size(), dist.get_rank()

    def distance(lower, upper, target, step, of_rank):
        inputs = data(of_rank, step)
        with torch.no_grad():
            wanted = target(inputs)
        return (upper(lower(inputs)) - wanted).square().mean()

    for step in range(3):
        distance(first.engine, second.engine, teacher, step, rank).backward()
        for one in range(ranks):
            (distance(first.plain, second.plain, plain_teacher, step, one) / ranks).backward()
        for twins in (first, second):
            twins.engine.step()
            twins.plain_step()
    first.finish(1e-5)
    second.finish(1e-5)
    teacher.destroy()


@pytest.mark.parametrize("stages", [(3, 3), (3, 2), (0, 3)])
def test_one_loss_through_two_engines_and_a_teacher_equals_plain_pytorch(stages):
    run_on_ranks(2, three_engines, stages)


def resized_too_late():
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    twins = Twins(llama())
    refused(lambda: twins.engine.module.resize_token_embeddings(40), "embed_tokens.weight")
    known = transformers.integrations.HfDeepSpeedConfig(settings)  # transformers gathers then
    twins.engine.module.resize_token_embeddings(40, mean_resizing=False)
    del known
    twins.engine.backward(token_loss(twins.engine, 0))
    refused(twins.engine.step, "lm_head", "before initialize")
    twins.engine.destroy()


def test_embeddings_that_are_resized_after_initialize_are_named():
    run_on_ranks(2, resized_too_late)
