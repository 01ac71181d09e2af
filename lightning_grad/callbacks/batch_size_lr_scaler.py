"""Let the learning rate follow the batch size, under any LR scheduler."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_grad._validate import check_choice, check_int, check_range
from lightning_grad.allocation.batch_lr import NEEDS_CRITICAL_BATCH, RULES, Rule, lr_factor
from lightning_grad.callbacks._processes import sum_over_processes
from lightning_grad.optim.group_edits import GroupEdits
from lightning_grad.statistics.sample_grads import samples_in

CriticalBatch = float | Literal["noise_scale", "curvature"]


class BatchSizeLRScaler(pl.Callback):
    r"""Multiply the learning rate of each step by a function of its batch size.

    The factor is applied just before the optimizer's step and taken back just after it, so schedulers see the values
    they wrote. Give it to :class:`AdaptiveBatchSize` as ``lr_scaler``, or add it to the Trainer alone if you change the
    batch size by other means. With :math:`b_0` the reference and :math:`c` the critical batch the rules
    (:func:`lightning_grad.allocation.batch_lr.lr_factor`) are ``none`` 1; ``linear`` :math:`b/b_0`; ``sqrt``
    :math:`\sqrt{b/b_0}`; ``power`` :math:`(b/b_0)^p`; ``gain`` (AdaScale) :math:`(1+c/b_0)/(1+c/b)`; ``sqrt_gain`` its
    root; ``surge`` and ``wigner``, see there.

    Args:
        rule: One of the above.
        reference_batch_size: :math:`b_0`; default the batch size of the first step.
        critical_batch: :math:`c`: a number, ``"noise_scale"`` (the estimate of :class:`AdaptiveBatchSize`), or
            ``"curvature"`` (set by a curvature callback through ``critical_batch_size``).
        exponent: :math:`p` of ``power``.
        max_factor: Upper bound on the factor.
        ramp_steps: Optimizer steps over which a new factor is reached, geometrically.
        scale_betas: For Adam-like optimizers, also ``beta -> 1 - kappa (1 - beta)`` and ``eps -> eps / sqrt(kappa)``
            with ``kappa = b/b0`` (Malladi et al., arXiv:2205.10287); goes with ``rule="sqrt"``.
        groups: Indices of the parameter groups to scale; default all.

    Raises:
        ValueError: An argument is out of range, or ``gain``, ``sqrt_gain``, ``surge`` or ``wigner`` lacks
            ``critical_batch``.

    State: ``reference_batch_size``, ``factor`` (the ramp), ``critical_batch_size``.
    """

    def __init__(
        self,
        rule: Rule = "sqrt",
        reference_batch_size: int | None = None,
        critical_batch: CriticalBatch | None = None,
        exponent: float = 0.5,
        max_factor: float | None = None,
        ramp_steps: int = 0,
        scale_betas: bool = False,
        groups: list[int] | None = None,
    ) -> None:
        check_choice("rule", rule, RULES)
        if reference_batch_size is not None:
            check_int("reference_batch_size", reference_batch_size, 1)
        if isinstance(critical_batch, str):
            check_choice("critical_batch", critical_batch, ("noise_scale", "curvature"))
        elif critical_batch is not None:
            check_range("critical_batch", critical_batch, 0.0, math.inf, "()")
        if critical_batch is None and rule in NEEDS_CRITICAL_BATCH:
            lr_factor(rule, 1, 1)  # raises, with the text that lists the choices
        check_range("exponent", exponent, -1e3, 1e3)
        if max_factor is not None:
            check_range("max_factor", max_factor, 0.0, math.inf, "(]")
        check_int("ramp_steps", ramp_steps, 0)
        self.rule: Rule = rule
        self.reference_batch_size = reference_batch_size
        self.critical_batch, self.exponent, self.max_factor = critical_batch, exponent, max_factor
        self.ramp_steps, self.scale_betas, self.groups = ramp_steps, scale_betas, groups
        self.critical_batch_size: float | None = None if isinstance(critical_batch, str) else critical_batch
        self.log_values = True
        self._batch_size = reference_batch_size or 1
        self._factor = 1.0
        self._target = 1.0
        self._ramp = 1.0
        self._remove: list[Callable[[], None]] = []
        self._warned = self._used = False
        self._fresh = self.state_dict()

    @property
    @override
    def state_key(self) -> str:
        return "BatchSizeLRScaler"

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "reference_batch_size": self.reference_batch_size,
            "batch_size": self._batch_size,
            "factor": self._factor,
            "target": self._target,
            "ramp": self._ramp,
            "critical_batch_size": self.critical_batch_size,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.reference_batch_size = state_dict["reference_batch_size"]
        self._batch_size = state_dict["batch_size"]
        self._factor, self._target, self._ramp = state_dict["factor"], state_dict["target"], state_dict["ramp"]
        self._used = False
        if isinstance(self.critical_batch, str):
            self.critical_batch_size = state_dict["critical_batch_size"]

    @property
    def factor(self) -> float:
        """Factor on the learning rate of the present step."""
        return self._factor

    def set_batch_size(self, batch_size: int) -> None:
        """Say how many samples the coming optimizer step uses; called once a step."""
        if self.reference_batch_size is None:
            self.reference_batch_size = batch_size
        self._batch_size = batch_size
        target = self._wanted(batch_size)
        if target != self._target:
            self._target = target
            self._ramp = (target / self._factor) ** (1.0 / self.ramp_steps) if self.ramp_steps else math.inf
        if self._factor != target:
            reached = math.isinf(self._ramp) or abs(math.log(target / self._factor)) <= 1.001 * abs(
                math.log(self._ramp)
            )
            self._factor = target if reached else self._factor * self._ramp

    def observe_noise_scale(self, noise_scale: float) -> None:
        """A new estimate of the gradient noise scale; it is the critical batch if that was asked for."""
        if self.critical_batch == "noise_scale" and 0.0 < noise_scale < math.inf:
            self.critical_batch_size = noise_scale

    def _wanted(self, batch_size: int) -> float:
        assert self.reference_batch_size is not None
        rule: str = self.rule
        if rule in NEEDS_CRITICAL_BATCH and self.critical_batch_size is None:
            rule = "sqrt"  # until the first estimate
        factor = lr_factor(rule, batch_size, self.reference_batch_size, self.critical_batch_size, self.exponent)
        return factor if self.max_factor is None else min(factor, self.max_factor)

    def edit(self, index: int, group: dict[str, Any]) -> Mapping[str, Any]:
        """Values of a parameter group during the step."""
        if self.groups is not None and index not in self.groups:
            return {}
        new: dict[str, Any] = {"lr": group["lr"] * self._factor}
        if self.scale_betas and self.reference_batch_size is not None:
            kappa = self._batch_size / self.reference_batch_size
            if "betas" in group:
                betas = tuple(1.0 - kappa * (1.0 - beta) for beta in group["betas"])
                if min(betas) < 0.0:
                    self._warn_once(
                        f"a batch of {kappa:g} times the reference would need betas {betas}; they are set to 0."
                    )
                new["betas"] = tuple(max(0.0, beta) for beta in betas)
            if "eps" in group:
                new["eps"] = group["eps"] / math.sqrt(kappa)
        return new

    def _warn_once(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            rank_zero_warn(f"BatchSizeLRScaler(scale_betas=True): {text}")

    def attach(self, trainer: pl.Trainer) -> None:
        """Put the edit on every optimizer."""
        self._remove = [GroupEdits.of(optimizer).add(self.edit) for optimizer in trainer.optimizers]
        indices = range(max((len(o.param_groups) for o in trainer.optimizers), default=0))
        if self.groups is not None and not set(self.groups) <= set(indices):
            raise ValueError(f"`groups` must be indices below {len(indices)}, got {self.groups}.")

    def detach(self, trainer: pl.Trainer) -> None:
        """Take the edit off, and undo what a failed step left behind."""
        for remove in self._remove:
            remove()
        self._remove = []
        for optimizer in trainer.optimizers:
            GroupEdits.of(optimizer).restore()

    def log_to(self, pl_module: pl.LightningModule, trainer: pl.Trainer) -> None:
        """Log factor, effective learning rate and critical batch."""
        values: dict[str, float] = {"lr_scaling/factor": self._factor}
        if trainer.optimizers:
            values["lr_scaling/effective_lr"] = float(trainer.optimizers[0].param_groups[0]["lr"]) * self._factor
        if self.critical_batch_size is not None:
            values["lr_scaling/critical_batch"] = self.critical_batch_size
        pl_module.log_dict(values, batch_size=1)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and self._used and trainer.global_step == 0:  # another run
            self.load_state_dict(self._fresh)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.attach(trainer)
        self._used = True

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        k = trainer.accumulate_grad_batches
        if batch_idx % k == 0:
            self.set_batch_size(sum_over_processes(trainer, samples_in(batch)) * k)
            self.log_to(pl_module, trainer)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.detach(trainer)  # Lightning calls no teardown then

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.detach(trainer)
