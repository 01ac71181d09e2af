"""AdaptiveBatchSize in a Trainer: what is trained on, when Lightning validates, what is measured, what is refused."""

import itertools
import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    TQDMProgressBar,
)
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_grad import (
    AdaptiveBatchSize,
    BatchSizeLRScaler,
    RandomStateCheckpoint,
    SamplesLR,
    SharedSeedSPSAStrategy,
)
from lightning_grad.allocation.batch_size import (
    CABS,
    AugmentedInnerProductTest,
    BatchPlan,
    CoordinateNormTest,
    Criterion,
    InnerProductTest,
    NormTest,
)
from lightning_grad.data import AdaptiveDataLoader
from lightning_grad.statistics.gradient_noise import GradStats


class Script(Criterion):
    """Ask for given batch sizes, test after test; the last one for ever."""

    def __init__(self, *targets):
        self.targets, self.calls = targets, 0

    def target(self, stats):
        self.calls += 1
        return float(self.targets[min(self.calls, len(self.targets)) - 1])


class Mean(pl.LightningModule):
    """loss = w * mean(x): the gradient of a step is the mean of the samples in it."""

    def __init__(self, n=103, batch=8, loader=None, **loader_args):
        super().__init__()
        self.w = nn.Linear(1, 1, bias=False)
        self.data, self.batch, self.loader_args, self.loader = (
            torch.arange(float(n))[:, None],
            batch,
            loader_args,
            loader,
        )
        self.seen, self.window, self.steps, self.validations, self.epoch_schedules = [], [], [], 0, 0
        self.schedule = None

    def training_step(self, batch, batch_idx):
        x = batch[0]
        self.seen += x[:, 0].int().tolist()
        self.window.append(x[:, 0].tolist())
        return self.w(x).mean()

    def on_before_optimizer_step(self, optimizer):
        self.steps.append((self.window, self.w.weight.grad.item()))
        self.window = []

    def validation_step(self, batch, batch_idx):
        self.validations += 1

    def train_dataloader(self):
        if self.loader is not None:
            return self.loader
        return DataLoader(TensorDataset(self.data), self.batch, **{"shuffle": True, **self.loader_args})

    def val_dataloader(self):
        return DataLoader(TensorDataset(self.data[:1]), 1)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-4)
        if self.schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.schedule(optimizer)}


