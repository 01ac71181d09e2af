"""Normalized logistic gradient descent: the bound, the perceptron limit, and the callback for any model."""

from __future__ import annotations

import contextlib
import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, TensorDataset

from lightning_grad import BatchSizeLRScaler, LossNormalizedLR, StabilityMonitor
from lightning_grad.optim.normalized_logistic import normalized_logistic_gd, separation_bound
from tests.unit.test_stability_monitor import Memory


def separable(n, seed):
    g = torch.Generator().manual_seed(seed)
    direction = torch.nn.functional.normalize(torch.randn(5, generator=g, dtype=torch.float64), dim=0)
    z = torch.randn(n, 5, generator=g, dtype=torch.float64)
    margin = 0.1
    return z + (z @ direction < margin)[:, None] * (2 * margin - 2 * (z @ direction))[:, None] * direction, direction


@pytest.mark.parametrize("gamma", [0.1, 1.0, 30.0])
def test_the_bound_holds(gamma):
    for seed in range(10):
        z, direction = separable(40, seed)
        radius, margin = float(z.norm(dim=1).max()), float((z @ direction).min())
        limit = separation_bound(40, radius, margin, gamma)
        theta, steps = normalized_logistic_gd(z, gamma, math.ceil(limit) + 1)
        assert steps <= limit
        assert bool((z @ theta > 0).all())


def test_one_hard_sample_takes_two_steps():
    """Plain gradient descent with a large step needs 46 and 451 steps on these."""
    for n, plain in ((100, 46), (1000, 451)):
        z = torch.tensor([[1.0, 0.0]] * (n - 1) + [[-0.9, 0.436]], dtype=torch.float64)
        assert normalized_logistic_gd(z, 1e6, 1000)[1] == 2
        theta, steps = torch.zeros(2, dtype=torch.float64), 0
        while not bool((z @ theta > 0).all()):
            theta = theta + 1e6 / n * (torch.sigmoid(-(z @ theta)) @ z)
            steps += 1
        assert steps == plain


class Logistic(pl.LightningModule):
    """The same problem as a module; ``y`` in {0, 1}."""

    def __init__(self, schedule=False, key="one_minus_p"):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
        self.schedule, self.key = schedule, key

    def training_step(self, batch, batch_idx):
        margins = batch[0] @ self.weight
        return {"loss": -torch.nn.functional.logsigmoid(margins).mean(), self.key: torch.sigmoid(-margins)}

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        if not self.schedule:
            return optimizer
        halving = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": halving, "interval": "step"}}


def fit(model, z, callbacks, batch_size, steps, accumulate=1):
    memory = Memory()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1, callbacks=callbacks, logger=memory,
        accumulate_grad_batches=accumulate, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(TensorDataset(z), batch_size))
    assert trainer.optimizers[0].param_groups[0]["lr"] == (0.5 * 0.5**steps if model.schedule else 0.5)
    return memory


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_callback_makes_the_steps_of_the_function(accumulate):
    z, _ = separable(40, 3)
    expected = torch.zeros(5, dtype=torch.float64)
    for _ in range(4):
        p = torch.sigmoid(-(z @ expected))
        expected = expected + 0.3 * (p @ z) / p.sum()
    model = Logistic()
    # the monitor calls training_step too, which must not be counted
    callbacks = [StabilityMonitor(every_n_steps=1, k=2, num_probes=1), LossNormalizedLR(0.3, every_n_steps=1)]
    memory = fit(model, z, callbacks, 40 // accumulate, 4, accumulate)
    assert torch.allclose(model.weight, expected, rtol=1e-12, atol=1e-14)
    means = [value for _, value in memory.of("loss_normalized/one_minus_p")]
    assert means[0] == pytest.approx(0.5)
    assert [v for _, v in memory.of("loss_normalized/lr")] == pytest.approx([0.3 / m for m in means])
    assert "training_step" not in vars(model)


def test_schedules_and_the_batch_size_keep_their_effect():
    z, _ = separable(40, 3)
    model = Logistic(schedule=True)
    scaler = BatchSizeLRScaler("linear", reference_batch_size=20)
    fit(model, z, [scaler, LossNormalizedLR(0.3)], 40, 2)
    theta = torch.zeros(5, dtype=torch.float64)
    for factor in (2.0, 1.0):  # twice the reference batch; the schedule halves
        theta = theta + 0.3 * factor * (torch.softmax(torch.nn.functional.logsigmoid(-(z @ theta)), 0) @ z)
    assert torch.allclose(model.weight, theta, rtol=1e-12)


@pytest.mark.parametrize("fails", [False, True])
def test_a_training_step_of_the_instance_comes_back(fails):
    z, _ = separable(8, 0)
    model = Logistic()
    own = model.training_step

    def training_step(batch, batch_idx):
        if fails:
            raise OSError("disk full")
        return own(batch, batch_idx)

    model.training_step = training_step
    with pytest.raises(OSError, match="disk full") if fails else contextlib.nullcontext():
        fit(model, z, [LossNormalizedLR()], 8, 1)
    assert vars(model)["training_step"] is training_step


@pytest.mark.parametrize("left_out", [(), (1,), (2, 3)])
def test_micro_batches_that_are_left_out_do_not_count(left_out):
    z, _ = separable(40, 3)

    class Skips(Logistic):
        def training_step(self, batch, batch_idx):
            return None if batch_idx in left_out else super().training_step(batch, batch_idx)

    model = Skips()
    fit(model, z, [LossNormalizedLR(0.3)], 10, 2, accumulate=2)
    theta = torch.zeros(5, dtype=torch.float64)
    for window in ((0, 1), (2, 3)):
        used = [z[10 * k : 10 * k + 10] for k in window if k not in left_out]
        if used:
            gradient = sum((torch.sigmoid(-(part @ theta)) @ part) / 10 for part in used) / 2
            theta = theta + 0.3 * gradient / torch.sigmoid(-(torch.cat(used) @ theta)).mean()
    assert torch.allclose(model.weight, theta, rtol=1e-12)


def test_refused_by_name():
    z, _ = separable(8, 0)
    with pytest.raises(ValueError, match="`gamma`"):
        LossNormalizedLR(gamma=0.0)
    with pytest.raises(MisconfigurationException, match="'one_minus_p'"):
        fit(Logistic(key="p"), z, [LossNormalizedLR()], 8, 1)
    with pytest.raises(MisconfigurationException, match="both set the learning rate"):
        fit(Logistic(), z, [LossNormalizedLR(), LossNormalizedLR(2.0)], 8, 1)
