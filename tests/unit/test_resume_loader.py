"""The resumable sampler and loader: order, shares, position, and what Lightning does with them."""

import itertools
import multiprocessing as mp
import random
from collections import Counter

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, TensorDataset

from lightning_grad import ResumableDataLoader, ResumableSampler
from lightning_grad.data import epoch_order


def numbers(n):
    return TensorDataset(torch.arange(n))


def batches(loader, limit=None):
    return [batch[0].tolist() for batch in itertools.islice(loader, limit)]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(4))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize(("size", "replicas"), [(12, 1), (13, 2), (2, 5), (17, 4)])
def test_shares_are_those_of_torch(size, replicas, drop_last, shuffle):
    data = range(size)
    for rank, epoch in itertools.product(range(replicas), (0, 1, 7)):
        ours = ResumableSampler(data, shuffle, 3, drop_last, replicas, rank)
        if drop_last and size < replicas:
            assert list(ours) == []
            continue
        torchs = DistributedSampler(data, replicas, rank, shuffle, 3, drop_last)
        ours.set_epoch(epoch)
        torchs.set_epoch(epoch)
        assert list(ours) == list(torchs)
        assert len(ours) == len(torchs)


def test_order_is_frozen():
    # a release that changes randperm would break every mid-epoch resume
    assert epoch_order(10, seed=5, epoch=2, shuffle=True).tolist() == [5, 0, 3, 4, 1, 7, 9, 6, 8, 2]
    assert epoch_order(4, seed=5, epoch=2, shuffle=False).tolist() == [0, 1, 2, 3]


def test_order_ignores_global_random_state_and_leaves_it_alone():
    loader = ResumableDataLoader(numbers(20), batch_size=3, shuffle=True, seed=1)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = batches(loader)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    loader.set_epoch(0)
    assert batches(loader) == first
    assert batches(loader) != first  # the epoch advanced by itself
    assert sorted(itertools.chain(*first)) == list(range(20))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("drop_last", [False, True])
def test_resume_after_every_batch(workers, drop_last):
    def make():
        return ResumableDataLoader(
            numbers(11), batch_size=3, shuffle=True, seed=4, drop_last=drop_last, num_workers=workers
        )

    straight = make()
    expected = batches(straight) + batches(straight) + batches(straight)
    steps = range(len(expected)) if workers == 0 else (1, len(straight), len(straight) + 1)
    for step in steps:
        first, second = make(), make()
        taken = []
        while len(taken) < step:
            taken += batches(first, step - len(taken))
        second.load_state_dict(first.state_dict())
        assert second.state_dict() == first.state_dict()
        while len(taken) < len(expected):
            taken += batches(second)
        assert taken == expected


def test_position_counts_delivered_batches_not_prefetched_ones():
    loader = ResumableDataLoader(numbers(100), batch_size=5, num_workers=2, prefetch_factor=4)
    iterator = iter(loader)
    for done in range(1, 4):
        next(iterator)
        assert loader.state_dict()["batches"] == done
    assert len(loader.batch_sampler.dispatched) >= 5  # prefetching did run ahead


def test_persistent_workers_and_abandoned_iterators():
    loader = ResumableDataLoader(numbers(12), batch_size=2, shuffle=True, num_workers=1, persistent_workers=True)
    half = batches(loader, 3)
    again = batches(loader)
    assert again[:3] == half
    assert loader.state_dict()["epoch"] == 1
    assert loader.state_dict()["batches"] == 0


def test_full_epoch_is_the_start_of_the_next():
    loader = ResumableDataLoader(numbers(8), batch_size=4, shuffle=True)
    batches(loader, 2)
    assert (loader.state_dict()["epoch"], loader.state_dict()["batches"]) == (1, 0)


