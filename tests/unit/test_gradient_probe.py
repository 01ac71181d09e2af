"""What AdaptiveBatchSize measures beside other callbacks, under a loss scaler, with odd training steps and batches."""

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from lightning_grad import AdaptiveBatchSize, BatchSizeLRScaler, LanczosLearningRate, StabilityMonitor
from tests.unit.test_adaptive_batch_size import Net, Record, fit
from tests.unit.test_stability_monitor import Memory


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
