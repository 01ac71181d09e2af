import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

from lightning_grad.callbacks import optimizer_stats
from lightning_grad.callbacks.optimizer_stats import OptimizerStats, update_and_param_norm


class Model(pl.LightningModule):
    """Two layers; keeps the parameters after each optimizer step."""

    def __init__(self, make=lambda params: torch.optim.AdamW(params, lr=0.1)):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1))
        self.make = make
        self.history = []

    def training_step(self, batch, batch_idx):
        loss = self.layers(batch).square().mean()
        self.log("train/loss", loss)
        return loss

    def on_before_zero_grad(self, optimizer):
        if not self.history:
            self.keep()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.keep()

    def keep(self):
        self.history.append([p.detach().double().clone() for p in self.parameters()])

    def configure_optimizers(self):
        return self.make(self.parameters())

    def train_dataloader(self):
        return DataLoader(torch.randn(64, 8, generator=torch.Generator().manual_seed(1)), batch_size=4)


def make_trainer(root, callbacks, **kwargs):
    settings = {
        "logger": TensorBoardLogger(root, name="tb", version=""),
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "max_steps": 6,
        **kwargs,
    }
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **settings,
    )


def scalars(root):
    accumulator = EventAccumulator(str(root / "tb"))
    accumulator.Reload()
    return {tag: {e.step: e.value for e in accumulator.Scalars(tag)} for tag in accumulator.Tags()["scalars"]}


def norm(tensors):
    return math.sqrt(sum(t.square().sum().item() for t in tensors))


def distance(a, b):
    return norm([x - y for x, y in zip(a, b, strict=True)])


def test_norms_are_those_of_the_parameters_before_and_after(tmp_path):
    model = Model()
    make_trainer(tmp_path, [OptimizerStats(2)]).fit(model)
    logged = scalars(tmp_path)
    updates, params = logged["optim/AdamW/update_norm"], logged["optim/AdamW/param_norm"]
    assert list(updates) == list(params) == [1, 3, 5]  # 0-based, as the axis of train/loss
    assert list(logged["train/loss"]) == list(range(6))
    for step in updates:
        # float32 sums of 41 numbers
        assert updates[step] == pytest.approx(distance(model.history[step + 1], model.history[step]), rel=1e-5)
        assert params[step] == pytest.approx(norm(model.history[step + 1]), rel=1e-5)


def test_the_size_of_a_known_update(tmp_path):
    class Signs(Model):
        def training_step(self, batch, batch_idx):
            return sum(p.sum() for p in self.parameters())  # the gradient is all ones

    make_trainer(tmp_path, [OptimizerStats(1)], max_steps=2).fit(Signs(lambda p: torch.optim.SGD(p, lr=0.25)))
    num_parameters = 8 * 4 + 4 + 4 + 1
    for value in scalars(tmp_path)["optim/SGD/update_norm"].values():
        assert value == pytest.approx(0.25 * math.sqrt(num_parameters), rel=1e-6)


def test_the_interval_does_not_depend_on_the_loggers(tmp_path):
    make_trainer(tmp_path, [OptimizerStats(3)], log_every_n_steps=50).fit(Model())
    assert list(scalars(tmp_path)["optim/AdamW/update_norm"]) == [2, 5]


def test_a_step_is_a_whole_window_of_accumulation(tmp_path):
    model = Model()
    make_trainer(tmp_path, [OptimizerStats(2)], accumulate_grad_batches=3, max_steps=4).fit(model)
    updates = scalars(tmp_path)["optim/AdamW/update_norm"]
    assert list(updates) == [1, 3]
    for step, value in updates.items():
        # history holds the start and every micro-batch; the last of a window of three steps
        expected = distance(model.history[3 * step + 3], model.history[3 * step])
        assert value == pytest.approx(expected, rel=1e-5)


def test_several_optimizers_of_one_class_are_told_apart(tmp_path):
    class Two(Model):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.layers(batch).square().mean())
                optimizer.step()

        def configure_optimizers(self):
            first, second = self.layers[0].parameters(), self.layers[2].parameters()
            return [torch.optim.SGD(first, lr=0.1), torch.optim.SGD(second, lr=0.01)]

    model = Two()
    model.keep()
    make_trainer(tmp_path, [OptimizerStats(2)], max_steps=8).fit(model)
    logged = scalars(tmp_path)
    for name, part in (("SGD", slice(0, 2)), ("SGD_2", slice(2, 4))):
        updates = logged[f"optim/{name}/update_norm"]
        assert list(updates) == [1, 3]  # four batches, two steps on each
        for step, value in updates.items():
            expected = distance(model.history[step + 1][part], model.history[step][part])
            assert value == pytest.approx(expected, rel=1e-5)


class Trial(torch.optim.SGD):
    """Evaluates the loss at another point, comes back, then steps: as zeroth-order and sharpness-aware methods do."""

    @torch.no_grad()
    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"]]
        start = [p.clone() for p in params]
        for p in params:
            p.add_(100.0)
        with torch.enable_grad():
            loss = closure()
        for p, s in zip(params, start, strict=True):
            p.copy_(s).sub_(0.5)
        return loss

    def stats(self):
        return {"trial_size": torch.tensor(100.0), "count": 3}


def test_moves_inside_the_closure_do_not_count_and_stats_are_logged(tmp_path):
    make_trainer(tmp_path, [OptimizerStats(1)], max_steps=1).fit(Model(lambda p: Trial(p, lr=0.1)))
    logged = scalars(tmp_path)
    assert logged["optim/Trial/update_norm"][0] == pytest.approx(0.5 * math.sqrt(41), rel=1e-5)
    assert logged["optim/Trial/trial_size"] == {0: 100.0}
    assert logged["optim/Trial/count"] == {0: 3.0}


