"""Fixed membership: one process per worker, under any launcher that Lightning has."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.optim import Optimizer

from lightning_grad._validate import check_range
from lightning_grad.spsa.errors import ReplicaMismatchError
from lightning_grad.spsa.exchange import Exchange
from lightning_grad.spsa.journal import Journal
from lightning_grad.spsa.layout import Restore, select_trainable
from lightning_grad.spsa.options import Options
from lightning_grad.spsa.session import Session
from lightning_grad.strategies import _spsa_common as common
from lightning_grad.strategies._spsa_base import EXTRA, STATE, SPSABase, spsa_state
from lightning_grad.strategies._spsa_common import SPSAConfigError, config_errors


class SharedSeedSPSAStrategy(SPSABase, DDPStrategy):
    r"""Train with forward passes only; workers exchange one byte per direction and stay bitwise equal.

    For each direction a worker evaluates the loss at :math:`\theta \pm \epsilon z` with shared random signs
    :math:`z`, sends

    .. math:: g = \frac{L(\theta + \epsilon z) - L(\theta - \epsilon z)}{2\epsilon}

    as one E4M3 byte, and all apply :math:`\theta \leftarrow \theta - \eta \sum_i \hat g_i z_i / R`. No gradient is ever
    computed; memory is that of inference. The bytes of all steps are a journal that replays to the exact weights.

    Args:
        lr: Learning rate, > 0; ``None`` takes the one of ``configure_optimizers``, with its scheduler.
        eps: Perturbation size; rounded to a power of two in [2**-20, 2**-2].
        directions: Directions per micro-batch, 1..4096.
        sides: 2 for central differences, 1 for one extra forward per direction against a shared centre.
        seed: Seed of the signs, in [0, 2**64); the same on all ranks.
        codec: ``"e4m3"`` (one byte), ``"sign"`` (one byte, the sign only) or ``"f32"`` (four bytes).
        reduction: Divide the sum over ``N`` directions by ``N`` ("mean"), its root ("rsqrt") or 1 ("sum").
        normalize: Divide by the running root mean square of ``g``; then ``lr`` is the step per element.
        rho: Decay of the running mean square, in [0, 1).
        clip: Bound on ``g`` in running root mean squares; 5 if workers are not trusted.
        momentum: Heavy-ball factor, in [0, 1); needs no buffer.
        momentum_horizon: Steps after which momentum is cut off, 1..1024.
        trainable: Name patterns; matching parameters are trained, all others frozen.
        forward_mode: ``"eval"`` (no dropout) or ``"train"`` (equal dropout masks on both sides).
        restore: ``"exact"`` works in place; ``"copy"`` keeps a master copy of the trainable parameters.
        check_interval: Steps between comparisons of the replicas; 0 switches them off.
        max_bad_steps: Steps in a row without any finite loss before the run stops.
        journal_path: File that rank 0 appends every step to.
        resume_journal: Replay the file at ``journal_path``, if it is there, and continue it.
        weights_in_checkpoint: ``False`` keeps only the journal in checkpoints: kilobytes; they load by replay.
        kernel: ``"auto"``, ``"numpy"``, ``"torch"`` or ``"triton"``.
        accelerator: As for ``DDPStrategy``.
        parallel_devices: As for ``DDPStrategy``.
        cluster_environment: As for ``DDPStrategy``.
        checkpoint_io: As for ``DDPStrategy``.
        precision_plugin: As for ``DDPStrategy``.
        process_group_backend: As for ``DDPStrategy``; the bytes use gloo in any case.
        timeout: As for ``DDPStrategy``.
        start_method: As for ``DDPStrategy``.

    Raises:
        ValueError: An argument is out of range, or ``resume_journal`` has no ``journal_path``.

    State in checkpoints: key ``"spsa"`` of the optimizer state, with the journal.

    Source: "Just One Byte (per gradient)" (arXiv 2306.10015), with the central differences of MeZO (arXiv 2305.17333)
    and Rademacher directions. Differs from both: restores exactly, sends a real byte, replicas are compared bit by bit.
    """

    strategy_name = "spsa"

    def __init__(
        self,
        *,
        lr: float | None = None,
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
        resume_journal: bool = False,
        weights_in_checkpoint: bool = True,
        kernel: Literal["auto", "numpy", "torch", "triton"] = "auto",
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
    ) -> None:
        if lr is not None:
            check_range("lr", lr, 0.0, 1e10, "(]")
        if resume_journal and journal_path is None:
            raise ValueError("`resume_journal` needs `journal_path`, the file to continue.")
        options = Options(
            eps, directions, sides, seed, codec, reduction, normalize, rho, clip, momentum, momentum_horizon, trainable,
            forward_mode, restore, check_interval, max_bad_steps, kernel,
        )  # fmt: skip
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        self._keep(options, journal_path, weights_in_checkpoint)
        self._lr = lr
        self._link_timeout = timeout
        self._resume_journal = resume_journal
        self._exchange: Exchange | None = None
        self._resumed = False

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """A checkpoint without weights is replayed by the session, which exists after ``setup``."""
        return True

    # -- setup ----------------------------------------------------------------------------------------------------

    def configure_ddp(self) -> None:
        """No wrapper: there are no gradients to reduce. Parameters are chosen here, before ``configure_optimizers``."""
        module = self._net()
        with config_errors():
            select_trainable(module.named_parameters(), self._options.trainable)

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """The module's optimizer, of which the learning rate is used, or one for ``lr``."""
        if self._lr is None:
            super().setup_optimizers(trainer)
        else:
            if is_overridden("configure_optimizers", self._net(), pl.LightningModule):
                rank_zero_info(f"SPSA: `lr` ({self._lr:g}) is the strategy's; configure_optimizers is not called.")
            trained = [p for p in self._net().parameters() if p.requires_grad]
            self.optimizers = [torch.optim.SGD(trained, lr=self._lr)] if trained else []

    def setup(self, trainer: pl.Trainer) -> None:
        """Check the configuration, make all ranks start from rank 0's weights, build the engine."""
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._resumed = False  # an earlier fit's
        module = self._net()
        self._exchange = Exchange(self._link_timeout)
        self._exchange.broadcast_module(module)
        slots = trainer.accumulate_grad_batches * self._options.directions
        with config_errors():
            self._session = Session(self._options, module, slots)
        common.check_optimizers(self.optimizers)
        common.warn_large_lr(self._options, module, common.current_lr(self.optimizers[0]))
        if self._exchange.active and any(c.reduce_on_plateau for c in self.lr_scheduler_configs):
            rank_zero_warn(
                "SPSA: ReduceLROnPlateau needs a monitored value that is equal on all ranks: log it with"
                " sync_dist=True. Otherwise the replicas part ways, which the next comparison (`check_interval`) finds."
            )
        self._compare_headers()
        if self._resume_journal and trainer.ckpt_path is None:
            self._follow_file()

    def _compare_headers(self) -> None:
        mine = self.session.header
        for rank, text in enumerate(self._link().all_gather_any(mine.to_json())):
            differences = mine.differences(type(mine).from_json(text))
            if differences:
                raise SPSAConfigError(
                    f"SPSA: rank {rank} differs from rank {self.global_rank}: " + "; ".join(differences) + "."
                )

    def _follow_file(self) -> None:
        path = self._journal_path
        data = path.read_bytes() if self.is_global_zero and path is not None and path.is_file() else b""
        data = self._link().all_gather_any(data)[0]
        if data:
            with config_errors():
                self.session.follow(Journal.from_bytes(data, str(path)))
            rank_zero_info(f"SPSA: replayed {self.session.step} steps from {path}.")
            self._resumed = True

    def on_train_start(self) -> None:
        """Refuse to write over another run's journal, then open the file."""
        super().on_train_start()
        session = self.session
        session.pending = []
        if self.is_global_zero:
            path = self._journal_path
            if path is not None and path.exists() and path.stat().st_size and not self._resumed:
                raise SPSAConfigError(
                    f"`journal_path` {path} exists. Set `resume_journal` to continue it, or choose another file."
                )
            self._open_journal()

    # -- one step -------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the micro-batch on both sides of each direction."""
        forward = super().training_step
        with config_errors():
            return self.session.measure(self.global_rank, lambda: forward(*args, **kwargs))

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: pl.LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Measure the last micro-batch, exchange the codes and apply the update."""
        module, session, link = self._net(), self.session, self._link()
        result = common.run_closure(self.precision_plugin, optimizer, closure, module)
        codes = b"".join(link.all_gather(session.payload()))
        record = session.record(codes, common.current_lr(optimizer), tuple(range(link.size)))
        sent, received, waited_s = link.sent, link.received, link.waited_s
        compare = partial(self._compare_digests, common.current_lr(optimizer)) if session.digest_due() else None
        with config_errors():
            update = session.commit(record, compare)
        self._log.write(module, session, update, bytes_sent=sent, bytes_received=received, wait_s=waited_s)
        return result

    def _compare_digests(self, lr: float, mine: int) -> None:
        digests = [int.from_bytes(part, "little") for part in self._link().all_gather(mine.to_bytes(8, "little"))]
        if len(set(digests)) > 1:
            listed = ", ".join(f"rank {rank}: {digest:016x}" for rank, digest in enumerate(digests))
            step = self.session.step - 1
            raise ReplicaMismatchError(
                f"the replicas differ after step {step} ({listed}).{self._unequal_rates(lr)}", step, digests[0], mine
            )

    def _unequal_rates(self, lr: float) -> str:
        """The usual cause: a scheduler that watched another number on every rank."""
        rates = [struct.unpack("<d", part)[0] for part in self._link().all_gather(struct.pack("<d", lr))]
        if len(set(rates)) == 1:
            return ""
        listed = ", ".join(f"rank {rank}: {rate:g}" for rank, rate in enumerate(rates))
        return (
            f" Their learning rates differ ({listed}): a scheduler that monitors a value needs it equal on all ranks;"
            " log it with sync_dist=True."
        )

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load weights, or replay the checkpoint's journal on the weights at hand."""
        super().load_model_state_dict(checkpoint, strict=strict)
        if self._session is not None and spsa_state(checkpoint) is None:  # weights of another kind of run: a new base
            with config_errors():
                self._session = Session(self._options, self._net(), self._session.header.directions)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Continue the journal of the checkpoint."""
        state = spsa_state(checkpoint)
        if state is None:
            rank_zero_warn("SPSA: the checkpoint is not of an SPSA run; only its weights are used.")
            return
        own = {k: v for k, v in checkpoint["optimizer_states"][0].items() if k not in (STATE, EXTRA)}
        super().load_optimizer_state_dict({"optimizer_states": [own]})
        with config_errors():
            if checkpoint["state_dict"]:
                self.session.resume(state, checkpoint["optimizer_states"][0].get(EXTRA))
        self._resumed = True

    def _link(self) -> Exchange:
        assert self._exchange is not None, "setup() builds the exchange"
        return self._exchange
