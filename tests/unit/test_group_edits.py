"""Edits of a step, sample-based schedules, and the batch-size scaler, under torch's schedulers and in a Trainer."""

import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR

from lightning_grad import BatchSizeLRScaler, SamplesLR
from lightning_grad.optim.group_edits import GroupEdits


def one_parameter(lr=0.1, cls=torch.optim.SGD, **kwargs):
    weight = torch.nn.Parameter(torch.ones(()))
    weight.grad = torch.ones(())
    return weight, cls([weight], lr=lr, **kwargs)


def test_edits_multiply_and_are_undone_in_any_order():
    weight, optimizer = one_parameter()
    edits = GroupEdits.of(optimizer)
    assert GroupEdits.of(optimizer) is edits
    first = edits.add(lambda i, group: {"lr": group["lr"] * 2})
    edits.add(lambda i, group: {"lr": group["lr"] * 3})
    optimizer.step()
    assert weight.item() == pytest.approx(1 - 0.6)
    assert optimizer.param_groups[0]["lr"] == 0.1
    first()
    first()  # twice does no harm
    optimizer.step()
    assert weight.item() == pytest.approx(1 - 0.9)


def test_a_tensor_learning_rate_stays_the_same_object():
    weight, optimizer = one_parameter(torch.tensor(0.1))
    held = optimizer.param_groups[0]["lr"]
    GroupEdits.of(optimizer).add(lambda i, group: {"lr": group["lr"] * 2})
    optimizer.step()
    assert weight.item() == pytest.approx(0.8)
    assert optimizer.param_groups[0]["lr"] is held
    assert held.item() == pytest.approx(0.1)


def test_a_step_that_fails_can_be_restored():
    _, optimizer = one_parameter()
    edits = GroupEdits.of(optimizer)
    edits.add(lambda i, group: {"lr": group["lr"] * 2})

    def closure():
        raise KeyError

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert optimizer.param_groups[0]["lr"] == 0.2
    edits.restore()
    assert optimizer.param_groups[0]["lr"] == 0.1
    with pytest.raises(KeyError):
        optimizer.step(closure)
    optimizer.step()  # the next step starts from the true value by itself
    assert optimizer.param_groups[0]["lr"] == 0.1


SCHEDULERS = {
    "lambda": lambda o: LambdaLR(o, lambda step: 0.9**step),
    "cosine": lambda o: CosineAnnealingLR(o, 10),
    "exponential": lambda o: ExponentialLR(o, 0.9),
}


class Doubled(BoringModel):
    """Constant gradient of one, so that a weight change is the effective learning rate."""

    def __init__(self, scheduler, batch=4):
        super().__init__()
        self.scheduler, self.batch, self.moves, self.rates = scheduler, batch, [], []
        self.layer = torch.nn.Linear(1, 1, bias=False)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(24, 1), self.batch)

    def training_step(self, batch, batch_idx):
        return self.layer.weight.sum() + 0 * batch.sum()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"}}

    def on_train_batch_start(self, batch, batch_idx):
        self.before = self.layer.weight.item()
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.moves.append(self.before - self.layer.weight.item())

    def val_dataloader(self):
        return None


def fit(model, callbacks=(), **kwargs):
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
    settings |= {"enable_model_summary": False, "accelerator": "cpu", "devices": 1, "limit_val_batches": 0, **kwargs}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pl.Trainer(**settings, callbacks=list(callbacks)).fit(model)
    return model


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_values_are_untouched_and_the_step_is_scaled(name):
    plain = fit(Doubled(SCHEDULERS[name]))
    scaled = fit(Doubled(SCHEDULERS[name]), [BatchSizeLRScaler(rule="linear", reference_batch_size=2)])
    assert scaled.rates == plain.rates
    assert scaled.moves == pytest.approx([2 * move for move in plain.moves], rel=1e-4)


def test_scaler_alone_counts_accumulation():
    scaled = fit(
        Doubled(SCHEDULERS["lambda"]),
        [BatchSizeLRScaler(rule="linear", reference_batch_size=4)],
        accumulate_grad_batches=2,
    )
    moved = [m for m in scaled.moves if m]
    assert len(moved) == 3
    assert moved[0] == pytest.approx(0.2, rel=1e-4)


