"""Learning rate, and momentum if wanted, from the curvature of the loss during the run."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_grad._tensorboard import Charts, log_scalars
from lightning_grad._validate import check_choice, check_int, check_range
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
from lightning_grad.callbacks._owns_lr import OwnsLearningRate
from lightning_grad.callbacks._spectrum import log_spectrum, require_figures
from lightning_grad.statistics.curvature import Mode
from lightning_grad.statistics.curvature_lanczos import Spectrum, spectrum
from lightning_grad.statistics.stability import LearningRateRule, curvature_lr, growth_limit, heavy_ball, smoothed_lr

Mu = float | Literal["abs_min", "smallest_positive"]

_MOST_MOMENTUM = 0.99


class LanczosLearningRate(OwnsLearningRate):
    r"""Set the learning rate from the largest eigenvalue :math:`L` of the Hessian, measured every so often.

    Every ``every_n_steps`` optimizer steps, on the first micro-batch of the step: ``k`` Hessian-vector products, then

    - ``polyak``: :math:`\eta^* = (1 + \sqrt\beta)^2 / L` at the optimizer's momentum :math:`\beta`; with
      ``momentum="set"`` heavy ball's optimum :math:`\eta^* = (2/(\sqrt L + \sqrt\mu))^2`,
      :math:`\beta^* = ((\sqrt L - \sqrt\mu)/(\sqrt L + \sqrt\mu))^2`;
    - ``inverse``: :math:`1/L`; ``edge``: the limit of stability, :math:`2(1 + \beta)/L`.

    The learning rate is ``safety`` times that, smoothed and limited. ``safety`` should be below 1: Polyak's step lies
    only :math:`(1 - \sqrt\beta)^2/L` under the edge. A scheduler still shapes it: the optimizer's own learning rate
    counts only as the scheduler's factor. For Adam and AdamW, with ``preconditioned=True``, the eigenvalue is that of
    the preconditioned Hessian and the steps are :math:`1/(1 - \beta_1)` times larger.

    These rules are for convex quadratics. A network at the start is none: its smallest eigenvalue is about
    :math:`-L`, and :math:`L` grows tenfold within a few steps. So there are three safeguards, on by default:
    ``max_growth`` bounds the step by the most negative eigenvalue too, ``early`` measures 1, 3, 7, 15, ... steps after
    the first time, and a learning rate that must fall does so at once. ``max_growth: null, early: false,
    smooth_falls: true`` is the plain rule.

    Tags: ``curvature/lambda_max``, ``curvature/lambda_min``, ``curvature/trace``, ``curvature/mu``,
    ``curvature/lr_star``, ``curvature/lr_applied``, ``curvature/momentum``, ``curvature/negative_mass``,
    ``curvature/skipped``, the histogram ``curvature/spectrum`` and the figure ``curvature/density``.

    Args:
        every_n_steps: Optimizer steps from one measurement to the next, >= 1.
        k: Products per probe, >= 2.
        num_probes: Random start vectors, >= 1; the largest value counts.
        rule: See above.
        momentum: ``"keep"`` the optimizer's, or ``"set"`` it too (rule ``polyak``, SGD without Nesterov, or Adam).
        mu: Smallest curvature for ``"set"``: a number > 0, ``"abs_min"``, the absolute value of the smallest Ritz
            value, or ``"smallest_positive"``, the smallest one above :math:`L/1000`.
        safety: Factor on the learning rate, in (0, 1].
        correct_batch: Correct :math:`L` from the samples measured on to those of an optimizer step: sampling adds
            about the rest of the trace over their number.
        ema: Weight of the old learning rate in the average of logarithms, in [0, 1).
        max_change: Largest factor from one measurement to the next, > 1.
        smooth_falls: Whether ``ema`` and ``max_change`` hold for a falling learning rate too.
        max_growth: Largest growth per step of a displacement along the most negative curvature, > 1
            (:func:`lightning_grad.statistics.stability.growth_limit`); ``None``: no such limit.
        early: Also measure 1, 3, 7, ... steps after the first measurement, until ``every_n_steps``.
        lr_bounds: Smallest and largest learning rate.
        preconditioned: Needed for Adam and AdamW.
        probe: ``"current"`` measures on the batch at hand, ``"fixed"`` on the first ones of the run (one process).
        probe_batches: Micro-batches of the fixed probe, >= 1.
        spectrum: Log the spectrum as a histogram (TensorBoard).
        figure: Draw the spectral density (TensorBoard; needs matplotlib).
        warmup_steps: Optimizer steps before the first measurement; until then the optimizer's learning rate counts.
        mode: ``"autograd"``, ``"finite_difference"``, or ``"auto"``: the first where it exists.
        seed: Of the probes.

    Raises:
        ValueError: An argument is out of range, or parameters are not float32 or float64.
        MisconfigurationException: An optimizer that is not SGD, Adam or AdamW; Adam without ``preconditioned``;
            Nesterov's momentum with ``polyak``; dampening; a sharding strategy; several optimizers or processes where
            one is needed; another callback sets the learning rate.

    State: learning rate, momentum, what was measured last, counters, and the batches of a fixed probe.

    Source: the idea of Granziol, Zohren, Roberts (arXiv:2006.09092); how often, on what, smoothing and limits are ours.
    """

    def __init__(
        self,
        every_n_steps: int = 2000,
        k: int = 20,
        num_probes: int = 1,
        rule: Literal["polyak", "inverse", "edge"] = "polyak",
        momentum: Literal["keep", "set"] = "keep",
        mu: Mu = "abs_min",
        safety: float = 0.5,
        correct_batch: bool = False,
        ema: float = 0.5,
        max_change: float = 2.0,
        smooth_falls: bool = False,
        max_growth: float | None = 1.2,
        early: bool = True,
        lr_bounds: tuple[float, float] = (1e-8, 1e2),
        preconditioned: bool = False,
        probe: Literal["current", "fixed"] = "current",
        probe_batches: int = 1,
        spectrum: bool = True,
        figure: bool = False,
        warmup_steps: int = 0,
        mode: Mode = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.every_n_steps, self.k = check_int("every_n_steps", every_n_steps, 1), check_int("k", k, 2)
        self.num_probes = check_int("num_probes", num_probes, 1)
        self.rule = check_choice("rule", rule, get_args(LearningRateRule))
        self.momentum = check_choice("momentum", momentum, ("keep", "set"))
        if isinstance(mu, str):
            check_choice("mu", mu, ("abs_min", "smallest_positive"))
        else:
            check_range("mu", mu, 0.0, math.inf, "()")
        self.mu: Mu = mu
        self.safety = check_range("safety", safety, 0.0, 1.0, "(]")
        self.correct_batch = correct_batch
        self.ema = check_range("ema", ema, 0.0, 1.0, "[)")
        self.max_change = check_range("max_change", max_change, 1.0, math.inf, "()")
        self.smooth_falls, self.early = smooth_falls, early
        self.max_growth = None if max_growth is None else check_range("max_growth", max_growth, 1.0, math.inf, "()")
        low, high = lr_bounds
        check_range("lr_bounds[0]", low, 0.0, math.inf, "()")
        check_range("lr_bounds[1]", high, low, math.inf, "[)")
        self.lr_bounds = (low, high)
        self.preconditioned = preconditioned
        self.probe = check_choice("probe", probe, ("current", "fixed"))
        self.probe_batches = check_int("probe_batches", probe_batches, 1)
        if probe == "current" and probe_batches > 1:
            raise ValueError(f"`probe_batches` above 1 needs `probe='fixed'`, got {probe_batches}.")
        if momentum == "set" and rule != "polyak":
            raise ValueError(f"`momentum='set'` needs `rule='polyak'`, got {rule!r}.")
        self.spectrum, self.figure = spectrum, figure
        self.warmup_steps = check_int("warmup_steps", warmup_steps, 0)
        check_choice("mode", mode, get_args(Mode))
        self.mode: Mode = mode
        self.seed = check_int("seed", seed, 0)
        self._lr: float | None = None
        self._momentum: float | None = None
        self._measured: dict[str, float] = {}
        self._pending: dict[str, float] = {}
        self._owed = False
        self._skipped = 0
        self._warned = False
        self._fixed: list[Any] = []
        self._asked: int | None = None  # the step whose turn was looked at last
        self._handle: Any = None

    def state_dict(self) -> dict[str, Any]:
        """Return what was decided, what was measured, and the fixed batches."""
        return {
            "lr": self._lr,
            "momentum": self._momentum,
            "measured": dict(self._measured),
            "owed": self._owed,
            "skipped": self._skipped,
            "fixed": self._fixed,
            "asked": self._asked,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._lr, self._momentum = state_dict["lr"], state_dict["momentum"]
        self._measured = dict(state_dict["measured"])
        self._owed, self._skipped = state_dict["owed"], state_dict["skipped"]
        self._fixed, self._asked = list(state_dict["fixed"]), state_dict.get("asked")

    def tensorboard_charts(self, trainer: pl.Trainer) -> Charts:
        """Learning rate, ends of the spectrum."""
        return {
            "curvature": {
                "learning rate": ["curvature/lr_star", "curvature/lr_applied"],
                "ends of the spectrum": ["curvature/lambda_max", "curvature/lambda_min"],
                "trace": ["curvature/trace"],
            }
        }

    def wanted_lr(self) -> float | None:
        """Return the learning rate of the last measurement."""
        return self._lr

    def edit(self, index: int, group: dict[str, Any]) -> dict[str, Any]:
        """Values of a parameter group during the step."""
        new = dict(super().edit(index, group))
        if new and self._momentum is not None:
            if "betas" in group:
                new["betas"] = (self._momentum, *group["betas"][1:])
            else:
                new["momentum"] = self._momentum
        return new

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget the steps of an earlier fit."""
        self._asked = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what cannot work, before the first batch."""
        super().on_fit_start(trainer, pl_module)
        check_supported("LanczosLearningRate", trainer, pl_module)
        self._check_optimizer(trainer.optimizers[0])
        if self.probe == "fixed" and trainer.world_size > 1:
            raise MisconfigurationException(
                "LanczosLearningRate(probe='fixed') works with one process: a checkpoint holds the batches of one. Use"
                " probe='current'."
            )
        if self.figure:
            require_figures("LanczosLearningRate(figure=True)")

    def _check_optimizer(self, optimizer: Optimizer) -> None:
        name = type(optimizer).__name__
        if is_adam(optimizer):
            if not self.preconditioned:
                raise MisconfigurationException(
                    f"LanczosLearningRate: {name}'s stability is decided by the preconditioned Hessian; set"
                    " `preconditioned: true`."
                )
            return
        if not is_sgd(optimizer) or self.preconditioned:
            raise MisconfigurationException(
                "LanczosLearningRate works with SGD, and with Adam and AdamW (not amsgrad) if `preconditioned` is true;"
                f" the optimizer is {name}{' and `preconditioned` is true' if self.preconditioned else ''}."
            )
        for group in optimizer.param_groups:
            if group["dampening"] and group["momentum"]:
                raise MisconfigurationException("LanczosLearningRate's rules are for SGD with dampening 0.")
            if group["nesterov"] and self.rule == "polyak":
                raise MisconfigurationException(
                    "LanczosLearningRate: rule='polyak' is the heavy ball's and too large for Nesterov's momentum; use"
                    " rule='edge' or 'inverse'."
                )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach to the optimizer."""
        super().on_train_start(trainer, pl_module)
        # after the edits: sees the learning rate that is applied
        self._handle = trainer.optimizers[0].register_step_pre_hook(lambda opt, *_: self._log(trainer, opt))

    def _detach(self) -> None:
        super()._detach()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure if it is due."""
        if self.probe == "fixed" and len(self._fixed) < self.probe_batches:
            _refuse_unloadable(batch)
            self._fixed.append(batch)
        if not first_of_window(trainer, batch_idx):
            return
        if trainer.global_step != self._asked:  # with manual optimization several batches may come before the next step
            self._asked = trainer.global_step
            self._owed |= self._is_due(trainer.global_step - self.warmup_steps)
        ready = bool(trainer.optimizers[0].state) or not self.preconditioned  # Adam has no second moments at step 0
        if self.probe == "fixed":
            ready = ready and len(self._fixed) == self.probe_batches
        if self._owed and ready:
            self._owed = False
            self._measure(trainer, pl_module, batch)

    def _is_due(self, step: int) -> bool:
        if self.early and 0 <= step < self.every_n_steps:
            return step & (step + 1) == 0  # 0, 1, 3, 7, ...
        return step >= 0 and step % self.every_n_steps == 0

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        batches = [batch]
        if self.probe == "fixed":
            batches = [trainer.strategy.batch_to_device(b) for b in self._fixed]
        found = self._spectrum(trainer, pl_module, batches)
        largest = 0.0 if found is None else found.largest
        if found is not None and self.correct_batch:
            measured_on = samples_per_step(trainer, batches[0]) // trainer.accumulate_grad_batches * len(batches)
            rest = max(0.0, found.trace - found.largest)
            largest = max(0.0, largest - rest / measured_on) + rest / samples_per_step(trainer, batch)
        # one decision for all processes, whatever their rounding and the size of their last batch
        found, largest = trainer.strategy.broadcast((found, largest))
        if found is None or found.largest <= 0.0:
            self._skip()
            if found is None:
                self._warn(trainer.global_step)
            return
        mu = self._smallest(found, largest)
        self._decide(trainer.optimizers[0], largest, found.smallest, mu)
        share_critical_batch(trainer, found.trace, found.largest)
        self._measured |= {
            "curvature/lambda_max": largest,
            "curvature/lambda_min": found.smallest,
            "curvature/trace": found.trace,
            "curvature/mu": mu,
            "curvature/negative_mass": found.negative_mass,
        }
        self._pending = dict(self._measured)
        if self.spectrum or self.figure:
            log_spectrum(trainer, "curvature", found, histogram=self.spectrum, figure=self.figure)

    def _spectrum(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batches: list[Any]) -> Spectrum | None:
        """Ends of the Hessian's spectrum; ``None`` if it is not finite."""
        try:
            with curvature_operator(trainer, pl_module, batches, self.mode, self.preconditioned) as hessian:
                return spectrum(
                    hessian,
                    hessian.size,
                    self.k,
                    self.num_probes,
                    seed=(self.seed + trainer.global_step) * 64,
                    device=hessian.device,
                    dtype=hessian.dtype,
                    reorthogonalize=reorthogonalization(hessian.size),
                )
        except FloatingPointError:
            return None

    def _skip(self) -> None:
        """Keep the learning rate: the curvature is not finite, or nowhere positive."""
        self._skipped += 1
        self._pending["curvature/skipped"] = float(self._skipped)

    def _warn(self, step: int) -> None:
        if not self._warned:
            self._warned = True
            kept = "the optimizer's own" if self._lr is None else f"at {self._lr:.3g}"
            rank_zero_warn(
                f"LanczosLearningRate: the curvature at step {step} is not finite; the learning rate stays {kept}."
                " If the loss is not finite either, the run has diverged: lower `safety` or `max_growth`."
            )

    def _smallest(self, found: Spectrum, largest: float) -> float:
        if not isinstance(self.mu, str):
            mu = self.mu
        elif self.mu == "abs_min":
            mu = abs(found.smallest)
        else:
            mu = float(found.values[found.values > 1e-3 * found.largest].min())
        return min(mu, largest)

    def _decide(self, optimizer: Optimizer, largest: float, smallest: float, mu: float) -> None:
        beta = momentum_of(optimizer)
        nesterov = any(group.get("nesterov") for group in optimizer.param_groups)
        if self.momentum == "set":
            star, beta = heavy_ball(largest, mu)
            if beta > _MOST_MOMENTUM:
                beta = _MOST_MOMENTUM
                star = curvature_lr(largest, beta)
            self._momentum = beta
        else:
            star = curvature_lr(largest, beta, self.rule, nesterov)
        limit = math.inf if self.max_growth is None else growth_limit(smallest, beta, self.max_growth, nesterov)
        if is_adam(optimizer):  # it averages gradients where the heavy ball adds them up
            limit /= 1.0 - beta
            star /= 1.0 if self.rule == "inverse" else 1.0 - beta
        wanted = min(self.safety * star, limit)
        self._lr = smoothed_lr(self._lr, wanted, self.ema, self.max_change, self.lr_bounds, self.smooth_falls)
        self._measured |= {"curvature/lr_star": star, "curvature/momentum": beta}

    def _log(self, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        if self._pending and trainer.loggers:
            log_scalars(trainer, self._pending | {"curvature/lr_applied": learning_rate(optimizer)})
        self._pending = {}


def _refuse_unloadable(batch: Any) -> None:
    """Raise if a checkpoint with ``batch`` in it could be read only by unpickling what it likes."""
    if type(batch) in (dict, list, tuple):
        for item in batch.values() if isinstance(batch, dict) else batch:
            _refuse_unloadable(item)
    elif not isinstance(batch, Tensor | str | int | float | None):
        raise MisconfigurationException(
            "LanczosLearningRate(probe='fixed') keeps its batches in checkpoints, which hold tensors, numbers and"
            f" strings in dicts, lists and tuples; this batch holds a {type(batch).__name__}. Let the loader's"
            " `collate_fn` return a dict, or use probe='current'."
        )
