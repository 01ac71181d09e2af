"""What plugins share for TensorBoard: the layout of the Custom Scalars page, histograms and figures.

A callback that logs curves derives from :class:`TensorBoardCharts` and says which tags belong into which chart; a
strategy has a method ``tensorboard_charts`` and calls :func:`write_layout`. The charts of a run go into one layout:
``SummaryWriter.add_custom_scalars`` overwrites what an earlier call wrote.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_grad._lightning import logging_step

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Charts = Mapping[str, Mapping[str, Sequence[str]]]
"""Category (the plugin's name) -> title of a chart -> tags of its curves; ``*`` stands for anything without ``/``."""


class TensorBoardCharts(pl.Callback):
    """Base of callbacks that have charts on TensorBoard's Custom Scalars page.

    A subclass overrides :meth:`tensorboard_charts`. One that has an ``on_fit_start`` of its own calls ``super()``.
    """

    def tensorboard_charts(self, trainer: pl.Trainer) -> Charts:
        """Return the charts of this callback; optimizers, loaders and strategy exist, no step was taken."""
        raise NotImplementedError

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write one layout with the charts of all callbacks; the first of them does it."""
        write_layout(trainer, self)


def write_layout(trainer: pl.Trainer, plugin: Any) -> None:
    """Write the charts of the run's callbacks and strategy, if ``plugin`` is the first of them that has some."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    plugins: list[Any] = [p for p in (*callbacks, trainer.strategy) if hasattr(p, "tensorboard_charts")]
    if plugins[:1] == [plugin]:
        layout = merge_charts([p.tensorboard_charts(trainer) for p in plugins])
        for writer in tensorboard_writers(trainer):
            writer.add_custom_scalars(layout)


def merge_charts(parts: Sequence[Charts]) -> dict[str, dict[str, list[Any]]]:
    """Return ``parts`` as one argument for ``add_custom_scalars``; charts of the same name are joined."""
    merged: dict[str, dict[str, list[str]]] = {}
    for part in parts:
        for category, charts in part.items():
            for title, tags in charts.items():
                known = merged.setdefault(category, {}).setdefault(title, [])
                known += [tag for tag in dict.fromkeys(tags) if tag not in known]
    return {
        category: {title: ["Multiline", [_pattern(tag) for tag in tags]] for title, tags in charts.items()}
        for category, charts in merged.items()
    }


def _pattern(tag: str) -> str:
    # TensorBoard takes tags for regular expressions that match a beginning: "loss" would also show "loss_epoch"
    return re.escape(tag).replace(r"\*", "[^/]*") + "$"


def tensorboard_writers(trainer: pl.Trainer) -> list[Any]:
    """Return the ``SummaryWriter`` of every TensorBoard logger; none on processes that do not log."""
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def log_scalars(trainer: pl.Trainer, values: Mapping[str, float]) -> None:
    """Log ``values`` now, to every logger, on the step axis of ``self.log``.

    For callbacks with an interval of their own: ``self.log`` drops values between multiples of ``log_every_n_steps``.
    """
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=logging_step(trainer))


def log_histogram(trainer: pl.Trainer, tag: str, values: torch.Tensor) -> None:
    """Log a histogram of the finite entries of ``values`` to every TensorBoard logger."""
    for writer in tensorboard_writers(trainer):
        finite = values.detach().float().flatten()
        finite = finite[finite.isfinite()]
        if finite.numel():  # the writer raises for an empty histogram
            writer.add_histogram(tag, finite.cpu(), global_step=logging_step(trainer))


def log_figure(trainer: pl.Trainer, tag: str, draw: Callable[[], Figure]) -> None:
    """Draw a figure and log it to every TensorBoard logger; without one, ``draw`` is not called."""
    for writer in tensorboard_writers(trainer):
        writer.add_figure(tag, draw(), global_step=logging_step(trainer))