def test_ramp_is_geometric_and_survives_a_checkpoint():
    scaler = BatchSizeLRScaler(rule="linear", ramp_steps=4)
    scaler.set_batch_size(8)
    assert scaler.factor == 1
    seen = []
    for _ in range(2):
        scaler.set_batch_size(128)
        seen.append(scaler.factor)
    other = BatchSizeLRScaler(rule="linear", ramp_steps=4)
    other.load_state_dict(scaler.state_dict())
    for _ in range(3):
        other.set_batch_size(128)
        seen.append(other.factor)
    assert seen == pytest.approx([2, 4, 8, 16, 16])


def test_noise_scale_gain_is_the_square_root_until_the_first_estimate():
    scaler = BatchSizeLRScaler(rule="gain", critical_batch="noise_scale", max_factor=5.0)
    scaler.set_batch_size(4)
    scaler.set_batch_size(16)
    assert scaler.factor == 2
    scaler.critical_batch_size = 20.0
    scaler.set_batch_size(16)
    assert scaler.factor == pytest.approx((1 + 20 / 4) / (1 + 20 / 16))
    scaler.critical_batch_size = 1e9
    scaler.set_batch_size(64)
    assert scaler.factor == 5


def test_betas_follow_the_batch():
    _, optimizer = one_parameter(cls=torch.optim.Adam, betas=(0.9, 0.999))
    scaler = BatchSizeLRScaler(rule="sqrt", reference_batch_size=8, scale_betas=True)
    scaler.set_batch_size(32)
    new = scaler.edit(0, optimizer.param_groups[0])
    assert new["betas"] == pytest.approx((0.6, 0.996))
    assert new["eps"] == pytest.approx(0.5e-8)
    assert new["lr"] == pytest.approx(0.2)
    scaler.set_batch_size(160)
    with pytest.warns(UserWarning, match="they are set to 0"):
        assert scaler.edit(0, optimizer.param_groups[0])["betas"][0] == 0.0


def test_scaler_refusals():
    with pytest.raises(ValueError, match="rule='gain' needs `critical_batch`"):
        BatchSizeLRScaler(rule="gain")
    with pytest.raises(ValueError, match="`critical_batch`"):
        BatchSizeLRScaler(rule="gain", critical_batch="noise")
    with pytest.raises(ValueError, match="`ramp_steps`"):
        BatchSizeLRScaler(ramp_steps=-1)
    with pytest.raises(ValueError, match="`groups` must be indices below 1"):
        fit(Doubled(SCHEDULERS["lambda"]), [BatchSizeLRScaler(groups=[1])])


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("cosine", [0.5, 1.0, 0.55, 0.1, 0.1]),
        ("linear", [0.5, 1.0, 0.55, 0.1, 0.1]),
        ("inverse_sqrt", [0.5, 1.0, math.sqrt(20 / 110), math.sqrt(0.1), math.sqrt(20 / 240)]),
        ("cooldown", [0.5, 1.0, 1.0, 0.1, 0.1]),
    ],
)
def test_shapes_of_samples_lr(base, expected):
    _, optimizer = one_parameter()
    schedule = SamplesLR(optimizer, 200, base, warmup_samples=20)
    assert [schedule.factor(s) for s in (10, 20, 110, 200, 240)] == pytest.approx(expected)
    schedule.set_progress(110)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * expected[2])
    optimizer.step()
    schedule.step()  # who is told does not count
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * expected[2])


def test_shapes_of_samples_lr_in_numbers():
    def factors(base, samples, **kwargs):
        schedule = SamplesLR(one_parameter()[1], 1000, base, **kwargs)
        return [schedule.factor(s) for s in samples]

    assert factors("cooldown", (800, 810, 900, 950, 1000)) == pytest.approx([1.0, 0.955, 0.55, 0.325, 0.1])
    assert factors("cooldown", (250, 500, 750), cooldown_fraction=1.0, final=0.0) == pytest.approx([0.75, 0.5, 0.25])
    # without a warm-up the decay begins after a hundredth of the samples
    assert factors("inverse_sqrt", (0, 5, 10, 40)) == pytest.approx([1.0, 1.0, 1.0, 0.5])
    assert factors("cosine", (250, 750), final=0.0) == pytest.approx([0.5 + 0.5**1.5, 0.5 - 0.5**1.5])


