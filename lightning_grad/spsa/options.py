"""The settings of a run, checked once, for both strategies."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_grad._validate import check_choice, check_int, check_range
from lightning_grad.spsa.codec import CODECS
from lightning_grad.spsa.engine import KERNELS, SPSAEngine
from lightning_grad.spsa.grid import eps_exponent
from lightning_grad.spsa.journal import Header
from lightning_grad.spsa.layout import Restore


@dataclass(frozen=True)
class Options:
    """Constructor arguments that both strategies share; see there for their meaning.

    Raises:
        ValueError: A value is out of range.
    """

    eps: float = 2.0**-10
    directions: int = 1
    sides: int = 2
    seed: int = 0
    codec: str = "e4m3"
    reduction: str = "mean"
    normalize: bool = False
    rho: float = 0.9
    clip: float | None = None
    momentum: float = 0.0
    momentum_horizon: int = 32
    trainable: Sequence[str] | None = None
    forward_mode: str = "eval"
    restore: Restore = "exact"
    check_interval: int = 100
    max_bad_steps: int = 10
    kernel: str = "auto"
    scale_log2: int = 0

    def __post_init__(self) -> None:
        eps_exponent(self.eps)
        check_int("directions", self.directions, 1, 4096)
        check_int("sides", self.sides, 1, 2)
        check_int("seed", self.seed, 0, 2**64 - 1)
        check_choice("codec", self.codec, CODECS)
        check_choice("reduction", self.reduction, ("mean", "rsqrt", "sum"))
        check_range("rho", self.rho, 0.0, 1.0, "[)")
        if self.clip is not None:
            check_range("clip", self.clip, 0.0, math.inf, "()")
        check_range("momentum", self.momentum, 0.0, 1.0, "[)")
        check_int("momentum_horizon", self.momentum_horizon, 1, 1024)
        if isinstance(self.trainable, str) or (self.trainable is not None and not self.trainable):
            raise ValueError(f"`trainable` must be a list of name patterns or None, got {self.trainable!r}.")
        check_choice("forward_mode", self.forward_mode, ("eval", "train"))
        check_choice("restore", self.restore, ("exact", "copy"))
        check_int("check_interval", self.check_interval, 0)
        check_int("max_bad_steps", self.max_bad_steps, 1)
        check_choice("kernel", self.kernel, KERNELS)
        check_int("scale_log2", self.scale_log2, -120, 120)

    @property
    def eps_log2(self) -> int:
        """Exponent of the power of two that is used for ``eps``."""
        return eps_exponent(self.eps)

    def header(self, engine: SPSAEngine, slots: int, run_id: str | None = None) -> Header:
        """Journal header of a run of ``slots`` directions per worker and step on the engine's parameters.

        Without a ``run_id`` the header's own hash names the run.
        """
        header = Header(
            run_id=run_id or "",
            seed=self.seed,
            eps_log2=self.eps_log2,
            codec=self.codec,
            directions=slots,
            reduction=self.reduction,
            normalize=bool(self.normalize),
            rho=float(self.rho),
            scale_log2=self.scale_log2,
            clip=None if self.clip is None else float(self.clip),
            momentum=float(self.momentum),
            momentum_horizon=self.momentum_horizon,
            params=engine.specification,
            base=engine.base,
        )
        return header if run_id else replace(header, run_id=hashlib.sha256(header.to_json()).hexdigest()[:16])
