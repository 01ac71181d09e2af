"""Elastic membership: every worker is a Trainer of its own; they meet in a key-value store."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.optim import Optimizer

from lightning_grad._lightning import asked_by_a_checkpoint
from lightning_grad.random import philox4x64_stream
from lightning_grad.spsa.auth import Authenticator
from lightning_grad.spsa.elastic import ElasticOptions, ElasticWorker, Schedule
from lightning_grad.spsa.layout import Restore, select_trainable
from lightning_grad.spsa.options import Options
from lightning_grad.spsa.session import Session
from lightning_grad.spsa.signs import SIGN_TAG
from lightning_grad.spsa.store import Store, split_address
from lightning_grad.strategies import _spsa_common as common
from lightning_grad.strategies._spsa_base import SPSABase
from lightning_grad.strategies._spsa_common import SPSAConfigError, config_errors


class ElasticSPSAStrategy(SPSABase, SingleDeviceStrategy):
    r"""Shared-seed SPSA among workers that come and go.

    Each worker is a single-process Trainer, on any machine that reaches the store. A step waits for its members up to
    ``step_timeout`` and goes on without the silent ones; a newcomer replays the journal and takes part. The weights
    are a function of the journal, so all workers have the same bits.

    The store has no encryption. Bind it to the loopback, a VPN or a tunnel; with a key in the environment, outsiders
    cannot inject or replay messages.

    Args:
        run_id: Name of the run, 1 to 32 of ``A-Z a-z 0-9 _ -``.
        lr: Peak learning rate, > 0.
        total_steps: The run ends after this many steps (``max_steps`` of the Trainer counts this worker's steps only).
        store: Address of the store, ``"host:port"``.
        lr_schedule: ``"constant"``, ``"linear"`` or ``"cosine"`` decay to zero.
        warmup_steps: Steps of linear rise.
        min_workers: Workers that must be there before the first step.
        join_timeout: Seconds to wait for the start of the run, or to be let in.
        step_timeout: Seconds to wait for the members of a step.
        max_missed: Steps in a row after which a silent member is dropped, 1..255.
        stop_policy: Votes of EarlyStopping that end the run: ``"majority"``, ``"any"`` or ``"all"``.
        auth_key_env: Environment variable with the key for messages, at least 16 bytes; unset means plain messages.
        reseed_workers: Reseed torch, numpy and Python from the seed and the worker's id, so that workers draw other
            data.
        heal: Keep a copy of the base weights, and replay the journal on it if this replica differs.
        device: As for ``SingleDeviceStrategy``; the Trainer's accelerator replaces it.
        eps: See :class:`SharedSeedSPSAStrategy`, as for all arguments below.
        directions: Directions per micro-batch.
        sides: 2 or 1.
        seed: Seed of the signs.
        codec: ``"e4m3"``, ``"sign"`` or ``"f32"``.
        reduction: ``"mean"``, ``"rsqrt"`` or ``"sum"``.
        normalize: Divide by the running root mean square.
        rho: Decay of the running mean square.
        clip: Bound in running root mean squares; 5 if workers are not trusted.
        momentum: Heavy-ball factor.
        momentum_horizon: Steps after which momentum is cut off.
        trainable: Name patterns.
        forward_mode: ``"eval"`` or ``"train"``.
        restore: ``"exact"`` or ``"copy"``.
        check_interval: Steps between digests in the records.
        max_bad_steps: Steps in a row without any finite loss before the run stops.
        journal_path: File that this worker appends every step to.
        weights_in_checkpoint: ``False`` keeps only the journal in checkpoints.
        kernel: ``"auto"``, ``"numpy"``, ``"torch"`` or ``"triton"``.
        accelerator: As for ``SingleDeviceStrategy``.
        checkpoint_io: As for ``SingleDeviceStrategy``.
        precision_plugin: As for ``SingleDeviceStrategy``.

    Raises:
        ValueError: An argument is out of range.

    Source: see :class:`SharedSeedSPSAStrategy`; the protocol is our own.
    """

    strategy_name = "spsa_elastic"

    def __init__(
        self,
        *,
        run_id: str,
        lr: float,
        total_steps: int,
        store: str = "127.0.0.1:29777",
        lr_schedule: Literal["constant", "linear", "cosine"] = "constant",
        warmup_steps: int = 0,
        min_workers: int = 1,
        join_timeout: float = 600.0,
        step_timeout: float = 30.0,
        max_missed: int = 3,
        stop_policy: Literal["majority", "any", "all"] = "majority",
        auth_key_env: str = "LIGHTNING_GRAD_SPSA_KEY",
        reseed_workers: bool = True,
        heal: bool = False,
        device: str = "cpu",
        eps: float = 2.0**-10,
        directions: int = 1,
        sides: int = 2,
        seed: int = 0,
        codec: Literal["e4m3", "sign", "f32"] = "e4m3",
        reduction: Literal["mean", "rsqrt", "sum"] = "mean",
        normalize: bool = False,
        rho: float = 0.9,
        clip: float | None = None,
        momentum: float = 0.0,
        momentum_horizon: int = 32,
        trainable: list[str] | None = None,
        forward_mode: Literal["eval", "train"] = "eval",
        restore: Restore = "exact",
        check_interval: int = 100,
        max_bad_steps: int = 10,
        journal_path: str | None = None,
        weights_in_checkpoint: bool = True,
        kernel: Literal["auto", "numpy", "torch", "triton"] = "auto",
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,32}", run_id):
            raise ValueError(f"`run_id` must be 1 to 32 letters, digits, _ or -, got {run_id!r}.")
        split_address(store)
        self._schedule = Schedule(lr, total_steps, lr_schedule, warmup_steps)
        self._patience = ElasticOptions(min_workers, join_timeout, step_timeout, max_missed, stop_policy, heal)
        options = Options(
            eps, directions, sides, seed, codec, reduction, normalize, rho, clip, momentum, momentum_horizon, trainable,
            forward_mode, restore, check_interval, max_bad_steps, kernel,
        )  # fmt: skip
        self._devices: list[torch.device] | None = None
        super().__init__(device, accelerator, checkpoint_io, precision_plugin)
        self._keep(options, journal_path, weights_in_checkpoint)
        self._run_id, self._address, self._auth_key_env = run_id, store, auth_key_env
        self._reseed = reseed_workers
        self._worker: ElasticWorker | None = None
        self._stop_vote = False

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The one device; Lightning sets it from the accelerator while this is None."""
        return self._devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        if devices is not None and len(devices) > 1:
            raise SPSAConfigError(
                f"ElasticSPSAStrategy runs one device per worker, got {len(devices)}; set devices=1 and start more"
                f" workers."
            )
        self._devices = devices
        if devices:
            self._root_device = devices[0]

    @property
    def worker(self) -> ElasticWorker:
        """This member of the run; exists while fitting."""
        if self._worker is None:
            raise RuntimeError("ElasticSPSAStrategy.worker exists only while fitting.")
        return self._worker

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """A stand-in optimizer for Lightning's counters; the learning rate is a function of the run's step."""
        module = self._net()
        with config_errors():
            select_trainable(module.named_parameters(), self._options.trainable)
        if is_overridden("configure_optimizers", module, pl.LightningModule):
            super().setup_optimizers(trainer)
            if self.lr_scheduler_configs:
                raise SPSAConfigError(
                    "ElasticSPSAStrategy cannot use Lightning's schedulers, because a late joiner has no history; use"
                    " `lr_schedule`, `warmup_steps` and `total_steps`, and return no scheduler from"
                    " configure_optimizers."
                )
            rank_zero_info(
                f"SPSA: `lr` ({self._schedule.lr:g}) is the strategy's, and the model's optimizer is not used."
            )
        trained = [p for p in module.parameters() if p.requires_grad]
        self.optimizers = [torch.optim.SGD(trained, lr=self._schedule.lr)] if trained else []

    def setup(self, trainer: pl.Trainer) -> None:
        """Check the configuration, build the engine, take an id."""
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting and trainer.ckpt_path is not None:
            raise SPSAConfigError(
                "ElasticSPSAStrategy does not resume from `ckpt_path`: start the worker with the base weights, and it"
                " catches up from the run's journal in the store."
            )
        super().setup(trainer)
        if not fitting:
            return
        self._stop_vote = False  # of an earlier fit
        slots = trainer.accumulate_grad_batches * self._options.directions
        with config_errors():
            self._session = Session(self._options, self._net(), slots, self._run_id)
            auth = Authenticator.from_environment(self._run_id, self._auth_key_env)
        common.warn_large_lr(self._options, self._net(), self._schedule.lr)
        store = Store(self._address, self._run_id, self._patience.join_timeout)
        rescue = Path(trainer.default_root_dir) / f"{self._run_id}-{random.SystemRandom().getrandbits(32):08x}.spsa"
        self._worker = ElasticWorker(store, self._session, self._schedule, self._patience, auth, rescue)
        if self._reseed:
            self._reseed_all()

    def _reseed_all(self) -> None:
        """Workers that started from one `seed_everything` would all draw the same batches."""
        word = int(philox4x64_stream((self._options.seed, SIGN_TAG), (0, 2, 0, self.worker.worker), 1)[0])
        torch.manual_seed(word)
        np.random.seed(word % 2**32)
        random.seed(word)

    def on_train_start(self) -> None:
        """Become a member: only now, because members of a run are waited for."""
        super().on_train_start()
        with config_errors():
            self.worker.join()
        self._open_journal()
        rank_zero_info(f"SPSA: worker {self.worker.worker} of run {self._run_id}, at step {self.worker.step}.")
        if self.worker.stopped:
            self._end()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Catch up, then evaluate the micro-batch on both sides of each direction."""
        forward = super().training_step
        with config_errors():
            if self.worker.stopped or (not self.session.pending and not self.worker.prepare()):
                self._end()
                return None
            return self.session.measure(self.worker.worker, lambda: forward(*args, **kwargs))

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: pl.LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Measure the last micro-batch, contribute, apply the record of the step."""
        result = common.run_closure(self.precision_plugin, optimizer, closure, self._net())
        worker = self.worker
        if worker.stopped:
            return result
        size = self.session.header.directions * self.session.rule.codec.unit
        members = len(worker.roster)
        with config_errors():
            update = worker.finish(stop=self._stop_vote)
        if update is not None:
            self._log.write(
                self._net(), self.session, update, bytes_sent=size, bytes_received=size * members,
                wait_s=worker.waited_s, stale=worker.stale, missed=worker.missed, replayed=worker.replayed,
            )  # fmt: skip
        if self.worker.stopped:
            self._end()
        return result

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:  # noqa: A002  Lightning's name
        """EarlyStopping's wish becomes a vote; the record of a step ends the run for everyone."""
        if all or asked_by_a_checkpoint():  # whether a file exists or is the best: a matter of this worker alone
            return decision
        self._stop_vote = self._stop_vote or decision
        return False

    def _end(self) -> None:
        self._net().trainer.should_stop = True

    def on_exception(self, exception: BaseException) -> None:
        """Say good-bye, so that nobody waits."""
        if self._worker is not None:
            self._worker.leave()
        super().on_exception(exception)

    def teardown(self) -> None:
        """Say good-bye and close the journal."""
        if self._worker is not None:
            self._worker.leave()
            self._worker = None
        super().teardown()
