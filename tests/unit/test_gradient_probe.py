"""What AdaptiveBatchSize measures beside other callbacks, under a loss scaler, with odd training steps and batches."""

from collections import UserDict
from dataclasses import dataclass

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lightning_grad import AdaptiveBatchSize, BatchSizeLRScaler, LanczosLearningRate, StabilityMonitor
from lightning_grad.statistics.gradient_noise import GradStats
from tests.unit.test_adaptive_batch_size import Net, Record, fit, trainer
from tests.unit.test_stability_monitor import Memory, Unfreeze


def measured(model, *others, estimator="micro_batch", needs=(), k=2, steps=4, scaler=None, **kwargs):
    """Statistics of the first steps; ``others`` are callbacks before (None) after."""
    record = Record(*needs)
    settings = {"mode": "monitor", "test_interval": 1, "ema": 0.0, "lr_scaler": scaler, "log": False}
    mine = AdaptiveBatchSize(64, record, estimator, **settings)
    callbacks = [mine if other is None else other for other in others] or [mine]
    fit(model, *callbacks, accumulate_grad_batches=k, max_steps=steps, max_epochs=-1, limit_val_batches=0, **kwargs)
    return record.stats


def net(**kwargs):
    torch.manual_seed(0)
    return Net(**kwargs)


CURVATURE = {
    "monitor": lambda: StabilityMonitor(every_n_steps=2, k=3, num_probes=2, batch_sharpness_batches=1),
    "lanczos": lambda: LanczosLearningRate(every_n_steps=2, k=3, early=False, spectrum=False, lr_bounds=(1e-9, 1e-9)),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("other", CURVATURE)
@pytest.mark.parametrize(("estimator", "k"), [("micro_batch", 2), ("ghost", 1), ("vmap", 1)])
def test_curvature_callbacks_leave_the_statistics_alone(estimator, k, other, first):
    alone = measured(net(), estimator=estimator, k=k)
    callbacks = (None, CURVATURE[other]()) if first else (CURVATURE[other](), None)
    together = measured(net(), *callbacks, estimator=estimator, k=k, logger=Memory())
    assert len(alone) == 4
    assert [s.trace_cov for s in together] == pytest.approx([s.trace_cov for s in alone], rel=1e-6)
    assert [s.grad_sq_norm for s in together] == pytest.approx([s.grad_sq_norm for s in alone], rel=1e-6)


@pytest.mark.parametrize("scaled", [False, True])
def test_loss_and_learning_rate_under_a_loss_scaler(scaled):
    """Both are those of the step: not the scaled loss, not the learning rate of before `BatchSizeLRScaler`."""
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
    model = net(lr=1e-9, dtype=torch.float32)
    scaler = BatchSizeLRScaler("linear", reference_batch_size=4)
    plugins = {"plugins": [plugin]} if scaled else {}
    stats = measured(model, needs=("loss", "lr"), steps=2, scaler=scaler, **plugins)
    for step, found in enumerate(stats):
        rows = list(range(16 * step, 16 * step + 16))
        grads = model.grads(rows)
        mean = grads.mean(0)
        tolerance = 0.02 if scaled else 1e-4  # float16 activations
        assert found.loss == pytest.approx(model.loss(model.x[rows], model.y[rows]).item(), rel=tolerance)
        assert found.grad_sq_norm == pytest.approx(float(mean.square().sum()), rel=tolerance)
        assert found.lr == pytest.approx(4e-9)
    assert len(stats) == 2


class Skips(Net):
    """Returns no loss for the micro-batches of a set."""

    def __init__(self, *skipped, **kwargs):
        super().__init__(**kwargs)
        self.skipped = skipped

    def training_step(self, batch, batch_idx):
        return None if batch_idx in self.skipped else super().training_step(batch, batch_idx)


@pytest.mark.parametrize("seen", [1, 3])
@pytest.mark.parametrize("estimator", ["micro_batch", "ghost", "vmap"])
def test_skipped_micro_batches_do_not_count(estimator, seen):
    torch.manual_seed(0)
    model = Skips(*range(seen, 8))  # the end of the first step, all of the second
    stats = measured(model, estimator=estimator, k=4, steps=2, needs=("inner", "tensor"))
    if (estimator, seen) == ("micro_batch", 1):
        assert not stats  # one group shows no variance
        return
    assert len(stats) == 1
    grads = model.grads(range(8 * seen))
    groups = (grads.reshape(seen, 8, -1).mean(1), 8) if estimator == "micro_batch" else (grads, 1)
    expected = GradStats.from_groups(*groups, [p.numel() for p in model.parameters()])
    assert stats[0].batch_size == 8 * seen
    assert stats[0].trace_cov == pytest.approx(expected.trace_cov, rel=1e-9)
    assert stats[0].grad_sq_norm == pytest.approx(expected.grad_sq_norm, rel=1e-9)
    assert stats[0].inner_var == pytest.approx(expected.inner_var, rel=1e-8)
    torch.testing.assert_close(stats[0].tensor_trace_cov, expected.tensor_trace_cov, rtol=1e-8, atol=1e-10)


class Head(Net):
    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)


