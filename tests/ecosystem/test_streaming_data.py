"""A streaming dataset of `datasets` feeds an engine, and a metric of `evaluate` gathers what the ranks predict."""

from __future__ import annotations

import datasets
import torch
import torch.distributed as dist
from datasets.distributed import split_dataset_by_node
from harness import run_on_ranks
from torch import nn
from torch.utils.data import DataLoader
from twins import seeded

import deepspeed

COUNT, RANKS, MICRO = 32, 2, 2
CONFIG = {
    "train_micro_batch_size_per_gpu": MICRO,
    "gradient_clipping": 0.0,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def samples(shards):
    for shard in shards:
        for index in range(shard, COUNT, 4):
            yield {"x": [index / COUNT, 1.0], "label": int(index > COUNT // 2)}


def stream(rank=0, ranks=1):
    """Return a rank's share of a stream that is mapped and filtered as it goes."""
    whole = datasets.IterableDataset.from_generator(samples, gen_kwargs={"shards": list(range(4))})
    whole = whole.map(lambda sample: {"x": [2 * value for value in sample["x"]]})
    return split_dataset_by_node(whole.with_format("torch"), rank=rank, world_size=ranks)


def classifier():
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))


def loss_on(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["label"])


def plainly_trained():
    model = seeded(2, classifier)
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    samples = list(stream())
    loaders = [DataLoader(samples[rank::RANKS], batch_size=MICRO) for rank in range(RANKS)]
    for batches in zip(*loaders, strict=True):
        sum(loss_on(model, batch) / RANKS for batch in batches).backward()
        sgd.step()
        sgd.zero_grad()
    return model


def trains_from_a_stream():
    model = seeded(2, classifier)
    engine, _, loader, _ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        training_data=stream(),  # the loader takes this rank's share
        config=CONFIG,
    )
    steps = 0
    for batch in loader:
        engine.backward(loss_on(engine, batch))
        engine.step()
        steps += 1
    assert steps == COUNT // RANKS // MICRO
    ours, plain = engine.module_state_dict(), plainly_trained().state_dict()
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)
    engine.destroy()


def test_an_engine_trains_on_a_stream_that_ranks_share():
    run_on_ranks(RANKS, trains_from_a_stream)


def measures(folder):
    import evaluate

    class Accuracy(evaluate.Metric):  # the published ones are downloaded; this one is here
        def _info(self):
            features = datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            )
            return evaluate.MetricInfo(description="", citation="", features=features)

        def _compute(self, predictions, references):
            right = sum(one == other for one, other in zip(predictions, references, strict=True))
            return {"accuracy": right / len(references), "count": len(references)}

    rank = dist.get_rank()
    trained = plainly_trained()
    with torch.no_grad():
        (every,) = DataLoader(stream(), batch_size=COUNT)
        right = trained(every["x"]).argmax(1) == every["label"]
    engine, *_ = deepspeed.initialize(model=trained, config=CONFIG)
    metric = Accuracy(num_process=RANKS, process_id=rank, experiment_id="one", cache_dir=folder)
    engine.eval()
    with torch.no_grad():
        for batch in DataLoader(stream(rank, RANKS), batch_size=MICRO):
            metric.add_batch(predictions=engine(batch["x"]).argmax(1), references=batch["label"])
    result = metric.compute()
    if rank == 0:
        assert result == {"accuracy": right.sum().item() / COUNT, "count": COUNT}
    engine.destroy()


def test_a_metric_sees_what_all_ranks_predict(tmp_path):
    run_on_ranks(RANKS, measures, str(tmp_path))