def test_other_steps_touch_nothing(tmp_path, monkeypatch):
    def refuse(*args):
        raise AssertionError("measured between logging steps")

    monkeypatch.setattr(optimizer_stats, "_parameters", refuse)
    make_trainer(tmp_path, [OptimizerStats(7)]).fit(Model())
    with pytest.raises(AssertionError, match="between"):
        make_trainer(tmp_path, [OptimizerStats(6)]).fit(Model())


def test_training_is_unchanged(tmp_path):
    with_stats, without = Model(), Model()
    make_trainer(tmp_path, [OptimizerStats(1)]).fit(with_stats)
    make_trainer(tmp_path, []).fit(without)
    assert all(torch.equal(p, q) for p, q in zip(with_stats.history[-1], without.history[-1], strict=True))


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_are_taken_off_again(tmp_path, fails):
    class Failing(Model):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if fails and batch_idx == 2:
                raise RuntimeError("planned")

    trainer = make_trainer(tmp_path, [OptimizerStats(1)])
    seen = []
    model = Failing(lambda p: seen.append(torch.optim.AdamW(p)) or seen[0])
    if fails:
        with pytest.raises(RuntimeError, match="planned"):
            trainer.fit(model)
    else:
        trainer.fit(model)
    assert len(scalars(tmp_path)["optim/AdamW/update_norm"]) == (3 if fails else 6)
    assert not seen[0]._optimizer_step_pre_hooks
    assert not seen[0]._optimizer_step_post_hooks


def test_a_resumed_run_goes_on_at_the_same_steps(tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    make_trainer(whole, [OptimizerStats(3)], max_steps=9).fit(Model())
    trainer = make_trainer(part, [OptimizerStats(3)], max_steps=4)
    trainer.fit(Model())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    # sixteen batches an epoch without shuffling: the loader is put where the first run stopped
    rest = DataLoader(torch.randn(64, 8, generator=torch.Generator().manual_seed(1))[16:], batch_size=4)
    resumed = make_trainer(part, [OptimizerStats(3)], max_steps=9)
    resumed.fit(Model(), train_dataloaders=rest, ckpt_path=tmp_path / "a.ckpt")
    expected = scalars(whole)["optim/AdamW/update_norm"]
    assert list(expected) == [2, 5, 8]
    assert scalars(part)["optim/AdamW/update_norm"] == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_norms_in_every_dtype(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(300, 300), (7,), (), (0, 3)]
    before = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    after = [b + 2.0 for b in before]
    before[0], after[0] = before[0] * 1000, after[0] * 1000  # a sum of squares that float16 cannot hold
    difference = [a - b for a, b in zip(after, before, strict=True)]

    def reference(tensors):
        return math.sqrt(sum(t.to(torch.complex128).abs().square().sum().item() for t in tensors))

    result = update_and_param_norm([b.clone() for b in before], after)
    # float32 sums over rows of 300
    assert result["update_norm"] == pytest.approx(reference(difference), rel=1e-5)
    assert result["param_norm"] == pytest.approx(reference(after), rel=1e-5)


def test_layout_has_the_charts(tmp_path):
    stats = OptimizerStats()
    charts = stats.tensorboard_charts(make_trainer(tmp_path, [stats]))
    assert charts["optim"]["size of an update"] == ["optim/*/update_norm"]


def test_bad_arguments_and_strategies_are_refused_by_name():
    with pytest.raises(ValueError, match="`every_n_steps` must be an integer >= 1, got 0"):
        OptimizerStats(0)
    with pytest.raises(MisconfigurationException, match="FSDPStrategy"):
        OptimizerStats().on_fit_start(SimpleNamespace(strategy=FSDPStrategy()), None)


def test_yaml(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-grad"])
    monkeypatch.chdir(tmp_path)
    args = ["--trainer.callbacks=lightning_grad.callbacks.optimizer_stats.OptimizerStats"]
    args += ["--trainer.callbacks.every_n_steps=7", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    cli = LightningCLI(Model, run=False, args=args, save_config_callback=None)
    assert [c.every_n_steps for c in cli.trainer.callbacks if isinstance(c, OptimizerStats)] == [7]


TWO_PROCESSES = """
import sys
from pathlib import Path
import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_grad.callbacks.optimizer_stats import OptimizerStats
from tests.unit.test_optimizer_stats import Model

if __name__ == "__main__":
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_steps=3, log_every_n_steps=1,
        logger=TensorBoardLogger(sys.argv[1], name="tb", version=""), callbacks=[OptimizerStats(1)],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, limit_val_batches=0)
    model = Model()
    trainer.fit(model)
    if trainer.is_global_zero:
        import torch
        torch.save(model.history, Path(sys.argv[1]) / "history.pt")
"""


@pytest.mark.slow
def test_two_processes_log_once(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(TWO_PROCESSES)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(script), str(tmp_path)], env=environment, cwd=root, check=True, timeout=120)
    history = torch.load(tmp_path / "history.pt", weights_only=True)
    updates = scalars(tmp_path)["optim/AdamW/update_norm"]
    assert list(updates) == [0, 1, 2]
    for step, value in updates.items():
        assert value == pytest.approx(distance(history[step + 1], history[step]), rel=1e-5)
    assert len(list((tmp_path / "tb").glob("events*"))) == 1
