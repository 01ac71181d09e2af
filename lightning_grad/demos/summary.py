"""What a run reached and what to look at next, printed when it ends."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_grad._tensorboard import Charts, TensorBoardCharts
from lightning_grad._validate import check_int
from lightning_grad.demos.tiny_gpt import TinyGPT


class PrintSummary(TensorBoardCharts):
    """Print the last value of a metric, next to known ones, and the commands to go on with.

    Args:
        metric: Name of the logged value to print.
        references: Values of other runs to print under it, by what to call them, e.g. ``{"AdamW, same length": 2.1}``.
        reference_steps: Optimizer steps of the runs behind ``references``, which are printed for a run of that length
            only; 0: for any.
        prompt: Let a :class:`TinyGPT` continue this text by a few words; empty: do not.

    State: none.
    """

    def __init__(
        self,
        metric: str = "val/loss",
        references: dict[str, float] | None = None,
        reference_steps: int = 0,
        prompt: str = "",
    ) -> None:
        self.metric = metric
        self.references = references or {}
        self.reference_steps = check_int("reference_steps", reference_steps, 0)
        self.prompt = prompt
        self._started = 0.0

    def tensorboard_charts(self, trainer: pl.Trainer) -> Charts:
        """Training and validation loss in one chart."""
        return {"loss": {"training and validation": ["train/loss", "val/loss"]}}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Print, with the progress bar out of the way."""
        if stage != "fit" or not trainer.is_global_zero:
            return
        if trainer.progress_bar_callback is not None:
            # the bar comes later in the list; a live bar would be drawn again under the summary
            trainer.progress_bar_callback.teardown(trainer, pl_module, stage)
        seconds = time.perf_counter() - self._started
        value = trainer.callback_metrics.get(self.metric)
        lines = [(self.metric, "not logged: the run ended before a validation" if value is None else f"{value:.4f}")]
        if self.reference_steps in (0, trainer.global_step):
            lines += [(name, f"{reference:.4f}") for name, reference in self.references.items()]
        lines += [("trained", f"{trainer.global_step} steps in {seconds:.0f} s")]
        if self.prompt and isinstance(pl_module, TinyGPT):
            text = pl_module.generate(self.prompt.encode(), 100).decode(errors="replace")
            lines += [("it writes", repr(self.prompt + text)[1:-1])]
        checkpoint = trainer.checkpoint_callback
        if isinstance(checkpoint, ModelCheckpoint) and checkpoint.last_model_path:
            lines += [("checkpoint", _for_a_shell(checkpoint.last_model_path))]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                lines += [("open next", f"{tensorboard_command()} --logdir {_for_a_shell(logger.root_dir)}")]
                lines += [("", "then http://localhost:6006, pages Scalars and Custom Scalars")]
        width = max(len(name) for name, _ in lines)
        print("\n" + "\n".join(f"{name:<{width}}  {text}".rstrip() for name, text in lines), flush=True)


def tensorboard_command() -> str:
    """The command as it can be typed here, also when the virtual environment is not activated."""
    if shutil.which("tensorboard"):
        return "tensorboard"
    beside = Path(sys.executable).with_name("tensorboard")
    if beside.exists():
        return _for_a_shell(str(beside))
    return f"{_for_a_shell(sys.executable)} -m tensorboard.main"


def _for_a_shell(path: str) -> str:
    """The path as it can be pasted in any folder: the reader's shell need not stand where this process does."""
    return shlex.quote(os.path.abspath(path))
