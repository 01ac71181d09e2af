"""What the two SPSA strategies share: no backward pass, checkpoints at the exact point, loading by replay."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer

from lightning_grad._tensorboard import Charts, write_layout
from lightning_grad.spsa.options import Options
from lightning_grad.spsa.replayer import replay
from lightning_grad.spsa.session import Session, journal_of
from lightning_grad.strategies._spsa_common import StepLog, check_trainer, config_errors, report_eps

STATE, EXTRA = "spsa", "spsa_extra"


class SPSABase(Strategy):
    """Put before a Lightning strategy in the list of bases."""

    _session: Session | None = None

    def _keep(self, options: Options, journal_path: str | None, weights_in_checkpoint: bool) -> None:
        """What the constructors share. Their signatures are written out: YAML and the docs are made from them."""
        self._options = options
        self._journal_path = None if journal_path is None else Path(journal_path)
        self._weights_in_checkpoint = weights_in_checkpoint
        self._log = StepLog()

    @property
    def session(self) -> Session:
        """Engine, rule and journal of this worker; exists while fitting."""
        if self._session is None:
            raise RuntimeError(f"{type(self).__name__}.session exists only while fitting.")
        return self._session

    def setup(self, trainer: pl.Trainer) -> None:
        """Refuse what cannot work before anything is built."""
        if trainer.state.fn == TrainerFn.FITTING:
            check_trainer(trainer, self._net())
            report_eps(self._options)
        super().setup(trainer)

    def _open_journal(self) -> None:
        if self._journal_path is not None:
            self._journal_path.parent.mkdir(parents=True, exist_ok=True)
            self.session.journal.open_append(self._journal_path)

    def tensorboard_charts(self, trainer: pl.Trainer) -> Charts:
        """One chart for what is measured, one for what is done with it, one for who takes part."""
        return {
            "spsa": {
                "loss": ["spsa/loss"],
                "difference of the two evaluations": ["spsa/loss_spread"],
                "slope along a direction": ["spsa/grad_rms", "spsa/grad_last"],
                "step of a parameter": ["spsa/step_rms"],
                "learning rate": ["spsa/lr"],
                "workers": ["spsa/workers", "spsa/abstained"],
                "journal, bytes": ["spsa/journal_bytes"],
            }
        }

    def on_train_start(self) -> None:
        """Lay out the charts."""
        super().on_train_start()
        write_layout(self._net().trainer, self)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """There is nothing to propagate."""
        return closure_loss

    def on_validation_start(self) -> None:
        """Validate at the exact point, also in the middle of an accumulation window."""
        if self._session is not None:
            self._session.engine.restore()
        super().on_validation_start()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """All weights, or nothing if the journal is to stand for them."""
        if self._session is not None:
            self._session.engine.restore()
            if not self._weights_in_checkpoint:
                return {}
        return super().lightning_module_state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's own state and the run's."""
        state: dict[str, Any] = dict(super().optimizer_state(optimizer))
        if self._session is not None:
            state[STATE] = self._session.state_dict()
            if self._weights_in_checkpoint:
                state[EXTRA] = self._session.engine.extra_state()
        return state

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load weights, or replay the checkpoint's journal on the weights at hand."""
        state = spsa_state(checkpoint)
        if state is None or checkpoint["state_dict"]:
            super().load_model_state_dict(checkpoint, strict=strict)
        elif self._session is not None:
            with config_errors():
                self._session.follow(journal_of(state))
        else:
            replay(self._net().named_parameters(), journal_of(state), restore=self._options.restore)

    def on_exception(self, exception: BaseException) -> None:
        """Leave the exact point behind, whatever happened."""
        if self._session is not None:
            self._session.engine.restore()
        super().on_exception(exception)

    def teardown(self) -> None:
        """Close the journal."""
        if self._session is not None:
            self._session.engine.restore()
            self._session.journal.close()
            self._session = None
        super().teardown()

    def _net(self) -> pl.LightningModule:
        module = self.lightning_module
        assert module is not None, "the Trainer connects a module before any hook runs"
        return module


def spsa_state(checkpoint: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The run's state in a checkpoint, if it is of an SPSA run."""
    states = checkpoint.get("optimizer_states") or [{}]
    found: Mapping[str, Any] | None = states[0].get(STATE)
    return found