@pytest.mark.parametrize("estimator", ["ghost", "micro_batch"])
@pytest.mark.parametrize("order", [0, 1])
def test_parameters_that_join_are_measured(estimator, order):
    record, forgot = Record("tensor"), []
    mine = AdaptiveBatchSize(64, record, estimator, mode="monitor", test_interval=1, ema=0.9, log=False)
    mine.probe.on_other_parameters = lambda: (forgot.append(len(record.stats)), mine.controller.forget())
    torch.manual_seed(0)
    model = Head(n=32)
    both = [mine, Unfreeze(lr=0.0)] if order else [Unfreeze(lr=0.0), mine]
    fit(model, *both, accumulate_grad_batches=2, max_epochs=3, limit_val_batches=0)
    tensors = len(list(model.parameters()))
    assert [len(s.tensor_grad_sq) for s in record.stats] == [tensors - 2] * 2 + [tensors] * 4
    assert forgot == [2]
    # the average started anew: the weights stand still, so it is that of all steps since
    expected = [GradStats.from_groups(model.grads(range(i, i + 16)).reshape(2, 8, -1).mean(1), 8) for i in (0, 16)]
    if estimator == "micro_batch":
        assert record.stats[2].trace_cov == pytest.approx(expected[0].trace_cov, rel=1e-6)


class Normalized(nn.Sequential):
    """torch.func would map over its samples without an error, and normalise each by itself."""

    def __init__(self):
        norm = nn.BatchNorm1d(2, track_running_stats=False)
        super().__init__(nn.Linear(5, 8), nn.Unflatten(1, (2, 4)), norm, nn.Flatten(), nn.Linear(8, 2))


class Metered(Net):
    """Updates a metric in its training step, which torch.func cannot map over samples."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.mean = MeanMetric()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.mean.update(loss.detach())
        return loss


@pytest.mark.parametrize("make", [lambda: net(layers=Normalized(), n=256), lambda: Metered(n=256)])
@pytest.mark.parametrize(("estimator", "k"), [("auto", 8), ("ghost", 2)])
def test_a_loss_that_cannot_be_had_sample_by_sample_ends_the_tests_with_one_warning(make, estimator, k):
    record = Record("inner")
    mine = AdaptiveBatchSize(64, record, estimator, mode="monitor", test_interval=1, log=False)
    model = make()
    with pytest.warns(UserWarning, match=r"sample by sample .*curvature_loss.*batch stays as it is") as warned:
        trainer(mine, accumulate_grad_batches=k, max_steps=4, limit_val_batches=0).fit(model)
    assert sum("sample by sample" in str(w.message) for w in warned) == 1
    assert not record.stats
    assert mine.state_dict()["use_samples"] is False
    if isinstance(model, Metered):
        assert model.mean.update_count == model.trainer.fit_loop.total_batch_idx + 1
        with pytest.raises(MisconfigurationException, match=r"estimator='vmap'.*curvature_loss.*another estimator"):
            fit(make(), AdaptiveBatchSize(64, record, "vmap", mode="monitor"))


class Collects(Net):
    """Keeps what it computed, in lists and attributes, and names its second argument as it likes."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.outputs, self.by_kind, self.last, self.calls = [], {"loss": []}, None, 0

    def training_step(self, batch, _):
        loss = self.loss(*batch)
        self.outputs.append(loss.detach())
        self.by_kind["loss"].append(loss.detach())
        self.last, self.calls = loss.detach(), self.calls + 1
        return loss


@pytest.mark.parametrize("others", [(), CURVATURE.values()])
def test_training_steps_that_keep_their_outputs_are_undisturbed(others):
    torch.manual_seed(0)
    model = Collects()
    stats = measured(
        model, None, *(make() for make in others), estimator="vmap", k=1, needs=("inner",), steps=3, logger=Memory()
    )
    assert len(stats) == 3
    assert model.calls == len(model.outputs) == len(model.by_kind["loss"]) == 3
    assert torch.stack(model.outputs).isfinite().all()
    assert torch.equal(torch.stack(model.outputs), torch.stack(model.by_kind["loss"]))
    assert float(model.last) == float(model.outputs[-1])


def test_metrics_that_add_in_place_are_put_back():
    model = Metered()
    measured(model, None, *(make() for make in CURVATURE.values()), estimator="ghost", k=1, steps=3, logger=Memory())
    assert model.mean.update_count == int(model.mean.weight) == 3


def test_a_loss_of_its_own_is_what_vmap_differentiates():
    class Own(Metered):
        def curvature_loss(self, batch):
            return self.loss(*batch)

    torch.manual_seed(0)
    model = Own()
    (stats,) = measured(model, estimator="vmap", k=1, needs=("inner",), steps=1)
    expected = GradStats.from_samples(model.grads(range(8)))
    assert stats.inner_var == pytest.approx(expected.inner_var, rel=1e-8)


@dataclass(frozen=True)
class Example:
    x: torch.Tensor
    y: torch.Tensor
    kind: str = "train"


class Encoding(UserDict):
    """What tokenizers return: a mapping that is no dict."""

    def to(self, device):
        return self


class Wrapped(Net):
    """The batch is a dataclass in a mapping that torch's pytree does not know."""

    def training_step(self, batch, batch_idx):
        example = batch["inner"]
        assert example.kind == "train"
        return self.loss(example.x, example.y)

    def train_dataloader(self):
        def collate(rows):
            x, y = map(torch.stack, zip(*rows, strict=True))
            return Encoding(inner=Example(x, y))

        return DataLoader(TensorDataset(self.x, self.y), self.batch, collate_fn=collate)


@pytest.mark.parametrize("estimator", ["micro_batch", "ghost", "vmap"])
def test_batches_of_mappings_and_dataclasses(estimator):
    torch.manual_seed(0)
    scaler = BatchSizeLRScaler()
    stats = measured(Wrapped(), scaler, None, estimator=estimator, needs=("inner",), steps=1)
    expected = measured(net(), estimator=estimator, needs=("inner",), steps=1)
    assert stats[0] == expected[0]
    assert scaler.reference_batch_size == 16
