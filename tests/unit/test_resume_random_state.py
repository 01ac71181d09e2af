"""Random states and data positions that Lightning would lose."""

import contextlib
import pickle
import random
import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader, TensorDataset

from lightning_grad import RandomStateCheckpoint, ResumableDataLoader


class Draws(BoringModel):
    """Notes what it is given and draws one number from each generator per step."""

    def __init__(self, total=False, fail_at=None):
        super().__init__()
        self.total, self.fail_at, self.seen = total, fail_at, []

    def training_step(self, batch, batch_idx):
        if self.fail_at is not None and len(self.seen) == self.fail_at:
            raise OSError("disk full")
        self.seen.append((batch[0].tolist(), torch.rand(()).item(), random.random(), np.random.normal()))
        return self.layer(torch.ones(1, 32)).sum()

    def train_dataloader(self):
        return ResumableDataLoader(TensorDataset(torch.arange(10)), batch_size=3, shuffle=True)

    def validation_step(self, batch, batch_idx):
        torch.rand(3), random.random(), np.random.normal()

    def val_dataloader(self):  # an iterator of a plain loader draws a number too
        return DataLoader(TensorDataset(torch.arange(4)))

    def configure_optimizers(self):
        if (
            self.total
        ):  # what `estimated_stepping_batches` does if max_steps is not given; Lightning forgets positions then
            self.trainer.fit_loop.setup_data()
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=10)]


