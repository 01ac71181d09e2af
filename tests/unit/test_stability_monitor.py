"""StabilityMonitor and SGDTemperatureMonitor inside a Trainer."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_grad import NVFP4Precision, SharedSeedSPSAStrategy
from lightning_grad.callbacks._curvature import check_supported
from lightning_grad.callbacks.lanczos_learning_rate import LanczosLearningRate
from lightning_grad.callbacks.stability import SGDTemperatureMonitor, StabilityMonitor
from lightning_grad.statistics.stability import cosine


class Memory(Logger):
    """Keeps what is logged."""

    name = version = "memory"

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def of(self, tag):
        return [(step, row[tag]) for step, row in self.rows if tag in row]


class Net(pl.LightningModule):
    """Dropout, BatchNorm, a metric and a schedule: everything a second look at the loss could disturb."""

    def __init__(self, optimizer=lambda p: torch.optim.SGD(p, lr=0.05), dropout=0.3):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))
        self.make = optimizer
        self.accuracy = MulticlassAccuracy(3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        self.accuracy(logits, y)
        self.log("train/acc", self.accuracy)
        return F.cross_entropy(logits, y)

    def configure_optimizers(self):
        optimizer = self.make(self.parameters())
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loader(batch_size=8):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(48, 4, generator=generator), torch.randint(0, 3, (48,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size)


def fit(callbacks, model=None, logger=True, steps=6, **kwargs):
    pl.seed_everything(0, verbose=False)
    model = model or Net()
    memory = Memory()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1, callbacks=callbacks,
        logger=memory if logger else False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1, **kwargs,
    )  # fmt: skip
    trainer.fit(model, loader())
    return model, memory


def test_training_is_not_touched_and_values_are_logged():
    plain, before = fit([])
    watched, memory = fit([StabilityMonitor(every_n_steps=2, k=4, num_probes=2, batch_sharpness_batches=1)])
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True)
    )
    assert memory.of("train/acc") == before.of("train/acc")
    assert [step for step, _ in memory.of("stability/lambda_max")] == [0, 2, 4]
    for tag in ("trace", "frobenius", "lr_over_gd_limit", "lr_over_sgd_limit", "batch_sharpness"):
        assert len(memory.of(f"stability/{tag}")) == 3, tag
    assert "log" not in vars(watched)


def test_values_are_right():
    """Without dropout and BatchNorm, against the full Hessian of the same batch."""

    class Linear(Net):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 3)

    torch.manual_seed(0)
    model = Linear()
    x, y = next(iter(loader()))
    shapes = [p.shape for p in model.parameters()]

    def loss(flat):
        w, b = flat.split([12, 3])
        return F.cross_entropy(F.linear(x.double(), w.view(shapes[0]), b), y)

    flat = torch.cat([p.detach().reshape(-1) for p in model.net.parameters()]).double()
    h = torch.func.hessian(loss)(flat)
    _, memory = fit([StabilityMonitor(k=15, num_probes=400)], model=model, steps=1)
    largest = float(torch.linalg.eigvalsh(h)[-1])
    assert memory.of("stability/lambda_max")[0][1] == pytest.approx(largest, rel=1e-4)
    assert memory.of("stability/trace")[0][1] == pytest.approx(float(h.trace()), rel=0.05)
    assert memory.of("stability/frobenius")[0][1] == pytest.approx(float((h**2).sum().sqrt()), rel=0.05)
    assert memory.of("stability/lr_over_gd_limit")[0][1] == pytest.approx(0.05 * largest / 2, rel=1e-4)


def test_nothing_is_computed_without_a_logger(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("computed")

    monkeypatch.setattr("lightning_grad.callbacks.stability.curvature_operator", forbidden)
    with pytest.warns(UserWarning, match="StabilityMonitor measures nothing: the Trainer has no logger") as warned:
        fit([StabilityMonitor(every_n_steps=1)], logger=False)
    assert sum("measures nothing" in str(w.message) for w in warned) == 1
    with pytest.raises(AssertionError):
        fit([StabilityMonitor(every_n_steps=1)])


def test_accumulation_counts_steps():
    monitor, temperature = StabilityMonitor(every_n_steps=2, k=3), SGDTemperatureMonitor(every_n_steps=2)
    _, memory = fit([monitor, temperature], accumulate_grad_batches=3, steps=4)
    assert [step for step, _ in memory.of("stability/trace")] == [0, 2]
    # 3 batches of 8; the learning rate decays by 0.9 a step, and the first logged step is number 1
    assert memory.of("noise/temperature") == [
        (1, pytest.approx(0.05 * 0.9 / 24)),
        (3, pytest.approx(0.05 * 0.9**3 / 24)),
    ]


def test_adam_and_momentum():
    _, memory = fit([StabilityMonitor(every_n_steps=2, k=4)], Net(lambda p: torch.optim.AdamW(p, lr=1e-3)))
    assert [step for step, _ in memory.of("stability/lr_over_gd_limit")] == [2, 4]  # no second moments at step 0
    assert not memory.of("stability/lr_over_sgd_limit")
    sgd = Net(lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9))
    _, memory = fit([StabilityMonitor(every_n_steps=2, k=4), SGDTemperatureMonitor(1)], sgd)
    assert memory.of("stability/lr_over_gd_limit")
    assert not memory.of("stability/lr_over_sgd_limit")
    (_, t), (_, tm) = memory.of("noise/temperature")[0], memory.of("noise/temperature_momentum")[0]
    assert tm == pytest.approx(10 * t)


@pytest.mark.parametrize("first", [True, False])
def test_the_learning_rate_that_is_applied_is_compared(first):
    """Whatever the order of the callbacks: the other one halves the learning rate in the step."""
    monitor, scaler = StabilityMonitor(k=3), LanczosLearningRate(lr_bounds=(0.025, 0.025))
    _, memory = fit([monitor, scaler] if first else [scaler, monitor], Valley(1.0), steps=1)
    assert memory.of("stability/lr_over_gd_limit") == [(0, pytest.approx(0.025 * 4.0 / 2))]


def test_other_signatures_of_training_step():
    class Short(Net):
        def training_step(self, batch):
            return super().training_step(batch, 0)

    _, memory = fit([StabilityMonitor(k=3)], Short(), steps=1)
    assert len(memory.of("stability/lambda_max")) == 1

    class Fetches(Net):
        def training_step(self, dataloader_iter):
            return super().training_step(next(dataloader_iter)[0], 0)

    with pytest.raises(MisconfigurationException, match=r"StabilityMonitor .* `dataloader_iter`"):
        fit([StabilityMonitor(k=3)], Fetches(), steps=1)


def test_a_batch_that_training_step_skips_is_skipped():
    class Skips(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if self.trainer.global_step == 0 and not self.seen.append(0) and len(self.seen) < 3 else loss

        seen: ClassVar[list[int]] = []

    monitor = StabilityMonitor(every_n_steps=2, k=3)
    _, memory = fit([monitor], Skips(), steps=4)
    assert memory.of("stability/skipped")
    assert [step for step, _ in memory.of("stability/lambda_max")][-1] == 2


def test_parameters_outside_the_optimizer_and_unused_ones_are_no_obstacle():
    class Partly(Net):
        def __init__(self):
            super().__init__(lambda p: torch.optim.AdamW(p, lr=1e-3))
            self.outside, self.unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))

        def parameters(self, recurse=True):  # what configure_optimizers hands over
            return (p for n, p in self.named_parameters() if n != "outside")

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 50.0 * self.outside.square().sum()

    _, memory = fit([StabilityMonitor(every_n_steps=1, k=4)], Partly(), steps=3)
    assert len(memory.of("stability/lr_over_gd_limit")) == 2
    assert memory.of("stability/lambda_max")[0][1] < 50.0  # the outside ones have curvature 100


def test_large_models_keep_no_basis(monkeypatch):
    """Trace, norm and largest eigenvalue are the same with two vectors as with all of them."""
    values = []
    for limit in (1000, 10):
        monkeypatch.setattr("lightning_grad.callbacks._curvature._FULL_UP_TO", limit)
        _, memory = fit([StabilityMonitor(k=4)], steps=1)
        values.append([memory.of(f"stability/{tag}")[0][1] for tag in ("lambda_max", "trace", "frobenius")])
    assert values[0] == pytest.approx(values[1], rel=1e-4)


class Valley(pl.LightningModule):
    """Half of L w^2 along one weight of 3, whatever the batch."""

    def __init__(self, lr):
        super().__init__()
        self.w, self.lr, self.path = nn.Parameter(torch.tensor([1.0, 0.5, -0.5])), lr, []

    def on_train_batch_start(self, *args):
        self.path.append(self.w.detach().clone())

    def training_step(self, batch, batch_idx):
        return 0.5 * 4.0 * self.w[0] ** 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@pytest.mark.parametrize(("lr", "expected"), [(0.1, 1.0), (0.4, -1.0)])  # the weight changes its sign above 1/L = 0.25
def test_oscillation_is_the_cosine_of_successive_gradients(lr, expected):
    monitor = StabilityMonitor(every_n_steps=6, k=2, oscillation_steps=2)
    _, memory = fit([monitor], Valley(lr), steps=10)
    # measured at steps 0 and 6, whose pairs end two steps later
    assert memory.of("stability/oscillation") == [(2, pytest.approx(expected)), (8, pytest.approx(expected))]
    assert monitor.state_dict()["gradient"] == []
    _, memory = fit([StabilityMonitor(every_n_steps=6, k=2)], Valley(lr), steps=10)
    assert not memory.of("stability/oscillation")


def test_gradients_that_are_zeroed_in_place_are_compared_all_the_same():
    class InPlace(Valley):
        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            optimizer.zero_grad(set_to_none=False)

    _, memory = fit([StabilityMonitor(every_n_steps=6, k=2, oscillation_steps=2)], InPlace(0.4), steps=4)
    assert memory.of("stability/oscillation") == [(2, pytest.approx(-1.0))]


def test_cosine_of_parts():
    a, b = [torch.tensor([[3.0], [0.0]]), torch.tensor([4.0])], [torch.tensor([[0.0], [2.0]]), torch.tensor([1.0])]
    assert cosine(a, b) == pytest.approx(4 / (5 * 5**0.5))
    assert cosine(a, [torch.zeros(2, 1), torch.zeros(1)]) == 0.0


def test_distance_from_the_initial_weights():
    model, memory = fit([StabilityMonitor(every_n_steps=2, k=2, distance_from_init=True)], Valley(0.1), steps=9)
    found = memory.of("weights/distance_from_init")
    assert [step for step, _ in found] == [0, 2, 4, 6, 8]
    assert [value for _, value in found] == pytest.approx([float((w - model.path[0]).norm()) for w in model.path[::2]])
    steps, distances = np.array(found[1:]).T
    slopes = memory.of("weights/distance_per_log_step")
    assert [step for step, _ in slopes] == [4, 6, 8]  # two steps make a line; step 0 has no logarithm
    assert slopes[-1][1] == pytest.approx(np.polyfit(np.log(steps), distances, 1)[0])


class Unfreeze(BaseFinetuning):
    """The first layer joins after the first epoch."""

    def __init__(self, lr=1.0):
        super().__init__()
        self.lr = lr

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=self.lr)


@pytest.mark.parametrize("first", [True, False])
def test_distance_of_weights_that_join_later(first):
    model = Net(optimizer=lambda p: torch.optim.SGD([q for q in p if q.requires_grad], lr=0.05))
    start = [p.detach().clone() for p in model.parameters()]
    seen = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, *args):
            gaps = [(p.detach() - q).norm() for p, q in zip(pl_module.parameters(), start, strict=True)]
            seen.append(float(torch.stack(gaps).norm()))

    monitor = StabilityMonitor(every_n_steps=4, k=2, num_probes=1, distance_from_init=True)
    others = [Unfreeze(), monitor] if first else [monitor, Unfreeze()]
    _, memory = fit([*others, Look()], model, steps=12)
    found = memory.of("weights/distance_from_init")
    assert [step for step, _ in found] == [0, 4, 8]
    assert [value for _, value in found] == pytest.approx(seen[::4], rel=1e-5)
    assert len(monitor.state_dict()["initial"]) == len(start)


def test_initial_weights_of_an_old_checkpoint_have_no_names():
    old = StabilityMonitor(every_n_steps=2, k=2, distance_from_init=True)
    start = torch.tensor([3.0, 4.0, 5.0])
    old.load_state_dict(old.state_dict() | {"initial": [start]})
    model = Valley(0.1)
    fit([old], model, steps=1)
    assert torch.equal(old.state_dict()["initial"]["w"], start.to(model.w.dtype))


class Follower(SingleDeviceStrategy):
    """A process that hears from the first one what that has."""

    def __init__(self, logs):
        super().__init__("cpu")
        self.logs = logs

    def broadcast(self, obj, src=0):
        return self.logs if isinstance(obj, bool) else obj


@pytest.mark.parametrize("logs", [True, False])
def test_all_processes_measure_if_the_first_one_has_a_logger(logs):
    """Measuring is done together: a process that stays out makes the others wait for ever."""
    model, calls = Net(), []
    model.curvature_loss = lambda batch: (calls.append(1), F.cross_entropy(model.net(batch[0]), batch[1]))[1]
    monitor = StabilityMonitor(every_n_steps=1, k=2, num_probes=1, batch_sharpness_batches=1, distance_from_init=True)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=2, callbacks=[monitor], logger=False if logs else Memory(),
        strategy=Follower(logs), enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, loader())
    assert bool(calls) is logs


class Manual(Net):
    """Steps every fourth batch, by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def curvature_loss(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.curvature_loss(batch))
        if batch_idx % 4 == 3:
            self.optimizers().step()
            self.optimizers().zero_grad()


