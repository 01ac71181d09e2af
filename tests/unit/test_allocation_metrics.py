"""Metrics of samples, and what a run with sample allocation leaves in TensorBoard's event file."""

import fnmatch

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_grad import DynamicSampleAllocation
from lightning_grad.allocation.integer import allocate
from lightning_grad.sampling import AcceptanceRate, GroupSignal
from tests.allocated_digits import AllocatedDigits, AllocatedDigitsData
from tests.rollout_models import EasyPolicy, prompts, quiet_trainer


def samples(n=40, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.rand(n, generator=gen) < 0.4, torch.randint(5, (n,), generator=gen)


def test_acceptance_rate_overall_and_per_prompt():
    accepted, index = samples()
    metric = AcceptanceRate(num_prompts=6)
    for part in (slice(0, 7), slice(7, 7), slice(7, 40)):
        metric.update(accepted[part], index[part])
    assert float(metric.compute()) == pytest.approx(float(accepted.float().mean()))
    rates = metric.per_prompt()
    for i in range(5):
        assert float(rates[i]) == pytest.approx(float(accepted[index == i].float().mean()))
    assert bool(rates[5].isnan())
    with pytest.raises(ValueError, match="needs `prompt_index`"):
        metric.update(accepted)
    metric.reset()
    assert bool(metric.compute().isnan())


@pytest.mark.parametrize("make", [AcceptanceRate, lambda: AcceptanceRate(6), GroupSignal])
def test_metrics_of_two_processes_add_up(make):
    """What a synchronization does: states are stacked and reduced."""
    parts, whole = [make(), make()], make()
    for seed, metric in enumerate(parts):
        accepted, index = samples(seed=seed)
        args = (accepted.double(), index) if isinstance(metric, GroupSignal) else (accepted, index)
        metric.update(*args)
        whole.update(*args)
    merged = make()
    for name, reduce in merged._reductions.items():
        setattr(merged, name, reduce(torch.stack([getattr(part, name) for part in parts])))
    merged._update_count = 1
    torch.testing.assert_close(merged.compute(), whole.compute())
    through = make()
    through.load_state_dict(whole.state_dict(), strict=False)


def test_groups_without_a_signal():
    reward = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.1, 0.1 + 1e-10, 0.3, 0.2])
    index = torch.tensor([0, 0, 1, 1, 2, 2, 4, 4])
    metric = GroupSignal()
    metric.update(reward, index)
    assert float(metric.compute()) == 0.5  # in float32 the two of prompt 2 are equal
    metric = GroupSignal()
    metric.update(reward.double() + torch.tensor([0, 0, 0, 0, 0, 1e-9, 0, 0]), index)
    assert float(metric.compute()) == 0.25


class Keep(Callback):
    """All samples of every iteration."""

    def __init__(self):
        self.items = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.items.append(trainer.train_dataloader.items)


SCALARS = (
    "acceptance_rate", "zero_accept_frac", "missing_frac", "budget", "generated_total", "pilot_generated", "n_min",
    "n_max", "n_gini", "variance_ratio", "weight_max", "ess", "seconds_generate", "seconds_score", "fallback",
    "unscorable", "sn_mse_ratio",
)  # fmt: skip


def test_the_event_file_holds_every_tag_with_the_right_value(tmp_path):
    allocation, keep, data = DynamicSampleAllocation(samples_per_prompt=6, pilot_samples=3), Keep(), prompts(16)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    quiet_trainer(max_epochs=2, callbacks=[allocation, keep], logger=logger, log_every_n_steps=10**6).fit(
        EasyPolicy(), datamodule=data
    )
    log = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0})
    log.Reload()
    found = {tag.removeprefix("alloc/"): log.Scalars(tag) for tag in log.Tags()["scalars"] if tag.startswith("alloc/")}
    levels = data.loader.difficulty.unique().tolist()
    assert set(found) == set(SCALARS) | {f"acceptance_difficulty_{k}" for k in levels}
    assert all([e.step for e in events] == [0, 4] for events in found.values())
    value = {name: [e.value for e in events] for name, events in found.items()}
    assert value["budget"] == [96, 96]
    assert value["generated_total"] == [96, 192]
    assert value["pilot_generated"] == [48, 48]
    assert value["n_min"][1] == int(allocation.plan.min())
    assert value["n_max"][1] == int(allocation.plan.max())
    for epoch, items in enumerate(keep.items):
        accepted, index = items["accepted"], items["prompt_index"]
        assert value["acceptance_rate"][epoch] == pytest.approx(float(accepted.float().mean()))
        unsolved = torch.bincount(index[accepted], minlength=16) == 0
        assert value["zero_accept_frac"][epoch] == pytest.approx(float(unsolved.float().mean()))
        for k in levels:
            chosen = data.loader.difficulty[index] == k
            rate = float(accepted[chosen].float().mean())
            assert value[f"acceptance_difficulty_{k}"][epoch] == pytest.approx(rate)
        counts = torch.bincount(index, minlength=16)
        (histogram,) = [e.histogram_value for e in log.Histograms("alloc/hist_n") if e.step == 4 * epoch]
        assert (histogram.min, histogram.max, histogram.sum) == (counts.min(), counts.max(), 96)
        assert histogram.num == 16
    assert {"alloc/hist_n", "alloc/hist_p", "alloc/hist_grad_norm"} == set(log.Tags()["histograms"])
    assert all(0 < ratio < 1 for ratio in value["variance_ratio"])


@pytest.mark.parametrize("kind", ["difficulty", "no difficulty", "examples"])
def test_no_chart_is_empty(tmp_path, kind):
    objective = "importance" if kind == "examples" else "em"
    allocation = DynamicSampleAllocation(samples_per_prompt=6, pilot_samples=3, objective=objective)
    model, data = (AllocatedDigits(), AllocatedDigitsData()) if kind == "examples" else (EasyPolicy(), prompts(8))
    if kind == "no difficulty":
        data.loader.difficulty = None
    trainer = quiet_trainer(
        max_epochs=1, limit_val_batches=0, callbacks=[allocation], logger=TensorBoardLogger(tmp_path, "", "")
    )
    trainer.fit(model, datamodule=data)
    log = EventAccumulator(str(tmp_path))
    log.Reload()
    charts = allocation.tensorboard_charts(trainer)["alloc"]
    assert len(charts) == {"difficulty": 5, "no difficulty": 4, "examples": 3}[kind]
    for title, tags in charts.items():
        assert any(fnmatch.filter(log.Tags()["scalars"], tag) for tag in tags), title


def test_predicted_variance_against_uniform():
    """The ratio is that of the bound under the plan and under an even split, both by hand."""
    allocation, done = DynamicSampleAllocation(samples_per_prompt=6, pilot_samples=3, pilot_mode="discard"), []
    run = allocation.e_step.run
    object.__setattr__(allocation.e_step, "run", lambda *args, **kw: done.append(run(*args, **kw)) or done[-1])
    quiet_trainer(max_epochs=1, callbacks=[allocation]).fit(EasyPolicy(), datamodule=prompts(16))
    plan, report = done[0].plan, done[0].report
    spread = plan.grad_norm.square() / plan.p
    even = allocate(torch.ones(16), 96, min_samples=1)
    expected = float((spread / plan.counts).sum() / (spread / even).sum())
    assert report["variance_ratio"] == pytest.approx(expected, rel=1e-12)
    assert expected < 1
    assert (report["budget"], report["pilot_generated"], report["generated"]) == (96, 48, 144)
