"""The only file that touches private attributes of Lightning, and the versions it was written for.

Every private attribute is listed in :data:`PRIVATE` with the public alternative it lacks; a test fails loudly when
Lightning renames one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning
import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, RichProgressBar, TQDMProgressBar, WeightAveraging

OLDEST = (2, 6, 4)
BELOW = (3,)
REFUSED = {(2, 6, 2), (2, 6, 3)}  # published by an attacker: advisory GHSA-w37p-236h-pfx3


class Private(NamedTuple):
    """A private attribute we depend on."""

    owner: str
    """Import path of the class that has it."""
    name: str
    lacks: str
    """Why no public attribute will do."""


_LENGTH_LACKS = "the number of batches of a running epoch; public attributes are read at its start only"

PRIVATE = (
    Private(
        "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop",
        "_batches_that_stepped",
        "the step axis of logged values; the public `global_step` counts every optimizer of a manual loop",
    ),
    Private("lightning.pytorch.loops.fit_loop._FitLoop", "_data_source", "where the train loader comes from"),
    Private("lightning.pytorch.loops.fit_loop._FitLoop", "_data_fetcher", _LENGTH_LACKS),
    Private("lightning.pytorch.loops.fit_loop._FitLoop", "_combined_loader", _LENGTH_LACKS),
    Private(
        "lightning.pytorch.callbacks.TQDMProgressBar",
        "_train_progress_bar",
        "the total of the bar; the public property raises before there is one",
    ),
    Private(
        "lightning.pytorch.callbacks.WeightAveraging",
        "_average_model",
        "whether the average holds an iterate yet; the public state has the step of the last one, of any fit",
    ),
)


def check_version(version: str = lightning.__version__) -> None:
    """Refuse versions of Lightning this package was not written for.

    Raises:
        ImportError: The version is too old, too new, or known to be malicious.
    """
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
    supported = f"lightning_grad supports lightning >= {_dotted(OLDEST)}, < {_dotted(BELOW)}"
    if release in REFUSED:
        raise ImportError(
            f"lightning {version} is a malicious release (GHSA-w37p-236h-pfx3): treat this machine's secrets as stolen."
            f" {supported}."
        )
    if not OLDEST <= release < BELOW:
        raise ImportError(f'{supported}; {version} is installed. Run pip install "lightning>=2.6.4,<3".')


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def refuse_twin(trainer: Any) -> None:
    """Refuse a Trainer of the package ``pytorch_lightning``, whose classes only look like ours.

    Raises:
        TypeError: The trainer is not one of ``lightning.pytorch``.
    """
    if not isinstance(trainer, pl.Trainer) and type(trainer).__module__.startswith("pytorch_lightning"):
        raise TypeError(
            "lightning_grad works with `lightning.pytorch`; this Trainer comes from `pytorch_lightning`. "
            "Import one of them only."
        )


def asked_by_a_checkpoint() -> bool:
    """Whether the method that calls this was called by a checkpoint callback.

    ``Strategy.reduce_boolean_decision`` gets the same arguments for "shall we stop?" and for "is there such a file?".
    """
    asking = inspect.stack(context=0)[2].frame
    return isinstance(asking.f_locals.get("self"), Checkpoint)


def averaged_iterates(callback: WeightAveraging) -> int:
    """Number of iterates in the average; 0 if there is none yet."""
    average = callback._average_model
    return 0 if average is None else int(average.n_averaged)


def logging_step(trainer: pl.Trainer) -> int:
    """The step that values logged with ``self.log`` carry, for values logged past it (figures, histograms)."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def missing_for_variable_length(trainer: pl.Trainer) -> str | None:
    """Name of a private attribute that :func:`wrap_train_dataloader` or :func:`set_epoch_length` lacks, else None."""
    loop = trainer.fit_loop
    wanted = (
        *((loop, f"fit_loop.{name}") for name in ("_data_source", "_data_fetcher", "_combined_loader", "max_batches")),
        (getattr(loop, "_data_source", None), "fit_loop._data_source.instance"),
        (trainer, "trainer.val_check_batch"),
    )
    return next((path for owner, path in wanted if not hasattr(owner, path.rpartition(".")[2])), None)


def wrap_train_dataloader(trainer: pl.Trainer, convert: Callable[[Any], Any]) -> Callable[[], None]:
    """Let ``convert`` change what the train-dataloader hook returns, or the loader given to ``fit``.

    Returns:
        A function that undoes it.
    """
    source = trainer.fit_loop._data_source
    instance = source.instance
    if not isinstance(instance, pl.LightningModule | pl.LightningDataModule):
        source.instance = convert(instance)

        def undo_loader() -> None:
            source.instance = instance

        return undo_loader
    hook = instance.train_dataloader

    @functools.wraps(hook)
    def train_dataloader() -> Any:
        return convert(hook())

    return replace_method(instance, "train_dataloader", train_dataloader)


def replace_method(instance: Any, name: str, method: Callable[..., Any]) -> Callable[[], None]:
    """Give one object another method, past ``nn.Module.__setattr__``.

    Returns:
        A function that undoes it; calling it again does nothing.
    """
    own = instance.__dict__.get(name)
    instance.__dict__[name] = method

    def undo() -> None:
        if instance.__dict__.get(name) is not method:
            return  # undone, or somebody else's by now
        if own is None:
            del instance.__dict__[name]
        else:
            instance.__dict__[name] = own

    return undo


def set_epoch_length(trainer: pl.Trainer, batches: int) -> int:
    """Tell a running fit that its loader has ``batches`` batches an epoch: loop, fetcher and progress bar.

    Returns:
        The batches that the Trainer will take of them.
    """
    loop = trainer.fit_loop
    limit = trainer.limit_train_batches
    if isinstance(limit, int):
        batches = min(batches, limit)
    loop.max_batches = batches
    fetcher = loop._data_fetcher
    if fetcher is not None and fetcher.length is not None:
        fetcher.length = batches
        fetcher.done = fetcher.fetched >= batches
    if loop._combined_loader is not None:
        loop._combined_loader.limits = [limit if isinstance(limit, int) else float("inf")]
    bar = trainer.progress_bar_callback
    if not trainer.training:
        return batches
    if isinstance(bar, TQDMProgressBar) and bar._train_progress_bar is not None:
        bar._train_progress_bar.total = batches
    elif isinstance(bar, RichProgressBar) and bar.progress is not None and bar.train_progress_bar_id is not None:
        bar.progress.update(bar.train_progress_bar_id, total=batches)
    return batches


check_version()
