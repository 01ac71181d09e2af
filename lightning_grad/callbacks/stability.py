"""How close the learning rate is to the limits of stability, and how noisy the steps are."""

from __future__ import annotations

import math
from typing import Any, get_args

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_grad._lightning import logging_step
from lightning_grad._tensorboard import Charts, TensorBoardCharts, log_scalars
from lightning_grad._validate import check_choice, check_int
from lightning_grad.callbacks._curvature import (
    check_supported,
    curvature_operator,
    first_of_window,
    is_adam,
    is_sgd,
    learning_rate,
    momentum_of,
    reorthogonalization,
    samples_per_step,
    share_critical_batch,
)
from lightning_grad.optim.group_edits import GroupEdits
from lightning_grad.statistics.curvature import HessianOperator, Mode, rademacher
from lightning_grad.statistics.curvature_lanczos import lanczos
from lightning_grad.statistics.curvature_trace import hutchinson
from lightning_grad.statistics.stability import LogSlope, cosine, stability_limits


class _StepHook(TensorBoardCharts):
    """Calls ``_on_step`` right before each step, after other callbacks have set its learning rate."""

    def __init__(self) -> None:
        self._handle: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach to the optimizer."""
        self._detach()
        GroupEdits.of(trainer.optimizers[0])  # its hook must be the earlier one, whatever the order of the callbacks

        def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self._on_step(trainer, optimizer)

        self._handle = trainer.optimizers[0].register_step_pre_hook(hook)

    def _on_step(self, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        raise NotImplementedError

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Detach."""
        self._detach()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Detach."""
        self._detach()

    def _detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


class StabilityMonitor(_StepHook):
    r"""Log the sharpness and trace of the Hessian and how the learning rate compares with what they allow.

    Every ``every_n_steps`` optimizer steps, on the first micro-batch of the step: ``k`` Lanczos steps for
    :math:`\lambda_{\max}` and ``num_probes`` random probes (the Lanczos start is one) for :math:`\mathrm{tr} H` and
    :math:`\|H\|_F`. The limits are those of :func:`lightning_grad.statistics.stability.stability_limits`: they hold
    near a minimum that fits the data, for the optimizer named; elsewhere they are diagnostics. For Adam and AdamW the
    eigenvalue is that of the preconditioned Hessian and the limit is :math:`(2 + 2\beta_1)/(1 - \beta_1)` over it. For
    other optimizers, and SGD with Nesterov's momentum or dampening, curvature is logged and no limit.

    Training is not touched: the weights of a run are bit for bit those of the run without the monitor. Nothing is
    computed without a logger. BatchNorm in training mode makes the batch statistics part of the loss.

    Tags: ``stability/lambda_max``, ``stability/trace``, ``stability/frobenius``, ``stability/lr_over_gd_limit`` (1 is
    the edge), ``stability/lr_over_sgd_limit`` (SGD without momentum), ``stability/batch_sharpness``,
    ``stability/oscillation``, ``weights/distance_from_init`` and ``weights/distance_per_log_step`` (the slope of the
    distance over the logarithm of the step), ``stability/skipped`` (measurements that were not finite).

    Args:
        every_n_steps: Optimizer steps from one measurement to the next, >= 1; the first is at step 0.
        num_probes: Probes of trace and norm, >= 1.
        k: Lanczos steps, >= 2.
        batch_sharpness_batches: Micro-batches for :math:`g^T H g / \|g\|^2` of the batch's own gradient; 0: none.
        oscillation_steps: Pairs of successive steps, after each measurement, whose gradients' cosine is averaged;
            lasting negative values mean that the weights swing across a valley. Keeps a copy of the gradient meanwhile.
        distance_from_init: Log how far the weights are from those at the start. Keeps a copy of them, also in
            checkpoints.
        dataset_size: Training samples, for sampling without replacement.
        mode: ``"autograd"``, ``"finite_difference"``, or ``"auto"``: the first where it exists.
        seed: Of the probes.

    Raises:
        ValueError: An argument is out of range, or parameters are not float32 or float64.
        MisconfigurationException: A sharding strategy, several optimizers, manual optimization without
            ``curvature_loss``, a ``training_step`` with ``dataloader_iter``.

    State: what was measured and not logged yet; the copies of gradient and initial weights, if asked for.
    """

    def __init__(
        self,
        every_n_steps: int = 1500,
        num_probes: int = 4,
        k: int = 10,
        batch_sharpness_batches: int = 0,
        oscillation_steps: int = 0,
        distance_from_init: bool = False,
        dataset_size: int | None = None,
        mode: Mode = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.every_n_steps = check_int("every_n_steps", every_n_steps, 1)
        self.num_probes = check_int("num_probes", num_probes, 1)
        self.k = check_int("k", k, 2)
        self.batch_sharpness_batches = check_int("batch_sharpness_batches", batch_sharpness_batches, 0)
        self.oscillation_steps = check_int("oscillation_steps", oscillation_steps, 0)
        self.distance_from_init = distance_from_init
        self.dataset_size = None if dataset_size is None else check_int("dataset_size", dataset_size, 1)
        check_choice("mode", mode, get_args(Mode))
        self.mode: Mode = mode
        self.seed = check_int("seed", seed, 0)
        self._pending: dict[str, float] = {}
        self._sharpness: list[float] = []
        self._sharpness_left = 0
        self._cosines: list[float] = []
        self._cosines_left = 0
        self._gradient: list[Tensor] = []
        self._initial: dict[str, Tensor] = {}
        self._logs = False  # whether the first process has a logger: the others follow
        self._asked: int | None = None  # the step whose turn was looked at last
        self._distances = LogSlope()
        self._skipped = 0

    def state_dict(self) -> dict[str, Any]:
        """Return what is measured and not logged, and counters."""
        return {
            "pending": dict(self._pending),
            "sharpness": list(self._sharpness),
            "sharpness_left": self._sharpness_left,
            "cosines": list(self._cosines),
            "cosines_left": self._cosines_left,
            "gradient": [g.clone() for g in self._gradient],
            "initial": dict(self._initial),
            "asked": self._asked,
            "distances": list(self._distances.state),
            "skipped": self._skipped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._pending = dict(state_dict["pending"])
        self._sharpness = list(state_dict["sharpness"])
        self._sharpness_left = state_dict["sharpness_left"]
        self._cosines, self._cosines_left = list(state_dict["cosines"]), state_dict["cosines_left"]
        self._gradient, initial = list(state_dict["gradient"]), state_dict["initial"]
        # a list without names in checkpoints of 0.1.0: on_train_start gives it some
        self._initial = dict(initial) if isinstance(initial, dict) else {str(i): w for i, w in enumerate(initial)}
        self._asked = state_dict.get("asked")
        self._distances.state = list(state_dict["distances"])
        self._skipped = state_dict["skipped"]

    def tensorboard_charts(self, trainer: pl.Trainer) -> Charts:
        """One chart for the distance to the limits, one for the sharpness; more for what was asked for."""
        charts = {
            "learning rate over its limit": ["stability/lr_over_gd_limit", "stability/lr_over_sgd_limit"],
            "sharpness": ["stability/lambda_max", "stability/batch_sharpness"],
            "trace": ["stability/trace"],
        }
        if self.oscillation_steps:
            charts["cosine of successive gradients"] = ["stability/oscillation"]
        weights = {"distance from the start": ["weights/distance_from_init"]}
        return {"stability": charts, **({"weights": weights} if self.distance_from_init else {})}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget the steps of an earlier fit."""
        self._asked = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what cannot work, before the first batch."""
        check_supported("StabilityMonitor", trainer, pl_module)
        super().on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach to the optimizer, and keep the weights to measure distances from."""
        super().on_train_start(trainer, pl_module)
        optimizer = trainer.optimizers[0]
        if not is_adam(optimizer) and not (is_sgd(optimizer) and _is_plain(optimizer)):
            rank_zero_info(
                f"StabilityMonitor: no limit of the learning rate is known for {type(optimizer).__name__} as it is set"
                " up here; curvature is logged without one."
            )
        self._logs = trainer.strategy.broadcast(bool(trainer.loggers))
        if not self._logs:
            rank_zero_warn("StabilityMonitor measures nothing: the Trainer has no logger to write to. Give it one.")
        if not self.distance_from_init or not self._logs:
            self._initial = {}
            return
        named = dict(pl_module.named_parameters())
        if not self._initial.keys() <= named.keys():
            trainable = [name for name, p in named.items() if p.requires_grad]
            self._initial = dict(zip(trainable, self._initial.values(), strict=False))
        self._initial = {name: old.to(named[name].device) for name, old in self._initial.items()}
        self._remember_weights(pl_module)

    def _remember_weights(self, pl_module: pl.LightningModule) -> None:
        """Copy the weights that became trainable, which have not moved yet."""
        for name, p in pl_module.named_parameters():
            if p.requires_grad and name not in self._initial:
                self._initial[name] = p.detach().clone()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure if it is due."""
        if not self._logs:
            return
        if self.distance_from_init:
            self._remember_weights(pl_module)
        step = trainer.global_step
        # with manual optimization several batches may come before the next step
        due = first_of_window(trainer, batch_idx) and step != self._asked and step % self.every_n_steps == 0
        self._asked = step
        if due:
            self._sharpness, self._sharpness_left = [], self.batch_sharpness_batches
            self._cosines, self._cosines_left, self._gradient = [], self.oscillation_steps, []
            self._measure_distance(step, pl_module)
        if not due and not self._sharpness_left:
            return
        try:
            if due:
                self._measure(trainer, pl_module, batch)
            if self._sharpness_left:
                self._measure_sharpness(trainer, pl_module, batch)
        except FloatingPointError:
            self._skip()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Detach, and say what a run too short for the interval has missed."""
        super().on_train_end(trainer, pl_module)
        if self._logs and 1 < trainer.global_step <= self.every_n_steps:
            adam = is_adam(trainer.optimizers[0])
            rank_zero_info(
                f"StabilityMonitor measured once in {trainer.global_step} steps, at step 0"
                f"{', where Adam has no second moments yet and so no limit is known' if adam else ''};"
                f" every_n_steps={max(1, trainer.global_step // 10)} gives ten measurements (each costs"
                " tens of steps)."
            )

    def _skip(self) -> None:
        self._skipped += 1
        self._pending["stability/skipped"] = float(self._skipped)

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        optimizer = trainer.optimizers[0]
        with curvature_operator(trainer, pl_module, [batch], self.mode) as hessian:
            lambda_max, trace, frobenius_sq = self._curvature(hessian, self.seed + trainer.global_step)
        values = {
            "stability/lambda_max": lambda_max,
            "stability/trace": trace,
            "stability/frobenius": math.sqrt(frobenius_sq),
        }
        if is_adam(optimizer):
            if optimizer.state:  # no second moments before the first step
                beta = momentum_of(optimizer)
                with curvature_operator(trainer, pl_module, [batch], self.mode, preconditioned=True) as scaled:
                    start = rademacher(scaled.size, self.seed + trainer.global_step, scaled.device, scaled.dtype)
                    largest = float(lanczos(scaled, start, self.k, reorthogonalization(scaled.size)).ritz()[0][-1])
                values["gd_limit"] = (2 + 2 * beta) / ((1 - beta) * largest) if largest > 0 else math.inf
        elif is_sgd(optimizer) and _is_plain(optimizer):
            batch_size = samples_per_step(trainer, batch)
            limits = stability_limits(
                trace, frobenius_sq, lambda_max, batch_size, self.dataset_size, momentum_of(optimizer)
            )
            values |= {"gd_limit": limits["gd"], "sgd_limit": limits["sgd"]}
        self._pending |= values
        share_critical_batch(trainer, *trainer.strategy.broadcast((trace, lambda_max)))

    def _curvature(self, hessian: HessianOperator, seed: int) -> tuple[float, float, float]:
        """Largest eigenvalue, trace, squared Frobenius norm."""
        start = rademacher(hessian.size, seed * 64, hessian.device, hessian.dtype)
        run = lanczos(hessian, start, self.k, reorthogonalization(hessian.size))
        values, weights = run.ritz()
        # the start vector is a probe like the others: z'Hz and |Hz|^2 come with it
        traces = [hessian.size * float(weights @ values)]
        squares = [hessian.size * float(weights @ values**2)]
        for i in range(1, self.num_probes):
            trace, square = hutchinson(
                hessian, hessian.size, 1, seed=seed * 64 + i, device=hessian.device, dtype=hessian.dtype
            )
            traces.append(trace.value)
            squares.append(square.value)
        return float(values[-1]), math.fsum(traces) / len(traces), math.fsum(squares) / len(squares)

    def _measure_sharpness(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        self._sharpness_left -= 1
        with curvature_operator(trainer, pl_module, [batch], self.mode) as hessian:
            gradient = hessian.gradient()
            square = float(gradient.double() @ gradient.double())
            if square > 0:
                self._sharpness.append(float(gradient.double() @ hessian(gradient).double()) / square)
        if not self._sharpness_left and self._sharpness:
            self._pending["stability/batch_sharpness"] = math.fsum(self._sharpness) / len(self._sharpness)

    def _measure_distance(self, step: int, pl_module: pl.LightningModule) -> None:
        if not self._initial:
            return
        now = {name: p.detach() for name, p in pl_module.named_parameters() if name in self._initial}
        gaps = torch._foreach_norm(torch._foreach_sub(list(now.values()), [self._initial[name] for name in now]))
        distance = math.hypot(*(float(gap) for gap in gaps))
        if not math.isfinite(distance):
            self._skip()
            return
        self._distances.add(step, distance)
        self._pending["weights/distance_from_init"] = distance
        if not math.isnan(self._distances.slope):
            self._pending["weights/distance_per_log_step"] = self._distances.slope

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Compare the gradient with that of the step before, in the steps after a measurement."""
        if not self._cosines_left:
            return
        new = [p.grad.detach() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self._gradient and len(self._gradient) == len(new):
            value = cosine(self._gradient, new)
            self._cosines_left -= 1
            if math.isfinite(value):
                self._cosines.append(value)
            else:
                self._skip()
        self._gradient = [g.clone() for g in new] if self._cosines_left else []
        if not self._cosines_left and self._cosines:
            log_scalars(trainer, {"stability/oscillation": math.fsum(self._cosines) / len(self._cosines)})

    def _on_step(self, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        if not self._pending:
            return
        lr = learning_rate(optimizer)
        for name in ("gd", "sgd"):
            limit = self._pending.pop(f"{name}_limit", math.nan)
            if not math.isnan(limit):
                self._pending[f"stability/lr_over_{name}_limit"] = lr / limit
        log_scalars(trainer, self._pending)
        self._pending.clear()


def _is_plain(optimizer: Optimizer) -> bool:
    return not any(group.get("nesterov") or group.get("dampening") for group in optimizer.param_groups)


class SGDTemperatureMonitor(_StepHook):
    r"""Log the temperature of SGD's noise, learning rate over batch size.

    .. math:: T = \eta / B, \qquad T_\beta = \eta / (B (1 - \beta))

    Runs of one temperature behave alike while noise dominates; in the source, the phases of SGD are told apart by it.
    :math:`B` counts the samples of an optimizer step over processes and accumulated batches; the learning rate is the
    one that is applied.

    Tags: ``noise/temperature``, ``noise/temperature_momentum`` (with momentum only; for Adam it is a convention).

    Args:
        every_n_steps: Optimizer steps from one logged value to the next, >= 1.

    Source: Sclocchi, Geiger, Wyart (arXiv:2301.13703).

    State: none.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        super().__init__()
        self.every_n_steps = check_int("every_n_steps", every_n_steps, 1)
        self._samples = 0

    def tensorboard_charts(self, trainer: pl.Trainer) -> Charts:
        """Both temperatures in one chart."""
        return {"noise": {"temperature": ["noise/temperature", "noise/temperature_momentum"]}}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what cannot work, before the first batch."""
        if len(trainer.optimizers) != 1:
            raise MisconfigurationException(
                f"SGDTemperatureMonitor needs one optimizer; the model has {len(trainer.optimizers)}."
            )
        super().on_fit_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count samples on logging steps."""
        if trainer.loggers and (logging_step(trainer) + 1) % self.every_n_steps == 0:
            self._samples = samples_per_step(trainer, batch)

    def _on_step(self, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        if self._samples:
            temperature = learning_rate(optimizer) / self._samples
            values = {"noise/temperature": temperature}
            momentum = momentum_of(optimizer)
            if momentum:
                values["noise/temperature_momentum"] = temperature / (1.0 - momentum)
            log_scalars(trainer, values)
            self._samples = 0
