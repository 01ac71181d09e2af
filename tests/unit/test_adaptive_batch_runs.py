"""AdaptiveBatchSize over whole runs: random plans, a known right answer, TensorBoard, YAML, an unknown Lightning."""

import itertools
import random
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset

from lightning_grad import AdaptiveBatchSize, BatchSizeLRScaler, NoiseScale, NormTest
from lightning_grad.callbacks import _batch_checks
from lightning_grad.demos import DigitsData, DigitsMLP
from tests.unit.test_adaptive_batch_size import Mean, Net, fit, scripted, trainer

ROOT = Path(__file__).parents[2]


class Bar(TQDMProgressBar):
    """Counts how often the bar is full, and whether it ever ran over."""

    def __init__(self):
        super().__init__()
        self.full = self.over = 0

    def on_train_batch_end(self, *args):
        super().on_train_batch_end(*args)
        total, n = self.train_progress_bar.total, self.train_progress_bar.n
        self.full += n == total
        self.over += n > total


def check_random_run(seed, workers=0):
    rng = random.Random(seed)
    n, micro, epochs = rng.randint(20, 120), rng.choice([1, 2, 3, 5, 8]), rng.randint(1, 3)
    k = rng.choice([1, 1, 2, 4])
    interval = rng.choice([1.0, 1.0, 0.5, 0.25])
    targets = [rng.randint(1, 64) for _ in range(200)]
    callback = scripted(
        *targets,
        cap=64,
        min_batch_size=2,
        max_micro_batch_size=rng.choice([micro, 8, 16]),
        min_accumulate=rng.choice([1, 2]),
        round_to=rng.choice([1, 1, 2]),
        allow_decrease=rng.random() < 0.7,
    )
    model, bar = Mean(n=n, batch=micro, num_workers=workers), Bar()
    run = fit(
        model,
        callback,
        bar,
        max_epochs=epochs,
        accumulate_grad_batches=k,
        val_check_interval=interval,
        enable_progress_bar=True,
    )
    assert len(model.seen) == n * epochs == callback.samples_seen
    for epoch in range(epochs):
        assert sorted(model.seen[epoch * n : (epoch + 1) * n]) == list(range(n))
    for window, grad in model.steps:
        means = [sum(part) / len(part) for part in window]
        assert grad == pytest.approx(sum(means) / len(means), rel=1e-5, abs=1e-6)
    # a batch may span several of the points at which validation is due; one validation then serves all of them
    assert epochs <= model.validations <= round(epochs / interval)
    assert interval < 1.0 or model.validations == epochs
    assert (run.current_epoch, run.global_step) == (epochs, len(model.steps))
    assert (bar.full, bar.over) == (epochs, 0)
    return len({sum(map(len, window)) for window, _ in model.steps})


def test_random_plans_in_a_trainer(capfd):
    sizes = [check_random_run(seed) for seed in range(25)]
    assert sum(size > 2 for size in sizes) > 15  # most runs did change the batch more than once


def test_random_plans_with_workers(capfd):
    for seed in (100, 101):
        check_random_run(seed, workers=2)


@pytest.mark.slow
def test_many_random_plans_in_a_trainer(capfd):
    for seed in range(1000, 1150):
        check_random_run(seed)


def test_rich_progress_bar_follows(capfd):
    pytest.importorskip("rich")
    ends = []

    class Bar(RichProgressBar):
        def on_train_epoch_end(self, *args):
            super().on_train_epoch_end(*args)
            ends.append(self.progress.tasks[self.train_progress_bar_id].total)

    model = Mean()
    fit(model, scripted(8, 8, 16, 32, 64), Bar(), enable_progress_bar=True)
    first = len(model.window) + sum(len(window) for window, _ in model.steps) - 8
    assert ends == [first, 8]  # the second epoch of 103 samples: 4 micro-batches of 16, and as many with the rest


