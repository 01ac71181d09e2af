"""The adaptive loader: every sample once an epoch whatever is requested, the right length at any time, exact resume."""

import copy
import itertools
import random
from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, WeightedRandomSampler

from lightning_grad.data import (
    AdaptiveBatchSampler,
    AdaptiveDataLoader,
    DrawnOrderSampler,
    MicroBatch,
    ResumableDataLoader,
    ResumableSampler,
)


def make(n, micro, accumulate=1, world=1, rank=0, *, shuffle=False, drop_last=False):
    sampler = ResumableSampler(range(n), shuffle, seed=3, num_replicas=world, rank=rank)
    return AdaptiveBatchSampler(sampler, micro, accumulate, drop_last)


class Prefetch:
    """Draw ``lag`` micro-batches ahead of the one in use, as worker processes make the loader do."""

    def __init__(self, sampler, lag):
        self.sampler, self.lag, self.queue = sampler, lag, deque()
        self.batches = sampler.positioned_batches()
        self.used = sampler.start()
        self._fill(lag)

    def _fill(self, wanted):
        while len(self.queue) < wanted:
            item = next(self.batches, None)
            if item is None:
                return
            self.queue.append(item)

    def __iter__(self):
        return self

    def __next__(self):
        self._fill(1)
        if not self.queue:
            raise StopIteration
        samples, self.used = self.queue.popleft()
        self._fill(self.lag)
        return samples, self.used


def trace(sampler, requests, lag=0):
    """Sizes and accumulations of an epoch with requests made after the given micro-batches."""
    sizes, ks = [], []
    for samples, where in Prefetch(sampler, lag):
        sizes.append(len(samples))
        ks.append(where.accumulate)
        if where.index in requests:
            sampler.request(*requests[where.index])
    return sizes, ks


def test_traces():
    requests = {2: (16, 1), 4: (16, 2)}
    assert trace(make(103, 8), requests) == ([8, 8, 8, 16, 16, 16, 16, 15], [1, 1, 1, 1, 1, 1, 2, 2])
    assert trace(make(103, 8), requests, lag=4) == ([8] * 7 + [16, 16, 15], [1] * 10)
    assert trace(make(65, 16, 4), {}) == ([17, 16, 16, 16], [4] * 4)
    assert trace(make(65, 16, 4, drop_last=True), {}) == ([16] * 4, [4] * 4)


plans = st.tuples(st.integers(1, 12), st.sampled_from([1, 2, 4, 8]))


cases = given(
    n=st.integers(1, 150),
    world=st.integers(1, 3),
    plan=plans,
    requests=st.dictionaries(st.integers(0, 60), plans, max_size=8),
    lag=st.sampled_from([0, 1, 4, 9]),
    drop_last=st.booleans(),
    cut=st.integers(0, 60),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@cases
def test_any_sequence_of_requests(n, world, plan, requests, lag, drop_last, cut):
    check_any_sequence(n, world, plan, requests, lag, drop_last, cut)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, derandomize=True)
@cases
def test_two_thousand_sequences_of_requests(n, world, plan, requests, lag, drop_last, cut):
    check_any_sequence(n, world, plan, requests, lag, drop_last, cut)


def check_any_sequence(n, world, plan, requests, lag, drop_last, cut):
    if n < plan[1] * world:
        return
    ranks = [make(n, *plan, world, rank, shuffle=True, drop_last=drop_last) for rank in range(world)]
    for epoch in range(2):
        for sampler in ranks:
            sampler.sampler.set_epoch(epoch)
        expected = len(ranks[0])
        assert all(len(sampler) == expected for sampler in ranks)
        runs = [Prefetch(sampler, lag) for sampler in ranks]
        seen, steps, count = [], {}, 0
        resumed = saved = None
        for items in zip(*runs, strict=True):  # strict: equally many on every rank
            places = [where for _, where in items]
            where = places[0]
            assert where.index == count
            assert all((p.index, p.part, p.accumulate) == (where.index, where.part, where.accumulate) for p in places)
            # what an accumulation counter modulo k needs
            assert where.index % where.accumulate == where.part
            for samples, _ in items:
                assert samples  # never empty
                seen += samples
                steps.setdefault(where.step_start, []).append(len(samples))
            if resumed is not None:  # a run resumed at `cut` and given the same requests does the same
                assert [next(run) for run in resumed] == list(items)
            count += 1
            asked = requests.get(where.index + 7 * epoch)
            if where.index == cut:
                saved = [sampler.state_dict(run.used) for sampler, run in zip(ranks, runs, strict=True)]
                assert saved == [saved[0]] * world  # one state serves every rank
                resumed = []
                for rank in range(world):
                    again = make(n, *plan, world, rank, shuffle=True, drop_last=drop_last)
                    again.load_state_dict(saved[0])
                    if again.sampler.epoch != epoch:  # it was the last one: see the next test
                        resumed = None
                        break
                    # before anything is drawn: a request can lie ahead that waits for a batch that was dispatched
                    ahead = copy.deepcopy(again._resume)
                    assert len(again) == ahead.index + formed(again, ahead)
                    resumed.append(Prefetch(again, lag))
            if asked is not None:
                for sampler in ranks + [run.sampler for run in resumed or []]:
                    sampler.request(*asked)
            # the length counts the whole epoch, at any time
            rest = copy.deepcopy(ranks[0])
            assert len(ranks[0]) == length_by_enumeration(rest, runs[0], count)
        if resumed is not None:
            assert all(next(run, None) is None for run in resumed)
        order = ranks[0].sampler.order().tolist()
        assert sorted(seen) == sorted(order[: len(seen)])
        if not drop_last:
            assert len(seen) == n
        else:
            assert n - len(seen) < ranks[0].batch_size * ranks[0].accumulate * world
        for sizes in steps.values():
            assert max(sizes) - min(sizes) <= 1
        assert len(ranks[0]) == count