def fit(model, folder, ckpt_path=None, callbacks=None, steps=9, **kwargs):
    pl.seed_everything(5 if ckpt_path is None else 6, verbose=False)
    callbacks = [RandomStateCheckpoint()] if callbacks is None else callbacks
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = pl.Trainer(
        logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", devices=1,
        max_steps=steps, max_epochs=-1, callbacks=[*callbacks, saver], **kwargs,
    )  # fmt: skip
    trainer.fit(model, ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
    return model.seen


@pytest.mark.parametrize("total", [False, True])
def test_every_generator_and_the_data_continue(tmp_path, total):
    straight = fit(Draws(total), tmp_path)
    for step in (1, 3, 4, 5, 8):
        resumed = fit(Draws(total), tmp_path / "again", tmp_path / f"step={step}.ckpt")
        assert resumed == straight[step:], step


def test_without_the_callback_nothing_continues(tmp_path):
    """The reason for the callback: the stock Trainer draws other numbers, and here even other batches."""
    straight = fit(Draws(total=True), tmp_path, callbacks=[])
    resumed = fit(Draws(total=True), tmp_path / "again", tmp_path / "step=2.ckpt", callbacks=[])
    assert resumed[0][0] != straight[2][0]
    assert resumed[0][1:] != straight[2][1:]


def test_validation_leaves_no_trace(tmp_path):
    often, never = (
        fit(Draws(), tmp_path / str(batches), limit_val_batches=batches, val_check_interval=2) for batches in (2, 0)
    )
    assert often == never
    loud = fit(Draws(), tmp_path / "loud", callbacks=[RandomStateCheckpoint(isolate_validation=False)])
    assert loud != never


@pytest.mark.parametrize("fail_at", [2, 3, 4, 5])
def test_a_batch_that_failed_is_trained_on_again(tmp_path, fail_at):
    straight = fit(Draws(), tmp_path / "straight")
    with pytest.raises(OSError, match="disk full"):
        fit(
            Draws(fail_at=fail_at), tmp_path / "failing",
            callbacks=[RandomStateCheckpoint(), OnExceptionCheckpoint(tmp_path, "failed")],
        )  # fmt: skip
    resumed = fit(Draws(), tmp_path / "again", tmp_path / "failed.ckpt")
    assert [batch for batch, *_ in resumed] == [batch for batch, *_ in straight[fail_at:]]


class TwoLoaders(Draws):
    """The shorter loader is cycled beside the longer one."""

    def training_step(self, batch, batch_idx):
        return super().training_step([torch.cat([batch["short"][0], batch["long"][0]])], batch_idx)

    def train_dataloader(self):
        return {
            name: ResumableDataLoader(TensorDataset(torch.arange(size)), batch_size=3, shuffle=True)
            for name, size in (("short", 7), ("long", 20))
        }


def test_a_loader_that_is_cycled_continues_at_its_own_position(tmp_path):
    straight = fit(TwoLoaders(), tmp_path, steps=14)
    for step in (2, 3, 4, 6, 7, 9, 10):
        resumed = fit(TwoLoaders(), tmp_path / "again", tmp_path / f"step={step}.ckpt", steps=14)
        assert resumed == straight[step:], step


@pytest.mark.parametrize("fail_at", [1, 2, 3, 4, 6, 7, 10])
def test_of_several_loaders_each_goes_back_one_batch(tmp_path, fail_at):
    straight = fit(TwoLoaders(), tmp_path / "straight", steps=14)
    with pytest.raises(OSError, match="disk full"):
        fit(
            TwoLoaders(fail_at=fail_at), tmp_path / "failing", steps=14,
            callbacks=[RandomStateCheckpoint(), OnExceptionCheckpoint(tmp_path, "failed")],
        )  # fmt: skip
    resumed = fit(TwoLoaders(), tmp_path / "again", tmp_path / "failed.ckpt", steps=14)
    assert [batch for batch, *_ in resumed] == [batch for batch, *_ in straight[fail_at:]]


class DrawsAfterBatch(pl.Callback):
    def __init__(self):
        self.drawn = []

    def on_train_batch_end(self, *args):
        self.drawn += [torch.rand(()).item(), random.random(), np.random.normal()]


def test_what_training_draws_before_a_validation_is_not_drawn_again(tmp_path):
    class Model(Draws):
        def on_train_batch_end(self, *args):
            torch.rand(())

    def run(folder, batches):
        model, later = Model(), DrawsAfterBatch()
        callbacks = [RandomStateCheckpoint(), later]
        seen = fit(model, folder, callbacks=callbacks, limit_val_batches=batches, val_check_interval=2)
        return [number for _, *numbers in seen for number in numbers] + later.drawn

    numbers = run(tmp_path / "2", 2)
    assert len(set(numbers)) == len(numbers)
    assert numbers == run(tmp_path / "0", 0)


def test_a_checkpoint_of_a_validation_holds_the_states_before_it(tmp_path):
    class Saves(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            torch.rand(())
            if not trainer.sanity_checking:
                trainer.save_checkpoint(tmp_path / f"validated={trainer.global_step}.ckpt")

    straight = fit(Draws(), tmp_path, callbacks=[RandomStateCheckpoint(), Saves()], val_check_interval=2)
    for step in (2, 4, 6):
        resumed = fit(Draws(), tmp_path / "again", tmp_path / f"validated={step}.ckpt", val_check_interval=2)
        assert resumed == straight[step:], step


@pytest.mark.parametrize("fails", [False, True])
def test_the_trainer_is_left_as_it_was(tmp_path, fails):
    class Watch(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            self.loop = trainer.fit_loop.epoch_loop.val_loop

    watch, callback = Watch(), RandomStateCheckpoint()
    model = Draws(fail_at=3 if fails else None)
    with pytest.raises(OSError, match="disk full") if fails else contextlib.nullcontext():
        fit(model, tmp_path, callbacks=[callback, watch], steps=4)
    assert "run" not in watch.loop.__dict__
    pickle.dumps(callback)


def test_another_number_of_processes_is_said(tmp_path):
    fit(Draws(), tmp_path, steps=2)
    callback = RandomStateCheckpoint()
    callback.load_state_dict({"version": 1, "ranks": [{}, {}]})
    with pytest.warns(UserWarning, match="2 processes, this run has 1"):
        fit(Draws(), tmp_path / "again", callbacks=[callback], steps=2)
    with pytest.raises(ValueError, match="version 7"):
        callback.load_state_dict({"version": 7})


def test_state_is_plain(tmp_path):
    callback = RandomStateCheckpoint()
    torch.save(callback.state_dict(), tmp_path / "state.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert loaded["version"] == 1
    assert callback.state_key == "RandomStateCheckpoint"


@pytest.mark.gpu
def test_cuda_state_continues(tmp_path):
    callback = RandomStateCheckpoint()
    callback._device = torch.device("cuda", 0)
    state = callback.state_dict()
    expected = torch.rand(5, device="cuda")
    callback.load_state_dict(state)
    from lightning_grad.callbacks.random_state import _restore

    _restore(state["ranks"][0], callback._device)
    assert torch.equal(torch.rand(5, device="cuda"), expected)


@pytest.mark.parametrize("plain", [False, True])
def test_a_loader_without_a_position_is_named(plain, tmp_path, caplog):
    class Model(Draws):
        def train_dataloader(self):
            if plain:
                return DataLoader(TensorDataset(torch.arange(10)), batch_size=3, shuffle=True)
            return super().train_dataloader()

    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fit(Model(), tmp_path, steps=1)
    assert ("DataLoader keeps no position" in caplog.text) == plain