def trainer(*callbacks, **kwargs):
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 2}
    settings |= {"enable_model_summary": False, "accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0}
    return pl.Trainer(**settings | kwargs, callbacks=list(callbacks))


def fit(model, callback, *others, **kwargs):
    run = trainer(callback, *others, **kwargs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*num_workers|.*logging interval|.*log_every_n_steps")
        run.fit(model)
    return run


def scripted(*targets, cap=64, **kwargs):
    settings = {"test_interval": 1, "max_growth": None, "min_change": 1.0, "max_micro_batch_size": 16, "ema": 0.0}
    return AdaptiveBatchSize(cap, Script(*targets), **settings | kwargs)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("targets", "kwargs"),
    [
        ((8, 8, 16, 16, 32, 64), {}),
        ((64, 8, 33, 8, 64), {"allow_decrease": True}),
        ((16, 64), {"drop_last": True}),
    ],
)
def test_every_sample_once_and_every_step_its_mean(workers, targets, kwargs):
    drop_last = kwargs.pop("drop_last", False)
    model = Mean(num_workers=workers, drop_last=drop_last)
    run = fit(model, scripted(*targets, **kwargs), max_epochs=3)
    epochs = [model.seen[i : i + 103] for i in range(0, len(model.seen), 103)] if not drop_last else []
    assert all(sorted(epoch) == list(range(103)) for epoch in epochs)
    assert drop_last or len(epochs) == 3
    for window, grad in model.steps:
        assert max(map(len, window)) - min(map(len, window)) <= 1
        means = [sum(part) / len(part) for part in window]
        assert grad == pytest.approx(sum(means) / len(means), rel=1e-5)  # float32 means of up to 64 numbers below 103
    assert model.validations == 3
    assert run.global_step == len(model.steps)
    assert run.current_epoch == 3


@pytest.mark.parametrize(("interval", "expected"), [(1.0, 3), (0.5, 6), (0.25, 12), (2, None)])
def test_validation_runs_as_often_as_it_should(interval, expected):
    model = Mean(n=240)
    fit(model, scripted(8, 16, 16, 24, 24, 48, 64), max_epochs=3, val_check_interval=interval)
    if expected is None:
        assert model.validations >= 3
    else:
        assert model.validations == expected


class Validates(Mean):
    """Notes after how many batches validation ran."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.at = []

    def validation_step(self, batch, batch_idx):
        self.at.append(self.trainer.fit_loop.epoch_loop.total_batch_idx + 1)


def test_validation_under_a_limit_of_batches():
    for kwargs, expected in [
        ({"limit_train_batches": 6}, [6, 12]),
        ({"limit_train_batches": 6, "val_check_interval": 0.5}, [3, 6, 9, 12]),
        ({"limit_train_batches": 6, "val_check_interval": 0.4}, [3, 5, 9, 11]),
        ({"limit_train_batches": 6, "val_check_interval": 4}, [4, 10]),
        ({"limit_train_batches": 100, "val_check_interval": 0.5}, [8, 16, 24, 32]),
        ({"fast_dev_run": True}, [1]),
        ({"fast_dev_run": 3}, [3]),
    ]:
        model = Validates(n=64, batch=4)
        fit(model, scripted(4), **kwargs)
        assert model.at == expected, kwargs
    # a batch that grows comes to half the data before half the batches, and to all of it before the limit
    model = Validates(n=64, batch=4)
    fit(model, scripted(8, 16), limit_train_batches=10, val_check_interval=0.5, max_epochs=1)
    assert model.at == [4, 6]  # batches of 4, 8, 16, 16, 16, 4


def test_dropped_samples_do_not_lose_the_validation_at_the_end_of_an_epoch():
    for interval, expected in [(1.0, [17, 34]), (0.5, [9, 17, 26, 34])]:
        model = Validates(n=70, batch=4, drop_last=True)
        fit(model, scripted(4), val_check_interval=interval)
        assert model.at == expected


def test_epoch_schedulers_progress_bar_and_estimated_steps():
    totals = []

    class Bar(TQDMProgressBar):
        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            totals.append((self.train_progress_bar.total, self.train_progress_bar.n))

    model = Mean()
    model.schedule = lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5)
    bar = Bar()
    run = fit(model, scripted(8, 8, 16, 32, 64), bar, enable_progress_bar=True)
    assert run.optimizers[0].param_groups[0]["lr"] == 1e-4 * 0.25
    ends = [n for total, n in totals if total == n]
    assert len(ends) == 2  # the bar is full at the end of each epoch, and only there
    assert totals[0][0] == 13
    assert totals[-1] == (8, 8)  # 103 samples: k=4 micro-batches of 16, and a last step with the rest
    assert run.progress_bar_metrics["batching/batch_size"] == 64


def test_loader_given_to_fit_and_data_module():
    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(TensorDataset(torch.arange(50.0)[:, None]), 4)

    model = Mean(50)
    run = trainer(scripted(4, 8, 16))
    run.fit(model, DataLoader(TensorDataset(torch.arange(50.0)[:, None]), 4))
    assert sorted(model.seen) == sorted(list(range(50)) * 2)
    model, data = Mean(50), Data()
    trainer(scripted(4, 8, 16)).fit(model, datamodule=data)
    assert sorted(model.seen) == sorted(list(range(50)) * 2)
    assert "train_dataloader" not in data.__dict__  # put back
    own = Mean(loader=AdaptiveDataLoader(TensorDataset(torch.arange(50.0)[:, None]), batch_size=4))
    trainer(scripted(4, 8, 16)).fit(own)
    assert sorted(own.seen) == sorted(list(range(50)) * 2)


def test_accumulate_mode_window_means():
    model = Mean(n=56, batch=4, shuffle=False)  # 14 batches, gradient of batch i: 4 i + 1.5
    callback = scripted(16, cap=16, mode="accumulate", estimator="ghost", warmup_steps=1)
    run = fit(model, callback)
    index = [(grad - 1.5) / 4 for _, grad in model.steps[:7]]
    assert index == pytest.approx([0, 1, 2, 3, 5.5, 9.5, 12.5])
    assert sorted(model.seen) == sorted(list(range(56)) * 2)
    assert model.validations == 2
    assert run.accumulate_grad_batches == 1  # put back


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(32.0)[:, None, None])


def test_streams_are_refused_by_name_or_accumulated():
    def loader():
        return DataLoader(Stream(), 4, collate_fn=lambda rows: [torch.stack(rows)[:, 0]])

    with pytest.raises(TypeError, match="IterableDataset cannot be changed; use mode='accumulate'"):
        fit(Mean(loader=loader()), scripted(8, mode="sampler"))
    for given in ((), (loader(),)):  # by the module's hook, and to fit()
        model = Mean(loader=loader())
        run = trainer(scripted(8, 16, mode="auto"))
        with pytest.warns(UserWarning, match="Only accumulation will change"):
            run.fit(model, *given)
        assert len(model.seen) == 64
        assert run.global_step < 16
        assert "train_dataloader" not in model.__dict__  # put back


def test_a_loader_in_an_unknown_order_is_accumulated():
    model = Mean(n=32, batch=4)
    run = trainer(scripted(4, 8), max_epochs=1)
    with pytest.warns(UserWarning, match="in_order=False"):
        run.fit(model, DataLoader(TensorDataset(model.data), 4, in_order=False))
    assert [len(window) for window, _ in model.steps] == [1, 1, 2, 2, 2]


class Chunks:
    """A batch sampler of one's own."""

    def __init__(self, *sizes):
        self.sizes = sizes

    def __iter__(self):
        ends = list(itertools.accumulate(self.sizes))
        return iter([list(range(end - size, end)) for end, size in zip(ends, self.sizes, strict=True)])

    def __len__(self):
        return len(self.sizes)


class Batches(IterableDataset):
    """Makes its own batches."""

    def __iter__(self):
        return iter([(torch.arange(4.0 * i, 4.0 * i + 4)[:, None],) for i in range(8)])


@pytest.mark.parametrize("mode", ["auto", "accumulate"])
@pytest.mark.parametrize("own", ["batch_sampler", "batches"])
def test_a_loader_without_a_batch_size_is_accumulated(mode, own):
    data = TensorDataset(torch.arange(32.0)[:, None])
    loader = DataLoader(data, batch_sampler=Chunks(*8 * [4])) if own == "batch_sampler" else DataLoader(Batches(), None)
    model, callback = Mean(loader=loader), scripted(16, mode=mode)
    trainer(callback, max_epochs=1).fit(model)
    assert [len(window) for window, _ in model.steps][-1] == 4
    assert callback._driver.plan.batch_size == 16
    assert callback.samples_seen == len(model.seen) == 32
    with pytest.raises(ValueError, match=r"`max_batch_size` \(2\) is below the batch .* 4 = 1 processes"):
        fit(Mean(loader=loader), scripted(2, cap=2, max_micro_batch_size=None, mode=mode))


def test_the_rate_follows_batches_of_any_size():
    """In monitor mode, and alone: one large batch is one large batch, and no more."""
    data = TensorDataset(torch.arange(48.0)[:, None])
    for alone in (False, True):
        scaler, seen = BatchSizeLRScaler("linear"), []

        class Look(pl.Callback):
            def on_before_optimizer_step(self, *args, scaler=scaler, seen=seen):
                seen.append(scaler.factor)

        callback = scaler if alone else AdaptiveBatchSize(64, mode="monitor", lr_scaler=scaler)
        model = Mean(loader=DataLoader(data, batch_sampler=Chunks(4, 32, 4, 4, 4)))
        fit(model, callback, Look(), max_epochs=1)
        assert seen == [1, 8, 1, 1, 1]
    assert AdaptiveBatchSize(64, mode="monitor").state_dict()["driver"] == {}


def test_samples_that_a_limit_leaves_out_are_not_counted():
    rates = []
    for mode in ("sampler", "accumulate"):
        model, callback = Mean(n=64, batch=4), scripted(4, mode=mode, warmup_steps=100)
        model.schedule = lambda o: {"scheduler": SamplesLR(o, 40, "linear", final=0.0), "interval": "step"}
        run = fit(model, callback, limit_train_batches=5, accumulate_grad_batches=4, max_epochs=1)
        assert callback.samples_seen == len(model.seen) == 20
        rates.append(run.optimizers[0].param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.5e-4)  # of a known order it is known that the last step is a short one


@pytest.mark.parametrize("mode", ["sampler", "accumulate"])
def test_another_run_begins_afresh_and_the_same_trainer_goes_on(mode):
    scaler = BatchSizeLRScaler("linear")
    callback = scripted(16, mode=mode, max_growth=2.0, estimator="ghost", lr_scaler=scaler)

    def sizes(run, model):
        model.steps = []
        run.fit(model)
        return [sum(map(len, window)) for window, _ in model.steps], scaler.factor, callback.samples_seen

    run, model = trainer(callback, max_epochs=1), Mean(n=64, batch=4)
    first = sizes(run, model)
    assert (first[0][0], max(first[0])) == (4, 16)
    assert first[1:] == (4, 64)
    run.fit_loop.max_epochs = 2
    assert sizes(run, model) == (4 * [16], 4, 128)
    assert sizes(trainer(callback, max_epochs=1), Mean(n=64, batch=4)) == first
    assert callback._steps == len(first[0])


def test_a_scaler_alone_takes_its_reference_from_each_run():
    scaler = BatchSizeLRScaler("linear")
    for batch in (4, 8):
        fit(Mean(n=64, batch=batch), scaler, max_epochs=1)
        assert (scaler.reference_batch_size, scaler.factor) == (batch, 1)


def test_a_run_after_a_resumed_one_knows_nothing_of_its_checkpoint(tmp_path):
    def model():
        return Mean(loader=DataLoader(Batches(), None))

    saver = ModelCheckpoint(tmp_path, save_last=True)
    trainer(scripted(16, mode="auto"), saver, max_epochs=1, enable_checkpointing=True).fit(model())
    callback, resumed, fresh = scripted(16, mode="auto"), model(), model()
    trainer(callback).fit(resumed, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert [len(window) for window, _ in resumed.steps] == [4, 4]
    trainer(callback).fit(fresh)
    assert len(fresh.steps[0][0]) == 1


class Fails(Mean):
    """Raises in the training step of a batch, until told not to."""

    at = 5

    def training_step(self, batch, batch_idx):
        if batch_idx == self.at:
            raise RuntimeError("boom")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("mode", ["sampler", "accumulate"])
def test_everything_is_put_back_after_an_exception(mode):
    model = Fails(n=64, batch=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    model.configure_optimizers = lambda: optimizer
    scaler = BatchSizeLRScaler("linear")
    callback = scripted(4, 8, 16, mode=mode, estimator="ghost", max_micro_batch_size=4, lr_scaler=scaler)
    run = trainer(callback)
    with pytest.raises(RuntimeError, match="boom"):
        run.fit(model)
    assert run.accumulate_grad_batches == 1
    assert "train_dataloader" not in model.__dict__
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert callback.probe._collector is None
    assert scaler.factor > 1
    rates = []
    optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    model.at, model.steps, model.window = None, [], []
    trainer(max_epochs=1).fit(model)
    assert rates == [1e-4] * 16


def test_a_scaler_alone_lets_go_of_an_optimizer_after_an_exception():
    model = Fails(n=64, batch=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    model.configure_optimizers = lambda: optimizer
    with pytest.raises(RuntimeError, match="boom"):
        trainer(BatchSizeLRScaler("linear", reference_batch_size=2)).fit(model)
    rates = []
    optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    model.at = None
    trainer(max_epochs=1).fit(model)
    assert rates == 16 * [1e-4]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("at", [0, 1, 5, 7])
def test_a_checkpoint_written_on_an_exception_continues(at, workers, tmp_path):
    """In mid-window, when a callback has put everything back: the next run goes on after the last batch that ended."""

    def run(model, *others, **kwargs):
        callback = scripted(16, max_growth=2.0, max_micro_batch_size=8)
        trainer(callback, *others, max_epochs=1, enable_checkpointing=bool(others), default_root_dir=tmp_path).fit(
            model, **kwargs
        )

    straight, broken, resumed = Mean(n=80, batch=4), Fails(n=80, batch=4, num_workers=workers), Mean(n=80, batch=4)
    run(straight)
    assert [[len(part) for part in window] for window, _ in straight.steps[:4]] == [[4], [8], [8, 8], [8, 8]]
    broken.at = at
    with pytest.raises(RuntimeError, match="boom"):
        run(broken, OnExceptionCheckpoint(tmp_path))
    run(resumed, ckpt_path=tmp_path / "on_exception.ckpt", weights_only=True)
    assert broken.seen + resumed.seen == straight.seen


class Net(pl.LightningModule):
    """A regression network whose per-sample gradients are known by brute force."""

    def __init__(self, n=64, batch=8, lr=0.0, shuffle=False, layers=None, dtype=torch.float64):
        super().__init__()
        gen = torch.Generator().manual_seed(0)
        self.x, self.y = (torch.randn(n, d, generator=gen, dtype=dtype) for d in (5, 2))
        self.net = (layers or nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 2))).to(dtype)
        self.batch, self.lr, self.shuffle, self.stepped = batch, lr, shuffle, 0

    def loss(self, x, y):
        return (self.net(x) - y).square().sum(1).mean()

    def training_step(self, batch, batch_idx):
        loss = self.loss(*batch)
        self.log("train/loss", loss)
        return loss

    def train_dataloader(self):
        return DataLoader(TensorDataset(self.x, self.y), self.batch, shuffle=self.shuffle)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def grads(self, rows):
        params = list(self.parameters())
        out = [torch.autograd.grad(self.loss(self.x[i : i + 1], self.y[i : i + 1]), params) for i in rows]
        return torch.stack([torch.cat([g.reshape(-1) for g in each]) for each in out])


class Record(Criterion):
    """Keep what is measured, ask for nothing."""

    def __init__(self, *needs):
        self.needs = frozenset(needs)
        self.stats = []

    def target(self, stats):
        self.stats.append(stats)
        return 1.0


@pytest.mark.parametrize(
    ("estimator", "interval", "warmup", "k", "tests"),
    [
        ("ghost", "auto", 0, 1, 4),  # every 8th of 32 steps
        ("ghost", 3, 4, 1, 10),  # steps 4, 7, ..., 31
        ("micro_batch", "auto", 0, 2, 8),  # every 2nd of 16 steps
        ("vmap", "auto", 1, 1, 1),
    ],
)
def test_tests_are_made_at_their_interval(estimator, interval, warmup, k, tests):
    record = Record()
    callback = AdaptiveBatchSize(64, record, estimator, mode="monitor", test_interval=interval, warmup_steps=warmup)
    fit(Net(n=256), callback, accumulate_grad_batches=k, max_epochs=1, limit_val_batches=0)
    assert len(record.stats) == tests


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("estimator", ["micro_batch", "ghost", "vmap"])
def test_measured_statistics_are_those_of_separate_backward_passes(estimator, k):
    if (estimator, k) == ("micro_batch", 1):
        return
    model = Net()
    record = Record("inner", "tensor", "loss", "lr")
    callback = AdaptiveBatchSize(64, record, estimator, mode="monitor", ema=0.0, test_interval=1, denominator="biased")
    fit(model, callback, accumulate_grad_batches=k, max_epochs=1, limit_val_batches=0)
    assert len(record.stats) == 8 // k
    sizes = [p.numel() for p in model.parameters()]
    for step, stats in enumerate(record.stats):
        rows = range(step * 8 * k, (step + 1) * 8 * k)
        grads = model.grads(rows)
        if estimator == "micro_batch":
            expected = GradStats.from_groups(grads.reshape(k, 8, -1).mean(1), 8, sizes)
        else:
            expected = GradStats.from_samples(grads, sizes)
        assert stats.batch_size == 8 * k
        assert stats.trace_cov == pytest.approx(expected.trace_cov, rel=1e-9)
        assert stats.grad_sq_norm == pytest.approx(expected.grad_sq_norm, rel=1e-9)
        torch.testing.assert_close(stats.tensor_trace_cov, expected.tensor_trace_cov, rtol=1e-8, atol=1e-10)
        assert stats.inner_var == pytest.approx(expected.inner_var, rel=1e-8)
        rows = list(rows)
        assert stats.loss == pytest.approx(model.loss(model.x[rows], model.y[rows]).item(), rel=1e-6)
        assert stats.lr == 0.0


def test_element_variances_and_scope():
    record = Record("element")
    model = Net()
    fit(model, AdaptiveBatchSize(64, record, mode="monitor", ema=0.0, denominator="biased", scope=["*3.weight"]),
        accumulate_grad_batches=2, max_epochs=1, limit_val_batches=0)  # fmt: skip
    grads = model.grads(range(16))
    where = slice(-14, -2)  # the last weight, before its bias
    expected = GradStats.from_groups(grads.reshape(2, 8, -1).mean(1)[:, where], 8, [1] * 12)
    torch.testing.assert_close(record.stats[0].tensor_trace_cov, expected.tensor_trace_cov, rtol=1e-9, atol=1e-12)
    norms = Record()
    fit(model, AdaptiveBatchSize(64, norms, mode="monitor", ema=0.0, scope="norm_layers"), max_epochs=1,
        limit_val_batches=0)  # fmt: skip
    assert norms.stats[0].mean_sq_norm < record.stats[0].mean_sq_norm + grads.square().sum(1).mean()
    with pytest.raises(ValueError, match="matches no trainable parameter"):
        fit(model, AdaptiveBatchSize(64, scope=["nothing*"]))


@pytest.mark.parametrize("k", [1, 2])
def test_monitor_leaves_the_training_alone(k):
    def weights(*callbacks):
        torch.manual_seed(1)
        model = Net(lr=0.1, shuffle=True, dtype=torch.float32, layers=nn.Sequential(nn.Linear(5, 6), nn.Dropout(), nn.Linear(6, 2)))  # fmt: skip  # noqa: E501
        trainer(*callbacks, accumulate_grad_batches=k, limit_val_batches=0).fit(model)
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    plain = weights()
    for estimator in ("auto", "vmap"):
        assert torch.equal(weights(AdaptiveBatchSize(64, estimator=estimator, monitor_only=True)), plain)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.layer(self.layer(x)))


def test_a_model_without_ghost_rules_splits_its_steps():
    callback = AdaptiveBatchSize(64, ema=0.0, test_interval=1)
    model = Net(layers=Shared())
    run = fit(model, callback, limit_val_batches=0)
    assert callback.plans.min_accumulate == 2
    assert callback.tests > 0
    assert run.global_step >= 2
    with pytest.raises(MisconfigurationException, match="used twice"):
        fit(Net(layers=Shared()), AdaptiveBatchSize(64, estimator="ghost"))
    batchnorm = AdaptiveBatchSize(64, test_interval=1)
    fit(Net(layers=nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))), batchnorm, limit_val_batches=0)
    assert batchnorm.plans.min_accumulate == 2