@pytest.mark.parametrize("asked", [(4, 2), (4, 4), (8, 4), (2, 8)])
def test_length_after_a_resume_before_a_change_that_was_asked_for(asked):
    """Workers run ahead: the change waits for the first batch they had not drawn, and then for a window to begin."""
    waiting = 0
    for n, cut in itertools.product((90, 97, 103), range(1, 9)):
        sampler = make(n, 4)
        run = Prefetch(sampler, 4)
        for _ in range(cut):
            if run.used.index == 0:
                sampler.request(*asked)
            next(run)
        again = make(n, 4)
        again.load_state_dict(sampler.state_dict(run.used))
        ahead = copy.deepcopy(again._resume)
        waiting += ahead.request is not None and ahead.request[2] > ahead.index
        assert len(again) == ahead.index + formed(again, ahead)
    assert waiting >= 3


def length_by_enumeration(sampler, run, count):
    """Delivered, drawn, and what the dispatch-level state would still give, formed step by step."""
    length = count + len(run.queue)
    # the parts of the current step which the generator has still to yield
    last = run.queue[-1][1] if run.queue else run.used
    return length + last.accumulate - last.part - 1 + formed(sampler, sampler._course)


def formed(sampler, course):
    """Micro-batches of the steps of a course that are not yet formed; uses the course up."""
    total, length = sampler.sampler.dataset_size, 0
    while size := course.form(total, sampler.sampler.num_replicas, sampler.drop_last):
        length += course.accumulate
        course.index, course.cursor, course.skip = course.index + course.accumulate, course.cursor + size, 0
    return length


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    n=st.integers(2, 90),
    plan=plans,
    requests=st.dictionaries(st.integers(0, 30), plans, max_size=5),
    lag=st.sampled_from([0, 4]),
)
def test_resume_at_the_last_micro_batch_means_the_next_epoch(n, plan, requests, lag):
    if n < plan[1]:
        return
    sampler = make(n, *plan, shuffle=True)
    run = Prefetch(sampler, lag)
    for _, where in run:
        if where.index in requests:
            sampler.request(*requests[where.index])
    state = sampler.state_dict(run.used)
    count = len(sampler)
    again = make(n, *plan, shuffle=True)
    again.load_state_dict(state)
    assert len(again) == count  # Lightning still compares it with the micro-batches it has counted
    again.release_length()
    sampler.sampler.set_epoch(1)
    assert again.sampler.epoch == 1
    assert len(again) == len(sampler)
    assert list(again.positioned_batches()) == list(sampler.positioned_batches())


def test_epoch_set_after_loading_wins_but_keeps_the_plan():
    sampler = make(40, 4)
    run = Prefetch(sampler, 4)
    for _, where in run:
        if where.index == 2:
            sampler.request(8, 1)
        if where.index == 4:  # the change is dispatched, not yet delivered
            break
    again = make(40, 4)
    again.load_state_dict(sampler.state_dict(run.used))
    again.sampler.set_epoch(1)
    assert {where.micro for _, where in again.positioned_batches()} == {8}


def test_constant_plan_gives_the_batches_of_torch():
    for n in (64, 60, 57):
        order = DistributedSampler(range(n), num_replicas=1, rank=0, shuffle=True, seed=3)
        expected = list(BatchSampler(order, 8, drop_last=False))
        got = [samples for samples, _ in make(n, 8, shuffle=True).positioned_batches()]
        assert got == expected