class Quadratic(pl.LightningModule):
    r"""loss_i = 1/2 sum_j h_j (w_j - x_ij)^2 at frozen weights: G = h (w - mean x), Sigma = diag(h^2 var x)."""

    def __init__(self, seed, n=20_000, d=48):
        super().__init__()
        gen = torch.Generator().manual_seed(seed)
        self.h = torch.logspace(0, -1.5, d, dtype=torch.float64)
        self.x = torch.randn(n, d, generator=gen, dtype=torch.float64) * 5.0
        self.w = torch.nn.Parameter(torch.randn(d, generator=gen, dtype=torch.float64))

    @property
    def noise_scale(self):
        signal = self.h * (self.w.detach() - self.x.mean(0))
        return float((self.h.square() * self.x.var(0)).sum() / signal.square().sum())

    def training_step(self, batch, batch_idx):
        return 0.5 * (self.h * (self.w - batch[0]).square()).sum(1).mean()

    def train_dataloader(self):
        return DataLoader(TensorDataset(self.x), 8, shuffle=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def reached(model, estimator, seeds=4, steps=500, late=300):
    """Mean batch of the later steps and mean target of their tests, over what the closed form asks for."""
    sizes, targets = [], []
    for seed in range(seeds):
        net = model(seed)
        wanted = net.noise_scale / 0.5**2
        callback = AdaptiveBatchSize(
            1024, NormTest(0.5), estimator, max_micro_batch_size=512, allow_decrease=True, min_batch_size=2,
            test_interval=1,
        )  # fmt: skip
        decide = callback.controller.decide

        def decided(*args, decide=decide, callback=callback, wanted=wanted):
            decision = decide(*args)
            if decision is not None and callback._steps > steps - late:
                targets.append(decision.target / wanted)
                sizes.append(callback._active.plan.batch_size / wanted)
            return decision

        callback.controller.decide = decided
        fit(net, callback, max_epochs=-1, max_steps=steps)
    return sum(sizes) / len(sizes), sum(targets) / len(targets)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["micro_batch", "vmap"])
def test_noisy_quadratic_reaches_the_closed_form(estimator):
    """Every other setting at its default; two micro-batches a step, or the gradient of each sample."""
    size, target = reached(Quadratic, estimator)
    assert size == pytest.approx(1.0, rel=0.1)
    assert target == pytest.approx(1.0, rel=0.05)


class Quiet(Quadratic):
    """Nine samples are enough."""

    def __init__(self, seed):
        super().__init__(seed)
        self.x -= self.x.mean(0)
        self.x *= (9.0 * 0.5**2 / self.noise_scale) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("estimator", "parts"), [("micro_batch", 2), ("vmap", 1)])
def test_a_small_target_is_overshot_by_no_more_than_its_rounding(estimator, parts):
    """The target is unbiased; a batch is the next whole number of samples, in as many equal parts: +1/2, +1 on average.

    Hysteresis (a change by less than a tenth is not made) adds less than half a sample more.
    """
    size, target = reached(Quiet, estimator)
    assert target == pytest.approx(1.0, rel=0.05)
    assert 0.25 / 9 < size - target < (parts / 2 + 0.5) / 9


class AdaGradDigits(DigitsMLP):
    def configure_optimizers(self):
        return torch.optim.Adagrad(self.parameters(), lr=0.05)


@pytest.mark.slow
def test_digits_are_learnt_as_well_in_far_fewer_steps():
    """AdaGrad from batches of 8: mean accuracy of two seeds within 1 % of that with the fixed batch, as specified.

    One image of 449 in one of the two runs is 0.11 %. Six seeds gave 0.981 and 0.976, 3360 steps and about 200.
    """
    found = {False: [], True: []}
    for seed, adaptive in itertools.product(range(2), found):
        pl.seed_everything(seed, verbose=False)
        callback, sizes = AdaptiveBatchSize(256, NormTest(0.5), max_micro_batch_size=256), []

        class Look(pl.Callback):
            def on_train_batch_end(self, *args, callback=callback, sizes=sizes):
                sizes.append(callback._active.plan.batch_size)

        run = trainer(*([callback, Look()] if adaptive else []), max_epochs=20, check_val_every_n_epoch=20)
        run.fit(AdaGradDigits(), datamodule=DigitsData(batch_size=8, seed=seed))
        assert sizes == sorted(sizes)
        found[adaptive].append((float(run.callback_metrics["val/acc"]), run.global_step))
    accuracy, steps = ([sum(run[i] for run in runs) / 2 for runs in found.values()] for i in range(2))
    assert accuracy[1] > accuracy[0] - 0.01
    assert steps[1] < steps[0] / 5