@pytest.mark.parametrize("make", [StabilityMonitor, partial(LanczosLearningRate, early=False)])
def test_manual_accumulation_is_measured_once_a_step(make, tmp_path):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.fit_loop.total_batch_idx == 9:  # within the third step
                trainer.save_checkpoint(tmp_path / "within.ckpt")

    def measured_at(ckpt_path=None):
        callback, steps = make(every_n_steps=2, k=2, num_probes=1), []
        measure = callback._measure
        callback._measure = lambda trainer, *args: (steps.append(trainer.global_step), measure(trainer, *args))
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_epochs=2, callbacks=[callback, Save()], logger=Memory(),
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Manual(), loader(4), ckpt_path=ckpt_path)
        return steps

    assert measured_at() == [0, 2, 4]
    assert measured_at(tmp_path / "within.ckpt") == [4]


def test_what_is_logged_survives_a_resume_at_every_step(tmp_path):
    def run(folder, ckpt_path=None):
        memory = Memory()
        monitor = StabilityMonitor(every_n_steps=3, k=2, oscillation_steps=2, distance_from_init=True)
        keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_steps=10, max_epochs=-1, callbacks=[monitor, keep], logger=memory,
            enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
        )  # fmt: skip
        trainer.fit(Valley(0.1), loader(), ckpt_path=ckpt_path)
        return {k: memory.of(k) for k in sorted({k for _, row in memory.rows for k in row if "/" in k})}

    straight = run(tmp_path / "straight")
    assert {"stability/oscillation", "weights/distance_per_log_step"} <= straight.keys()
    for step in range(1, 10):
        resumed = run(tmp_path / f"resumed{step}", tmp_path / "straight" / f"step={step}.ckpt")
        expected = {k: [(s, v) for s, v in rows if s >= step] for k, rows in straight.items()}
        assert resumed == {k: rows for k, rows in expected.items() if rows}, f"resumed after step {step}"