def test_position_of_another_epoch_is_dropped_when_the_epoch_is_set():
    loader = ResumableDataLoader(numbers(8), batch_size=2, shuffle=True)
    batches(loader, 1)
    other = ResumableDataLoader(numbers(8), batch_size=2, shuffle=True)
    other.load_state_dict(loader.state_dict())
    other.set_epoch(3)
    assert len(batches(other)) == 4


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"batch_size": 3}, "`batch_size` 2"),
        ({"seed": 9}, "`seed` 0"),
        ({"shuffle": False}, "`shuffle` True"),
        ({"drop_last": True}, "`drop_last` False"),
        ({"num_replicas": 2, "rank": 0}, "`num_replicas` 1"),
    ],
)
def test_changed_settings(change, word):
    settings = {"batch_size": 2, "shuffle": True, "seed": 0, "drop_last": False}
    loader = ResumableDataLoader(numbers(12), **settings)
    batches(loader, 1)
    changed = ResumableDataLoader(numbers(12), **(settings | change))
    with pytest.raises(ValueError, match=word) as error:
        changed.load_state_dict(loader.state_dict())
    assert "end of an epoch" in str(error.value)
    batches(loader)
    changed.load_state_dict(loader.state_dict())  # allowed between epochs
    assert changed.state_dict()["epoch"] == 1


def test_changed_data_is_always_refused():
    loader = ResumableDataLoader(numbers(12), batch_size=2)
    with pytest.raises(ValueError, match="`dataset_size` 12; this loader has `dataset_size` 13"):
        ResumableDataLoader(numbers(13), batch_size=2).load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match="version 2"):
        loader.load_state_dict(loader.state_dict() | {"version": 2})


def test_refused_arguments():
    with pytest.raises(TypeError, match="map-style"):
        ResumableDataLoader(Stream())
    with pytest.raises(TypeError, match="RandomSampler"):
        ResumableDataLoader(numbers(4), sampler=RandomSampler(range(4)))
    with pytest.raises(TypeError, match="PositionedBatchSampler"):
        ResumableDataLoader(numbers(4), batch_sampler=DataLoader(numbers(4), 2).batch_sampler)
    with pytest.raises(ValueError, match="`num_replicas` and `rank`"):
        ResumableSampler(range(4), rank=0)
    with pytest.raises(ValueError, match="`rank`"):
        ResumableSampler(range(4), num_replicas=2, rank=2)
    with pytest.raises(ValueError, match="`seed`"):
        ResumableSampler(range(4), seed=-1)
    with pytest.raises(ValueError, match="`batch_size`"):
        ResumableDataLoader(numbers(4), batch_size=0)
    with pytest.raises(ValueError, match="`shuffle`"):
        ResumableDataLoader(numbers(4), shuffle=True, sampler=ResumableSampler(range(4)))
    with pytest.raises(ValueError, match="`in_order`"):
        ResumableDataLoader(numbers(4), in_order=False)


def test_random_walk_of_stops_and_restarts():
    """Any sequence of stops, also several in one epoch and several without a batch, delivers the same stream."""
    rng = random.Random(0)
    for _ in range(200):
        size, batch, replicas = rng.randint(1, 40), rng.randint(1, 7), rng.randint(1, 3)
        settings = {"batch_size": batch, "shuffle": rng.random() < 0.8, "seed": rng.randrange(100)}
        for rank in range(replicas):
            share = {"num_replicas": replicas, "rank": rank}
            straight = ResumableDataLoader(numbers(size), **settings, **share)
            expected = batches(straight) + batches(straight) + batches(straight)
            taken, state = [], None
            while len(taken) < len(expected):
                loader = ResumableDataLoader(numbers(size), **settings, **share)
                if state is not None:
                    loader.load_state_dict(state)
                taken += batches(loader, min(rng.randint(0, 5), len(expected) - len(taken)))
                state = loader.state_dict()
            assert taken == expected


class Recorder(BoringModel):
    def __init__(self, loader):
        super().__init__()
        self.loader, self.seen = loader, []

    def train_dataloader(self):
        return self.loader()

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0].tolist())
        return self.layer(torch.ones(1, 32)).sum()


