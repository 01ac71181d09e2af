"""The only file that touches private attributes of Lightning, and the versions it was written for.

Every private attribute is listed in :data:`PRIVATE` with the public alternative it lacks; a test fails loudly when
Lightning renames one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import lightning
import lightning.pytorch as pl

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


PRIVATE = (
    Private(
        "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop",
        "_batches_that_stepped",
        "the step axis of logged values; the public `global_step` counts every optimizer of a manual loop",
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


def logging_step(trainer: pl.Trainer) -> int:
    """The step that values logged with ``self.log`` carry, for values logged past it (figures, histograms)."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


check_version()