def test_weights_that_are_not_finite_do_not_reach_the_state():
    class Lost(Valley):
        def on_train_batch_end(self, *args):
            if self.trainer.global_step == 3:
                self.w.data[0] = float("nan")

    monitor = StabilityMonitor(every_n_steps=2, k=2, oscillation_steps=1, distance_from_init=True)
    _, memory = fit([monitor], Lost(0.1), steps=8)
    assert [step for step, _ in memory.of("weights/distance_from_init")] == [0, 2]
    assert memory.of("stability/skipped")[-1][1] > 0
    state = monitor.state_dict()
    assert all(np.isfinite(state["distances"]))
    assert all(np.isfinite(state["cosines"]))
    assert all(np.isfinite(v) for _, row in memory.rows for k, v in row.items() if k.startswith(("stab", "weights")))


class FourBit(Net):
    """Layers large enough for NVFP4."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 32), nn.Linear(32, 32), nn.Linear(32, 3))


def test_refused_by_name():
    for kwargs, text in (({"k": 1}, "`k`"), ({"every_n_steps": 0}, "every_n_steps"), ({"mode": "exact"}, "mode")):
        with pytest.raises(ValueError, match=text):
            StabilityMonitor(**kwargs)
    with pytest.raises(ValueError, match="bfloat16"):
        fit([StabilityMonitor()], precision="bf16-true")

    for callback in (StabilityMonitor(), LanczosLearningRate()):
        with pytest.raises(MisconfigurationException, match=f"{type(callback).__name__} .*differentiated twice"):
            fit([callback], FourBit(), plugins=[NVFP4Precision(keep_last=0)])
    spsa = SimpleNamespace(strategy=SharedSeedSPSAStrategy())
    with pytest.raises(MisconfigurationException, match="SharedSeedSPSAStrategy takes none"):
        check_supported("StabilityMonitor", spsa, Net())

    class Manual(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(MisconfigurationException, match="curvature_loss"):
        fit([StabilityMonitor()], Manual())


def test_csv_logger_takes_it(tmp_path):
    _, memory = fit([StabilityMonitor(k=3)], steps=1)
    assert memory.rows
    logger = CSVLogger(tmp_path)
    logger.log_metrics(memory.rows[0][1], 0)
    logger.save()


@pytest.mark.parametrize(("nesterov", "said"), [(False, False), (True, True)])
def test_an_optimizer_without_a_limit_is_named(nesterov, said, caplog):
    model = Net(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=nesterov))
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fit([StabilityMonitor(every_n_steps=5)], model, steps=1)
    assert ("no limit of the learning rate is known for SGD" in caplog.text) == said


@pytest.mark.parametrize(("optimizer", "steps", "said"), [
    (torch.optim.SGD, 20, "measured once in 20 steps, at step 0; every_n_steps=2 "),
    (torch.optim.AdamW, 20, "where Adam has no second moments yet and so no limit is known; every_n_steps=2 "),
    (torch.optim.SGD, 21, None),
])  # fmt: skip
def test_a_run_too_short_for_a_second_measurement_says_so(optimizer, steps, said, caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fit([StabilityMonitor(every_n_steps=20, k=3)], Net(lambda p: optimizer(p, lr=1e-3)), steps=steps)
    assert said in caplog.text if said else "measured once" not in caplog.text