def quiet(**kwargs):
    return pl.Trainer(
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu", devices=1, limit_val_batches=0, **kwargs,
    )  # fmt: skip


@pytest.mark.parametrize("limit", [1.0, 2])
def test_lightning_delivers_the_same_batches_as_a_plain_loop(limit):
    model = Recorder(lambda: ResumableDataLoader(numbers(10), batch_size=3, shuffle=True, seed=2))
    quiet(max_epochs=3, limit_train_batches=limit).fit(model)
    loader, expected = model.loader(), []
    for epoch in range(3):
        loader.set_epoch(epoch)
        expected += batches(loader, 4 if limit == 1.0 else 2)
    assert model.seen == expected


def test_overfit_and_predict_work():
    model = Recorder(lambda: ResumableDataLoader(numbers(10), batch_size=3, shuffle=True))
    quiet(max_epochs=2, overfit_batches=2).fit(model)
    assert model.seen == [[0, 1, 2], [3, 4, 5]] * 2
    model.predict_step = lambda batch, batch_idx: batch[0]
    out = quiet().predict(model, ResumableDataLoader(numbers(10), batch_size=3, drop_last=True))
    assert [batch.tolist() for batch in out] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]


def _shares(rank, port, shared):
    import os

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"NODE_RANK": "0", "RANK": str(rank), "PL_GLOBAL_SEED": "0"}
    torch.set_num_threads(1)
    made_before = ResumableDataLoader(numbers(16), batch_size=2, shuffle=True, seed=1)
    for name, loader in (("argument", made_before), ("hook", None)):
        model = Recorder(lambda: ResumableDataLoader(numbers(16), batch_size=2, shuffle=True, seed=1))
        trainer = pl.Trainer(
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            accelerator="cpu", devices=2, strategy="ddp", limit_val_batches=0, max_epochs=2,
        )  # fmt: skip
        trainer.fit(model, train_dataloaders=loader)
        shared.put((name, rank, model.seen))


def test_two_processes_share_the_data_once():
    """No double sharding: each sample exactly once an epoch over both ranks, the loader made before or in the hook."""
    # not "fork": this process may have threads by now, and a child of it can wait for them forever
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "lightning.pytorch", "lightning_grad"])
    shared, port = context.Queue(), random.SystemRandom().randint(20000, 40000)
    workers = [context.Process(target=_shares, args=(rank, port, shared)) for rank in range(2)]
    for worker in workers:
        worker.start()
    seen = [shared.get(timeout=60) for _ in range(4)]
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    for name in ("argument", "hook"):
        ranks = [batches_ for kind, _, batches_ in seen if kind == name]
        assert [len(r) for r in ranks] == [8, 8]
        for epoch in (slice(0, 4), slice(4, 8)):
            assert Counter(i for r in ranks for batch in r[epoch] for i in batch) == Counter(range(16))


def test_a_cycled_loader_continues_in_its_pass_when_the_epoch_is_named_again():
    def make():
        return ResumableDataLoader(TensorDataset(torch.arange(6)), batch_size=2, shuffle=True)

    def rest(loader):
        return [batch.tolist() for (batch,) in loader]

    loader = make()
    loader.set_epoch(4)
    start = loader.state_dict()
    rest(loader)
    second = iter(loader)
    next(second)
    state = loader.state_dict()
    want = [batch.tolist() for (batch,) in second]
    again = make()
    again.load_state_dict(state)
    again.load_state_dict(start)
    first = rest(again)
    assert first != want
    again.load_state_dict(state)
    again.set_epoch(4)  # as Lightning does when it resumes
    assert rest(again) == want
    again.set_epoch(4)
    assert rest(again) == first  # once only
    again.load_state_dict(state)
    again.set_epoch(9)
    assert len(rest(again)) == 3  # another epoch is the newer word
