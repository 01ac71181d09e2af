"""ElasticSPSAStrategy under a Trainer: members in processes, stop votes, refusals."""

import random
import sys
import time
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_grad import ElasticSPSAStrategy
from lightning_grad.spsa import Journal, JournalError, StoreLostError, digest64, replay
from lightning_grad.spsa.auth import Authenticator
from lightning_grad.spsa.store import Store
from lightning_grad.strategies import SPSAConfigError
from tests.spsa_elastic import FORK, free_port
from tests.spsa_helpers import make_session
from tests.spsa_lightning import Toy, trainer


def strategy(port, **options):
    return ElasticSPSAStrategy(**{
        "run_id": "r", "lr": 2.0**-6, "total_steps": 30, "store": f"127.0.0.1:{port}", "step_timeout": 2.0,
        "join_timeout": 20.0, "check_interval": 5, **options})  # fmt: skip


def run(port, queue, delay=0.0, path=None, callbacks=(), model=None, settings=None, **options):
    torch.set_num_threads(1)
    time.sleep(delay)
    model = model or Toy(steps=20, micro=2)
    runner = trainer(
        strategy(port, journal_path=path, **options),
        max_epochs=-1,
        accumulate_grad_batches=2,
        callbacks=list(callbacks),
        **(settings or {}),
    )
    try:
        runner.fit(model)
        queue.put((digest64(model.parameters()), runner.global_step, None))
    except Exception as error:
        queue.put((0, runner.global_step, f"{type(error).__name__}: {error}"))


def start(port, *plans):
    queue = FORK.Queue()
    processes = [FORK.Process(target=run, args=(port, queue), kwargs=plan, daemon=True) for plan in plans]
    for process in processes:
        process.start()
    found = [queue.get(timeout=50) for _ in processes]
    for process in processes:
        process.join(20)
    return found


@pytest.fixture
def port():
    number = free_port()
    store = Store(f"127.0.0.1:{number}", "r", serve=True)
    yield number
    del store


def test_two_trainers_and_a_late_one_end_with_the_same_bits(port, tmp_path):
    paths = [str(tmp_path / f"{i}.spsa") for i in range(3)]
    slow = {"total_steps": 80}
    found = start(
        port, {"path": paths[0], "min_workers": 2, **slow}, {"path": paths[1], "min_workers": 2, **slow},
        {"path": paths[2], "delay": 0.3, **slow},
    )  # fmt: skip
    assert [error for _, _, error in found] == [None] * 3
    assert len({digest for digest, _, _ in found}) == 1
    journals = [Journal.load(path) for path in paths]
    assert {j.to_bytes() for j in journals} == {journals[0].to_bytes()}
    assert len(journals[0]) == 80
    assert journals[0].header.run_id == "r"
    assert replay(Toy(steps=20, micro=2).named_parameters(), journals[0]).digest64() == found[0][0]


def test_a_vote_of_an_earlier_fit_does_not_stop_the_next(port):
    mine = strategy(port, stop_policy="any", total_steps=8)
    mine.reduce_boolean_decision(True, all=False)
    runner = trainer(mine, max_epochs=-1, accumulate_grad_batches=2)
    runner.fit(Toy(steps=20, micro=2))
    assert runner.global_step == 8


class Bored(EarlyStopping):
    """Wants to stop at the end of the first epoch."""

    def __init__(self):
        super().__init__("spsa/loss", patience=1, check_on_train_epoch_end=True, strict=False)

    def _evaluate_stopping_criteria(self, current):
        return True, "bored"


@pytest.mark.parametrize(("policy", "bored", "early"), [("any", 1, True), ("majority", 1, False), ("all", 2, True)])
def test_early_stopping_is_a_vote(port, policy, bored, early):
    plans = [
        {"stop_policy": policy, "min_workers": 2, "callbacks": [Bored()] if i < bored else [], "total_steps": 60,
         "settings": {"log_every_n_steps": 1}}
        for i in range(2)
    ]  # fmt: skip
    found = start(port, *plans)
    assert [error for _, _, error in found] == [None, None]
    assert len({digest for digest, _, _ in found}) == 1
    assert all((steps < 60) == early for _, steps, _ in found)


def test_one_trainer_logs_saves_and_validates_at_the_exact_point(port, tmp_path):
    logged = []

    class Log(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            logged.append({k: float(v) for k, v in trainer.logged_metrics.items()})

    model = Toy(steps=20, micro=2)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=7, save_top_k=-1, filename="{step}")
    runner = trainer(
        strategy(port, weights_in_checkpoint=False), max_epochs=-1, accumulate_grad_batches=2, callbacks=[Log(), saver],
        enable_checkpointing=True, log_every_n_steps=1, limit_val_batches=1, val_check_interval=5,
    )  # fmt: skip
    runner.fit(model)
    assert runner.global_step == 30
    assert {"spsa/stale", "spsa/missed", "spsa/replayed", "spsa/workers"} <= logged[-1].keys()
    assert logged[-1]["spsa/bytes_sent"] == logged[-1]["spsa/bytes_received"] == 2
    state = torch.load(tmp_path / "step=28.ckpt", weights_only=True)
    assert state["state_dict"] == {}
    assert state["optimizer_states"][0]["spsa"]["step"] == 28