def test_explicit_micro_batch_starts_with_two():
    model = Mean()
    fit(model, scripted(8, 16, estimator="micro_batch"))
    assert len(model.steps[0][0]) == 2
    assert [len(part) for part in model.steps[0][0]] == [4, 4]


@pytest.mark.parametrize(
    "criterion",
    [NormTest(0.3), InnerProductTest(0.2), AugmentedInnerProductTest(0.2), CoordinateNormTest(0.3), CABS()],
    ids=lambda c: type(c).__name__,
)
def test_criteria_grow_the_batch(criterion):
    lr = 1e-2
    model = Net(n=200, batch=4, lr=lr, shuffle=True)
    callback = AdaptiveBatchSize(64, criterion, max_micro_batch_size=16, test_interval=1, max_growth=None)
    fit(model, callback, limit_val_batches=0, max_epochs=4)
    assert callback.tests > 0
    if not isinstance(criterion, CABS):
        assert callback._driver.plan.batch_size > 4


def test_lr_scaler_and_samples_schedule_follow_the_steps():
    model = Mean(n=64, batch=4)
    rates = []

    def schedule(optimizer):
        optimizer.register_step_post_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
        return {"scheduler": SamplesLR(optimizer, base="linear", final=0.0), "interval": "step"}

    model.schedule = schedule
    scaler = BatchSizeLRScaler("linear")
    fit(model, scripted(4, 8, 16, lr_scaler=scaler), max_epochs=2)
    sizes = [sum(map(len, window)) for window, _ in model.steps]
    seen = torch.tensor(sizes).cumsum(0)
    assert seen[-1] == 128
    # this hook runs before the scaler takes its factor back
    factors = [rate / (1e-4 * (1 - s / 128)) for rate, s in zip(rates[:-1], seen[:-1].tolist(), strict=True)]
    assert factors == pytest.approx([b / 4 for b in sizes[:-1]], rel=1e-6)