def test_length_takes_constant_time():
    sampler = make(10**9, 8)
    sampler.request(16, 4)
    assert len(sampler) == 4 * -(-(10**9) // 64)


def test_resume_on_another_number_of_processes():
    sampler = make(64, 4, 2, world=2)
    run = Prefetch(sampler, 0)
    seen = [next(run)[0] for _ in range(2)]
    at_boundary = sampler.state_dict(run.used)
    next(run)
    inside = sampler.state_dict(run.used)
    others = [make(64, 4, 2, world=4, rank=rank) for rank in range(4)]
    rest = []
    for again in others:
        again.load_state_dict(at_boundary)
        rest += [i for samples, _ in again.positioned_batches() for i in samples]
    assert sorted(rest) == list(range(16, 64))
    assert len(seen) == 2
    with pytest.raises(ValueError, match="`num_replicas` 2; this loader has `num_replicas` 4"):
        others[0].load_state_dict(inside)


def test_state_of_other_data_is_refused_with_both_lengths():
    sampler = make(64, 4)
    state = sampler.state_dict(sampler.start())
    with pytest.raises(ValueError, match=r"`dataset_size` 64; this loader has `dataset_size` 63"):
        make(63, 4).load_state_dict(state)
    with pytest.raises(ValueError, match="another loader"):
        make(64, 4).load_state_dict({"version": 1, "batches": 3})


class Numbers(torch.utils.data.Dataset):
    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return torch.tensor([float(i)])


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_delivers_what_it_describes(workers):
    loader = AdaptiveDataLoader(Numbers(103), batch_size=8, shuffle=True, seed=5, num_workers=workers)
    rng = random.Random(0)
    for epoch in range(3):
        loader.set_epoch(epoch)
        seen = []
        for i, batch in enumerate(loader):
            where = loader.current
            assert isinstance(where, MicroBatch)
            assert (where.epoch, where.index, where.size) == (epoch, i, len(batch))
            seen += batch[:, 0].int().tolist()
            if rng.random() < 0.4:
                loader.request(rng.choice([4, 8, 16]), rng.choice([1, 2, 4]))
        assert sorted(seen) == list(range(103))
        assert loader.current.index + 1 == i + 1 == loader.current.accumulate * ((i + 1) // loader.current.accumulate)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_resumes_anywhere(workers):
    def fresh():
        return AdaptiveDataLoader(Numbers(61), batch_size=4, shuffle=True, num_workers=workers)

    wanted = {2: (8, 1), 4: (8, 2), 5: (4, 1), 9: (6, 1)}

    def run(loader, epochs):
        out = []
        for epoch in epochs:
            loader.set_epoch(epoch)
            for batch in loader:
                if loader.current.index in wanted:
                    loader.request(*wanted[loader.current.index])
                out.append((loader.current, batch[:, 0].tolist(), loader.state_dict()))
        return out

    straight = run(fresh(), [0, 1])
    for i in (0, 2, 3, 5, 8, len(straight) - 3) if workers else range(len(straight) - 1):
        again = fresh()
        again.load_state_dict(straight[i][2])
        rest = run(again, range(again.sampler.epoch, 2))
        assert [r[:2] for r in rest] == [s[:2] for s in straight[i + 1 :]], i


def test_conversion_of_loaders():
    data = Numbers(20)
    plain = DataLoader(data, 4, shuffle=True, drop_last=True, collate_fn=list)
    loader = AdaptiveDataLoader.from_dataloader(plain, accumulate=2, seed=9)
    assert (loader.adaptive.batch_size, loader.adaptive.accumulate, loader.adaptive.drop_last) == (4, 2, True)
    assert (loader.sampler.shuffle, loader.sampler.seed, loader.collate_fn) == (True, 9, list)
    assert not AdaptiveDataLoader.from_dataloader(DataLoader(data, 4)).sampler.shuffle
    spread = DistributedSampler(data, 2, 1, shuffle=True, seed=4)
    loader = AdaptiveDataLoader.from_dataloader(DataLoader(data, 4, sampler=spread))
    assert (loader.sampler.shuffle, loader.sampler.seed, loader.sampler.dataset_size) == (True, 4, 20)
    own = ResumableDataLoader(data, batch_size=4, shuffle=True, seed=8)
    loader = AdaptiveDataLoader.from_dataloader(own)
    assert loader.sampler is own.sampler
    assert loader.adaptive.batch_size == 4


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(4))


def test_conversion_refuses_what_cannot_change():
    data = Numbers(20)
    for loader, reason in [
        (DataLoader(Stream(), 2), "IterableDataset cannot be changed; use mode='accumulate'"),
        (DataLoader(data, batch_size=None), "batch_size=None"),
        (DataLoader(data, batch_sampler=[[0, 1], [2]]), "own batch_sampler"),
    ]:
        with pytest.raises(TypeError, match=reason):
            AdaptiveDataLoader.from_dataloader(loader)
    with pytest.raises(TypeError, match="IterableDataset cannot be changed"):
        AdaptiveDataLoader(Stream(), batch_size=2)
    with pytest.raises(ValueError, match="`accumulate` must be a power of two, got 3: use 2 or 4"):
        AdaptiveDataLoader(data, batch_size=2, accumulate=3)
    with pytest.raises(ValueError, match="dataset of 3 samples is smaller than"):
        list(AdaptiveDataLoader(Numbers(3), batch_size=1, accumulate=4))


def test_a_drawn_order_depends_on_the_epoch_only():
    weights = torch.tensor([1.0, 5.0, 1.0, 3.0])
    drawn = WeightedRandomSampler(weights, 12, replacement=True)
    one = AdaptiveDataLoader.from_dataloader(DataLoader(Numbers(4), 3, sampler=drawn), seed=2)
    assert isinstance(one.sampler, DrawnOrderSampler)
    orders = []
    for epoch in (0, 1, 0):
        one.set_epoch(epoch)
        torch.rand(5)
        orders.append(torch.cat(list(one))[:, 0].tolist())
        assert len(orders[-1]) == 12
        assert len(one) == 4
    assert orders[0] == orders[2] != orders[1]