def test_samples_lr_before_and_after_the_total_is_known():
    _, optimizer = one_parameter()
    schedule = SamplesLR(optimizer, base="linear", warmup_samples=20, final=0.0)
    schedule.set_progress(60)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"`warmup_samples` must be an integer in \[0, 19\], got 20"):
        schedule.resolve(20)
    schedule.resolve(100)
    schedule.resolve(1000)  # known already
    schedule.set_progress(60)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    # a checkpoint does not bring the total, and until it is known the learning rate is the optimizer's
    _, resumed = one_parameter()
    later = SamplesLR(resumed, base="linear", warmup_samples=20, final=0.0)
    resumed.load_state_dict(optimizer.state_dict())
    later.load_state_dict(schedule.state_dict())
    assert later.total_samples is None
    assert resumed.param_groups[0]["lr"] == pytest.approx(0.05)


def test_samples_lr_counts_alone_or_says_that_it_cannot():
    _, optimizer = one_parameter()
    schedule = SamplesLR(optimizer, 100, "linear", final=0.0, samples_per_step=10)
    rates = []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.1 * max(0, 1 - (t + 1) / 10) for t in range(12)])
    assert schedule.last_epoch == 12
    for known in ({"total_samples": 100}, {"samples_per_step": 10}):
        lost = SamplesLR(one_parameter()[1], **known)
        with pytest.raises(RuntimeError, match="does not know how many samples"):
            lost.step()


def test_samples_lr_state_continues():
    def make():
        _, optimizer = one_parameter()
        return optimizer, SamplesLR(optimizer, 100, samples_per_step=7, warmup_samples=20)

    a, b = make(), make()
    for _ in range(5):
        a[0].step()
        a[1].step()
    b[0].load_state_dict(a[0].state_dict())
    b[1].load_state_dict(a[1].state_dict())
    for optimizer, schedule in (a, b):
        optimizer.step()
        schedule.step()
    assert a[0].param_groups[0]["lr"] == b[0].param_groups[0]["lr"]


def test_samples_lr_may_be_resumed_for_a_longer_run():
    _, optimizer = one_parameter()
    short = SamplesLR(optimizer, 100, "cosine", warmup_samples=5, cooldown_fraction=0.5, samples_per_step=3)
    short.set_progress(50)
    longer = SamplesLR(one_parameter()[1], 200, "linear", final=0.0)
    longer.load_state_dict(short.state_dict())
    assert longer.samples == 50
    assert longer.optimizer.param_groups[0]["lr"] == pytest.approx(0.075)  # of the coming step already
    settings = {"base": "linear", "warmup_samples": 0, "final": 0.0, "cooldown_fraction": 0.2, "samples_per_step": None}
    assert {name: getattr(longer, name) for name in settings} == settings
    longer.set_progress(100)
    assert longer.get_last_lr() == pytest.approx([0.05])


def test_samples_lr_refusals():
    for key, bad in (
        ("total_samples", 0), ("base", "step"), ("warmup_samples", 100), ("warmup_samples", -1), ("final", 2.0),
        ("final", -0.1), ("cooldown_fraction", 0.0), ("cooldown_fraction", 1.1), ("samples_per_step", 0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"`{key}`"):
            SamplesLR(one_parameter()[1], **{"total_samples": 100, key: bad})


@pytest.mark.parametrize("estimate", [math.nan, math.inf, 0.0, -3.0])
def test_a_noise_scale_that_is_none_keeps_the_last(estimate):
    scaler = BatchSizeLRScaler(rule="gain", critical_batch="noise_scale")
    scaler.observe_noise_scale(50.0)
    scaler.observe_noise_scale(estimate)
    assert scaler.critical_batch_size == 50.0
    fixed = BatchSizeLRScaler(rule="gain", critical_batch=8.0)
    fixed.observe_noise_scale(50.0)
    assert fixed.critical_batch_size == 8.0