def test_samples_budget_stops_the_run():
    model = Mean(n=64, batch=4)
    callback = scripted(4, 8, max_samples=40)
    run = fit(model, callback, max_epochs=5)
    assert 40 <= callback.samples_seen < 48
    assert callback.samples_seen == len(model.seen)
    assert run.current_epoch < 5


def test_refusals():
    with pytest.raises(ValueError, match=r"`max_batch_size` \(4\) is below the batch .* 8 = 1 processes"):
        fit(Mean(), AdaptiveBatchSize(4))
    with pytest.raises(ValueError, match="`max_micro_batch_size`=65 is above `max_batch_size`=64"):
        AdaptiveBatchSize(64, max_micro_batch_size=65)
    with pytest.raises(ValueError, match="`min_accumulate`=8 micro-batches hold more samples than `max_batch_size`=4"):
        AdaptiveBatchSize(4, min_accumulate=8)
    with pytest.raises(ValueError, match=r"`max_batch_size` \(4\) is less than one sample .* of 2 .* 4 processes"):
        AdaptiveBatchSize(4, min_accumulate=2)._first_plan(BatchPlan(1, 1, 4))
    with pytest.raises(ValueError, match="`accumulate_grad_batches` must be a power of two, got 3: use 2 or 4"):
        fit(Mean(), AdaptiveBatchSize(64), accumulate_grad_batches=3)
    with pytest.raises(MisconfigurationException, match=r"overfit_batches.*mode='monitor'"):
        fit(Mean(), AdaptiveBatchSize(64), overfit_batches=2)
    with pytest.raises(MisconfigurationException, match=r"limit_train_batches=0.5.*mode='monitor'"):
        fit(Mean(), AdaptiveBatchSize(64), limit_train_batches=0.5)
    with pytest.raises(MisconfigurationException, match="GradientAccumulationScheduler"):
        fit(Mean(), AdaptiveBatchSize(64), GradientAccumulationScheduler({0: 2}))
    with pytest.raises(MisconfigurationException, match="SharedSeedSPSAStrategy: there are no gradients"):
        fit(Mean(), AdaptiveBatchSize(64), strategy=SharedSeedSPSAStrategy(lr=1e-4))
    scaler = BatchSizeLRScaler()
    with pytest.raises(MisconfigurationException, match="its `lr_scaler` also among the Trainer's callbacks"):
        fit(Mean(), AdaptiveBatchSize(64, lr_scaler=scaler), scaler)
    manual = Mean()
    manual.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="manual optimization"):
        fit(manual, AdaptiveBatchSize(64))
    several = Mean(loader=[DataLoader(range(4)), DataLoader(range(4))])
    with pytest.raises(MisconfigurationException, match="one DataLoader; the train loader is a list"):
        fit(several, AdaptiveBatchSize(64))
    with pytest.raises(ValueError, match="Three ways out"):
        fit(Mean(), AdaptiveBatchSize(640, InnerProductTest(), "micro_batch", max_micro_batch_size=8))
    with pytest.raises(ValueError, match="there is only one"):
        fit(Mean(), AdaptiveBatchSize(64, estimator="micro_batch", mode="monitor"))
    with pytest.raises(ValueError, match="no per-element variances"):
        fit(Mean(), AdaptiveBatchSize(64, CoordinateNormTest(granularity="element"), "ghost"))
    wrong = {
        "criterion": "norms", "estimator": "hessian", "scope": "most", "mode": "loader", "min_batch_size": 1,
        "max_micro_batch_size": 0, "min_accumulate": 3, "round_to": 0, "quantize": "pow3", "test_interval": 0,
        "warmup_steps": -1, "ema": 1.0, "denominator": "none", "max_growth": 1.0, "min_change": 0.9, "preset": "none",
        "max_samples": 0, "seed": -1,
    }  # fmt: skip
    for name, bad in wrong.items():
        with pytest.raises(ValueError, match=f"`{name}`"):
            AdaptiveBatchSize(64, **{name: bad})
    with pytest.raises(ValueError, match="`max_batch_size`"):
        AdaptiveBatchSize(0)
    model = Mean()
    model.schedule = lambda o: {"scheduler": torch.optim.lr_scheduler.StepLR(o, 5), "interval": "step"}
    run = trainer(AdaptiveBatchSize(64))
    with pytest.warns(UserWarning, match="StepLR counts optimizer steps"):
        run.fit(model)