def test_workers_draw_different_numbers(port):
    class Draws(Toy):
        def on_train_start(self):
            self.drawn = (float(torch.rand(())), float(np.random.rand()), random.random())

    drawn = []
    for reseed in (True, True, False, False):
        pl.seed_everything(1, verbose=False)
        model = Draws(steps=1, micro=2)
        trainer(strategy(port, reseed_workers=reseed, total_steps=1), max_epochs=1, accumulate_grad_batches=2).fit(
            model
        )
        drawn.append(model.drawn)
    assert all(a != b for a, b in zip(drawn[0], drawn[1], strict=True))
    assert drawn[2] == drawn[3]


def test_a_lost_store_is_said_and_the_journal_is_saved(tmp_path):
    number = free_port()
    store = [Store(f"127.0.0.1:{number}", "r", serve=True)]

    class Kills(Toy):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 9:
                store.clear()

    model, folder = Kills(steps=20, micro=2), tmp_path / "runs" / "new"
    runner = trainer(strategy(number), max_epochs=-1, accumulate_grad_batches=2, default_root_dir=folder)
    with pytest.raises(
        StoreLostError, match=rf"lost the store at 127.0.0.1:{number} at step 5; journal saved to .*spsa; restart"
    ):
        runner.fit(model)
    (path,) = folder.glob("*.spsa")
    journal = Journal.load(path)
    assert len(journal) == 5
    assert replay(Toy(steps=20, micro=2).named_parameters(), journal).digest64() == digest64(model.parameters())


def test_the_key_of_the_environment_seals_the_messages(port, monkeypatch):
    monkeypatch.setenv("MY_KEY", "0123456789abcdef")
    trainer(strategy(port, auth_key_env="MY_KEY", total_steps=3), max_epochs=-1, accumulate_grad_batches=2).fit(
        Toy(steps=20, micro=2)
    )
    sealed = Store(f"127.0.0.1:{port}", "r").get("r/1")
    assert Authenticator("r", b"0123456789abcdef").open("r", 1, 0, sealed) is not None
    assert Authenticator("r", b"another key, 16+").open("r", 1, 0, sealed) is None


def test_the_schedule_is_in_the_records(port, tmp_path):
    path = tmp_path / "run.spsa"
    options = {"lr": 0.5, "lr_schedule": "linear", "warmup_steps": 2, "total_steps": 6, "journal_path": str(path)}
    trainer(strategy(port, **options), max_epochs=-1, accumulate_grad_batches=2).fit(Toy(steps=20, micro=2))
    rates = [record.lr for record in Journal.load(path)]
    assert rates == [0.25, 0.5, None, 0.375, 0.25, 0.125]


def test_refusals(port, tmp_path):
    runner = trainer(strategy(port), accumulate_grad_batches=2)
    with pytest.raises(SPSAConfigError, match="cannot use Lightning's schedulers"):
        runner.fit(Toy(scheduler=True))
    runner = trainer("auto", max_steps=1)
    runner.fit(Toy())
    runner.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(SPSAConfigError, match="does not resume from `ckpt_path`"):
        trainer(strategy(port)).fit(Toy(), ckpt_path=tmp_path / "x.ckpt")
    with pytest.raises(SPSAConfigError, match="one device per worker, got 2"):
        trainer(strategy(port), devices=2)
    for bad in (
        {"run_id": "a b"},
        {"store": "x"},
        {"lr": -1.0},
        {"total_steps": 0},
        {"stop_policy": "x"},
        {"eps": 2.0},
    ):
        with pytest.raises(ValueError, match=f"`{next(iter(bad))}` must"):
            strategy(port, **bad)


def test_a_parameter_that_grows_too_large_is_an_error_lightning_knows(port):
    runner = trainer(strategy(port, lr=1e6, check_interval=1), max_epochs=-1, accumulate_grad_batches=2)
    with pytest.raises(SPSAConfigError, match="too large for eps"):
        runner.fit(Toy(steps=20, micro=2))


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_two_workers_cannot_write_one_journal(port, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_grad.spsa.locked_file._PATIENCE_S", 0.0)
    path = tmp_path / "run.spsa"
    first = Journal(make_session(run_id="r").header)
    first.open_append(path)
    runner = trainer(strategy(port, journal_path=str(path)), max_epochs=-1, accumulate_grad_batches=2)
    with pytest.raises(JournalError, match=r"another process writes to .*run\.spsa"):
        runner.fit(Toy(steps=20, micro=2))
    first.close()
    assert path.read_bytes() == first.to_bytes()
    assert Store(f"127.0.0.1:{port}", "r").get("l/0") == b"1"  # it was let in, and nobody waits for it


def test_a_checkpoint_that_exists_is_no_vote_to_stop(tmp_path):
    """Lightning asks whether a file exists as EarlyStopping asks whether to stop."""
    mine = strategy(1)
    runner = SimpleNamespace(strategy=mine, is_global_zero=True)
    (tmp_path / "last.ckpt").touch()
    checkpoint = ModelCheckpoint(tmp_path)
    assert checkpoint.file_exists(str(tmp_path / "last.ckpt"), runner)
    assert not checkpoint.file_exists(str(tmp_path / "other.ckpt"), runner)
    assert not mine._stop_vote
    assert not mine.reduce_boolean_decision(True, all=False)  # as EarlyStopping: not by this worker alone
    assert mine._stop_vote


def test_a_run_that_saves_its_last_checkpoint_again_and_again_reaches_its_end(port, tmp_path):
    callbacks = [ModelCheckpoint(tmp_path, every_n_train_steps=5, save_last=True)]
    ((_, steps, error),) = start(port, {"callbacks": callbacks, "settings": {"enable_checkpointing": True}})
    assert (steps, error) == (30, None)
    assert (tmp_path / "last.ckpt").exists()