def test_a_run_shorter_than_the_logging_interval_shows_its_batch_size(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    fit(Net(n=40, batch=4, lr=1e-2), AdaptiveBatchSize(8), logger=logger, log_every_n_steps=50, max_epochs=1,
        limit_val_batches=0)  # fmt: skip
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("batching/batch_size")
    assert (events[0].step, events[0].value) == (0, 4)


def test_tensorboard_shows_batch_noise_test_samples_and_learning_rate(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    callback = AdaptiveBatchSize(
        64,
        NormTest(0.3),
        max_micro_batch_size=16,
        test_interval=1,
        max_growth=None,
        lr_scaler=BatchSizeLRScaler("gain", critical_batch="noise_scale"),
        log_vs_samples=True,
    )
    fit(Net(n=200, batch=4, lr=1e-2, shuffle=True), callback, logger=logger, log_every_n_steps=1, max_epochs=2,
        limit_val_batches=0)  # fmt: skip
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {
        "batching/batch_size", "batching/micro_batch_size", "batching/accumulate", "batching/noise_scale",
        "batching/target", "batching/test_ratio", "batching/trace_cov", "batching/grad_sq_norm",
        "batching/samples_seen", "batching/lr_factor", "batching/test_time_ms", "batching/skipped_tests",
        "lr_scaling/factor", "lr_scaling/effective_lr", "lr_scaling/critical_batch",
        "samples/batch_size", "samples/train_loss",
    } <= tags  # fmt: skip

    def values(tag):
        return {event.step: event.value for event in events.Scalars(tag)}

    assert max(values("batching/samples_seen").values()) == 400
    assert max(values("samples/train_loss")) == 400  # its axis is samples
    sizes, seen = values("batching/batch_size"), values("batching/samples_seen")
    assert max(sizes.values()) > 16
    ratio, target = values("batching/test_ratio"), values("batching/target")
    steps = sorted(seen)
    full = [b for a, b in itertools.pairwise(steps) if seen[b] - seen[a] == sizes[b] and b in ratio and b in target]
    assert len(full) > 3  # a last step of an epoch may hold fewer samples than its plan
    for step in full:
        assert target[step] / ratio[step] == pytest.approx(sizes[step], rel=1e-5)
    rate = values("lr_scaling/effective_lr")
    factor = values("lr_scaling/factor")
    assert rate == pytest.approx({step: 1e-2 * factor[step] for step in rate}, rel=1e-5)
    assert len(seen) > 3


def test_unknown_lightning_says_so_and_accumulates(monkeypatch):
    monkeypatch.setattr(_batch_checks, "missing_for_variable_length", lambda trainer: "fit_loop._data_fetcher")
    model = Mean(n=96, batch=4)
    run = trainer(scripted(4, 8, 16, mode="auto"))
    with pytest.warns(UserWarning, match=r"this version of Lightning has no `fit_loop\._data_fetcher`"):
        run.fit(model)
    assert sorted(model.seen) == sorted(list(range(96)) * 2)
    assert {len(part) for window, _ in model.steps for part in window} == {4}  # the loader's batch never changed
    assert max(len(window) for window, _ in model.steps) == 4
    assert model.validations == 2


def test_criterion_by_name():
    assert AdaptiveBatchSize(64, "noise_scale").criterion.multiplier == NoiseScale().multiplier
    with pytest.raises(ValueError, match="`criterion` must be one of"):
        AdaptiveBatchSize(64, "norms")


def test_gradients_are_neither_copied_nor_kept_apart():
    """The hook reads the very tensor that becomes ``.grad``: nothing is copied for it, and nothing is held by it."""

    class Plain(Net):
        def on_after_backward(self):
            self.pointers = [p.grad.data_ptr() for p in self.parameters()]

    seen = []
    model = Plain()
    callback = AdaptiveBatchSize(64, estimator="micro_batch", min_accumulate=2, test_interval=1)

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            for p in pl_module.parameters():
                p.register_hook(lambda grad: seen.append(grad.data_ptr()))

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 0:
                stolen = [ptr in seen for ptr in pl_module.pointers]
                # a Linear's weight gradient comes transposed and PyTorch itself makes it contiguous
                assert all(s for s, p in zip(stolen, pl_module.parameters(), strict=True) if p.ndim == 1), stolen

    run = trainer(Look(), callback, limit_val_batches=0, max_epochs=1)
    run.fit(model)
    assert callback.tests > 0


@pytest.mark.parametrize("config", ["config.yaml", "adadagrad.yaml", "adadagradnorm.yaml"])
def test_published_methods_run_from_yaml(config, tmp_path, monkeypatch, capfd):
    from lightning_grad.cli import main

    monkeypatch.chdir(tmp_path)
    path = ROOT / "examples" / "adaptive_batch" / config
    short = ["--trainer.max_steps=6", "--trainer.limit_val_batches=1", f"--trainer.default_root_dir={tmp_path}"]
    assert main(["fit", "-c", str(path), *short]) == 0
    (log,) = tmp_path.glob("runs/**/events*")
    events = EventAccumulator(str(log)).Reload()
    sizes = [event.value for event in events.Scalars("batching/micro_batch_size")]
    if config != "config.yaml":  # which waits an epoch
        assert sizes[-1] > 16


@pytest.mark.parametrize("mode", ["sampler", "accumulate"])
@pytest.mark.parametrize("estimator", ["auto", "ghost", "micro_batch"])
def test_one_sample_at_first_and_one_left_at_the_end(mode, estimator):
    model = Mean(n=33, batch=1)
    run = fit(model, scripted(2, 4, 8, mode=mode, estimator=estimator), max_epochs=2)
    assert sorted(model.seen) == sorted(list(range(33)) * 2)
    assert sum(map(len, model.steps[0][0])) == 2
    assert run.callbacks[0].tests > 0