def test_preset_paper_restores_the_published_rule():
    callback = AdaptiveBatchSize(64, preset="paper")
    controller = callback.controller
    assert (controller.ema, controller.max_growth, controller.denominator) == (0.0, None, "biased")
    assert (controller.allow_decrease, controller.min_change, callback.test_interval) == (False, 1.0, 1)


def test_missing_private_attribute_falls_back_to_accumulation(monkeypatch):
    model = Mean()
    run = trainer(scripted(8, 16, 32))
    del run.fit_loop._data_source
    monkeypatch.setattr(type(run.fit_loop), "setup_data", lambda self: None)  # Lightning itself would need it
    with pytest.warns(UserWarning, match=r"no `fit_loop\._data_source`.*mode='accumulate'"):
        run.callbacks[0].setup(run, model, "fit")
    assert run.callbacks[0]._mode_now() == "accumulate"


def test_no_gradient_copies_by_default():
    callback = AdaptiveBatchSize(8, min_accumulate=2, test_interval=1)
    kept = []

    class Look(pl.Callback):
        def on_before_optimizer_step(self, *args):
            leaves = callback.probe._collector._leaves
            kept.append(sum(t.numel() for n in leaves._norms for t in n) if leaves else 0)
            assert not leaves or (not leaves._kept and all(s is None for s in leaves._sums))

    model = Net(batch=8)
    run = trainer(Look(), callback, limit_val_batches=0)
    run.fit(model)
    assert max(kept) == 2 * len(list(model.parameters()))  # one number per tensor and micro-batch


def test_skipped_tests_are_counted():
    class Broken(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * (math.nan if batch_idx == 1 else 1.0)  # and from then on every weight is nan

    callback = AdaptiveBatchSize(8, test_interval=1)
    fit(Broken(), callback, limit_val_batches=0, max_epochs=1)
    assert (callback.skipped_tests, callback.tests) == (7, 1)


@pytest.mark.parametrize("mode", ["sampler", "accumulate", "monitor"])
@pytest.mark.parametrize(("k", "empty"), [(1, 0), (1, 5), (2, 0), (2, 3)])
def test_a_batch_that_is_none_is_passed_over(mode, k, empty):
    batches = itertools.count()

    def collate(rows):
        return None if next(batches) == empty else torch.utils.data.default_collate(rows)

    model = Mean(n=32, batch=4, shuffle=False, collate_fn=collate)
    callback = scripted(4, mode=mode, estimator="ghost")
    trainer(callback, accumulate_grad_batches=k, max_epochs=1).fit(model)
    assert model.seen == [i for i in range(32) if i // 4 != empty]
    # at a window's last batch Lightning makes no step if that is None
    assert len(model.steps) == (8 if k == 1 else 4) - (k == 1 or empty == 3)
    assert mode == "monitor" or model.steps[0][1] == pytest.approx(
        {(1, 0): 5.5, (2, 0): 5.5, (1, 5): 1.5, (2, 3): 3.5}[k, empty]
    )
    assert mode != "sampler" or callback.state_dict()["driver"]["batches"] == 8


class AsksEarly(Mean):
    """Builds the loader before Lightning hands the callbacks their saved states."""

    def setup(self, stage):
        self.total = self.trainer.estimated_stepping_batches


def test_position_of_a_loader_that_was_built_before_the_checkpoint_was_read(tmp_path):
    def train(ckpt_path=None):
        model, saver = AsksEarly(), ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        run = trainer(scripted(32, max_growth=2.0), saver, enable_checkpointing=True)
        run.fit(model, ckpt_path=ckpt_path)
        return model

    straight = train()
    used = [sum(map(len, window)) for window, _ in straight.steps]
    assert len(set(used)) > 2
    for step in range(1, len(used)):
        assert train(tmp_path / f"step={step}.ckpt").seen == straight.seen[sum(used[:step]) :], step


def test_random_state_checkpoint_goes_with_it(tmp_path):
    fit(Mean(), scripted(8, 16), RandomStateCheckpoint(), enable_checkpointing=True, default_root_dir=tmp_path)
