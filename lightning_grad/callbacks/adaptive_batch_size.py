"""The batch size follows the gradient noise, inside a running Trainer."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_grad._lightning import refuse_twin
from lightning_grad._tensorboard import Charts, TensorBoardCharts
from lightning_grad._validate import check_choice, check_int
from lightning_grad.allocation.batch_size import (
    BatchPlan,
    BatchSizeController,
    Criterion,
    CriterionName,
    Decision,
    criterion_named,
)
from lightning_grad.callbacks._batch_checks import needs_two, possible_mode, refuse, refuse_copies
from lightning_grad.callbacks._batch_drivers import (
    AccumulateDriver,
    PlanSettings,
    SamplerDriver,
    WatchDriver,
    rescale_gradients,
)
from lightning_grad.callbacks._batch_log import BatchLog
from lightning_grad.callbacks._batch_probe import GradientProbe
from lightning_grad.callbacks._batch_schedules import resolve_schedules, sample_schedules, warn_of_step_schedules
from lightning_grad.callbacks.batch_size_lr_scaler import BatchSizeLRScaler

_PAPER: dict[str, Any] = {
    "test_interval": 1,
    "ema": 0.0,
    "max_growth": None,
    "min_change": 1.0,
    "denominator": "biased",
    "allow_decrease": False,
}

_MODES: dict[type[WatchDriver], str] = {
    SamplerDriver: "sampler",
    AccumulateDriver: "accumulate",
    WatchDriver: "monitor",
}


class AdaptiveBatchSize(TensorBoardCharts):
    r"""Grow the batch when the gradient is noise-dominated, as told by a test on the gradient itself.

    A batch of :math:`B = W k m` samples (W processes, accumulation k, micro-batch m) is enough while the noise of its
    gradient is small against the gradient; see :class:`NormTest` and the other criteria. First the micro-batch grows,
    up to ``max_micro_batch_size``, then accumulation in powers of two. Every sample is used once an epoch, validation
    and schedulers run as often as they should, and a resumed run repeats the uninterrupted one bit for bit.

    Args:
        max_batch_size: Largest B.
        criterion: The test: a name (for default arguments), :class:`NormTest` and its kin, or a :class:`Criterion` of
            your own.
        estimator: ``"micro_batch"`` compares the micro-batches of a step (needs W k >= 2), ``"ghost"`` reads per-sample
            norms off Linear, ConvNd, Embedding and norm layers, ``"vmap"`` differentiates each sample. ``"auto"``:
            micro-batches where there are two, else ghost, else it splits the batch in two.
        scope: Parameters to measure: ``"all"``, ``"norm_layers"`` (weights of norm layers, a proxy), or name patterns.
        mode: ``"sampler"`` changes the loader's batch, then accumulation; ``"accumulate"`` only the latter (any
            loader); ``"monitor"`` measures only; ``"auto"`` is ``"sampler"`` where the loader allows it.
        min_batch_size: Smallest B, at least 2 (one sample shows no noise); default the first.
        max_micro_batch_size: Largest m; default the first, so that only k grows.
        min_accumulate: Smallest k, a power of two.
        round_to: m is a multiple of this.
        quantize: ``"pow2"`` restricts m to ``round_to`` times powers of two (compiled models).
        test_interval: Optimizer steps between tests; ``"auto"`` is 2 for micro-batches, 8 for ghost, 50 for vmap.
        warmup_steps: Optimizer steps before the first test.
        ema: Decay of the averages of variance and gradient norm, in [0, 1).
        denominator: ``"unbiased"`` or ``"biased"`` (the paper's) squared gradient norm.
        finite_population: Count that an epoch draws without replacement.
        allow_decrease: Let B shrink. Without it B ratchets up under noise.
        max_growth: Largest factor of one change, > 1; None for no limit.
        min_change: Smallest factor worth a change, >= 1.
        lr_scaler: Lets the learning rate follow B.
        preset: ``"paper"`` sets what AdAdaGrad uses: every step tested alone, biased denominator, no limits.
        monitor_only: The same as ``mode="monitor"``.
        max_samples: Stop training after so many samples.
        log_vs_samples: Also log ``samples/batch_size`` and ``samples/train_loss`` with samples seen as the step.
        seed: Seed of the sample order in ``"sampler"`` mode.
        log: Log at all.

    Raises:
        ValueError: An argument is out of range, or ``max_batch_size`` is below the first batch.
        MisconfigurationException: A Trainer setting this cannot work with; the text names the alternative.

    State: the controller's averages, samples seen, tests, steps, the scaler's state, and the loader's position.

    Source: Lau, Liu, Kolar, AdAdaGrad (arXiv:2402.11215). Differs from it by default: averages over tests, unbiased
    denominator, growth at most 2x a test; ``preset="paper"`` goes back.
    """

    def __init__(
        self,
        max_batch_size: int,
        criterion: Criterion | CriterionName = "norm",
        estimator: Literal["auto", "micro_batch", "ghost", "vmap"] = "auto",
        scope: Literal["all", "norm_layers"] | list[str] = "all",
        mode: Literal["auto", "accumulate", "sampler", "monitor"] = "auto",
        min_batch_size: int | None = None,
        max_micro_batch_size: int | None = None,
        min_accumulate: int = 1,
        round_to: int = 1,
        quantize: Literal["none", "pow2"] = "none",
        test_interval: int | Literal["auto"] = "auto",
        warmup_steps: int = 0,
        ema: float = 0.95,
        denominator: Literal["biased", "unbiased"] = "unbiased",
        finite_population: bool = False,
        allow_decrease: bool = False,
        max_growth: float | None = 2.0,
        min_change: float = 1.1,
        lr_scaler: BatchSizeLRScaler | None = None,
        preset: Literal["paper"] | None = None,
        monitor_only: bool = False,
        max_samples: int | None = None,
        log_vs_samples: bool = False,
        seed: int = 0,
        log: bool = True,
    ) -> None:
        settings: dict[str, Any] = {
            "test_interval": test_interval,
            "ema": ema,
            "denominator": denominator,
            "allow_decrease": allow_decrease,
            "max_growth": max_growth,
            "min_change": min_change,
        }
        if preset is not None:
            check_choice("preset", preset, ("paper",))
            settings |= _PAPER
        check_choice("mode", mode, ("auto", "accumulate", "sampler", "monitor"))
        self.test_interval = settings.pop("test_interval")
        self.warmup_steps = warmup_steps
        if min_batch_size is not None:
            check_int("min_batch_size", min_batch_size, 2)
        if max_samples is not None:
            check_int("max_samples", max_samples, 1)
        self.seed = check_int("seed", seed, 0)
        self.criterion = criterion_named(criterion) if isinstance(criterion, str) else criterion
        self.controller = BatchSizeController(
            self.criterion, max_batch_size, min_batch_size or 1, finite_population=finite_population, **settings
        )
        self.min_batch_size = min_batch_size
        self.plans = PlanSettings(max_batch_size, max_micro_batch_size, min_accumulate, round_to, quantize)
        self.estimator, self.scope, self.mode = estimator, scope, "monitor" if monitor_only else mode
        self.lr_scaler, self.max_samples = lr_scaler, max_samples
        self.log_vs_samples, self.log = log_vs_samples, log
        self.probe = GradientProbe(
            estimator, scope, self.criterion.needs, self.test_interval, self.warmup_steps, log_vs_samples
        )
        self.probe.on_no_ghost = self._no_ghost
        self.probe.on_other_parameters = self.controller.forget
        self.samples_seen = self.tests = self.skipped_tests = 0
        self._steps = 0
        self._log = BatchLog(scope, log_vs_samples)
        self._decision: Decision | None = None
        self._next_plan: BatchPlan | None = None
        self._stepped = False
        self._driver: WatchDriver | None = None
        self._attached = self._used = self._met = False
        self._pending: dict[str, Any] | None = None
        self._fresh = self.state_dict()

    # ── state ────────────────────────────────────────────────────────────────────────────────────────────────────
    @property
    @override
    def state_key(self) -> str:
        return "AdaptiveBatchSize"

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "version": 1,
            "mode": self._mode_now(),
            "controller": self.controller.state_dict(),
            "samples_seen": self.samples_seen,
            "tests": self.tests,
            "skipped_tests": self.skipped_tests,
            "steps": self._steps,
            **self.probe.state_dict(),
            "min_accumulate": self.plans.min_accumulate,
            "max_micro": self.plans.max_micro,
            "min_batch": self.controller.min_batch_size,
            "lr_scaler": None if self.lr_scaler is None else self.lr_scaler.state_dict(),
            "driver": {} if self._driver is None else self._driver.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.controller.load_state_dict(state_dict["controller"])
        self.samples_seen, self.tests = state_dict["samples_seen"], state_dict["tests"]
        self.skipped_tests, self._steps = state_dict["skipped_tests"], state_dict["steps"]
        self.probe.load_state_dict(state_dict)
        self.plans.min_accumulate = state_dict["min_accumulate"]
        self.plans.max_micro = self.plans.max_micro or state_dict["max_micro"]
        if self.min_batch_size is None:
            self.controller.min_batch_size = state_dict["min_batch"]
        if self.lr_scaler is not None and state_dict["lr_scaler"] is not None:
            self.lr_scaler.load_state_dict(state_dict["lr_scaler"])
        self._pending, self._used = state_dict, False
        if self._driver is not None and state_dict["mode"] == self._mode_now():
            self._driver.load_state_dict(state_dict["driver"])
        elif self._driver is not None and self.mode != "auto":
            rank_zero_warn(
                f"AdaptiveBatchSize: the checkpoint was written in mode {state_dict['mode']!r}, this run is in mode"
                f" {self._mode_now()!r}; it goes on with its first batch size."
            )

    def _mode_now(self) -> str:
        return self.mode if self._driver is None else _MODES[type(self._driver)]

    # ── set-up ───────────────────────────────────────────────────────────────────────────────────────────────────
    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        earlier, self._driver = self._driver, None
        if self._used and trainer.global_step == 0:
            self._reset()
        refuse_twin(trainer)
        refuse(trainer, pl_module, self.mode, self.lr_scaler)
        mode = possible_mode(trainer, self.mode)
        if needs_two(mode, trainer, self.estimator, self.criterion.needs, self.plans):
            self._split()
        refuse_copies(mode, trainer, self.estimator, self.criterion.needs, self.scope, self.plans)
        self._attached, self._met = True, False
        driver = self._driver = self._new_driver(trainer, mode)
        if trainer.global_step > 0 and earlier is not None:  # the Trainer goes on with its run, and so does the plan
            if type(earlier) is type(driver):
                driver.continue_from(earlier)
            self._pending = {"mode": _MODES[type(earlier)], "driver": earlier.state_dict()}
        driver.attach(trainer)  # converts a loader given to fit() at once, and may fall back at once

    def _new_driver(self, trainer: pl.Trainer, mode: str) -> WatchDriver:
        if mode == "monitor":
            return WatchDriver(trainer)
        if mode == "accumulate":
            return AccumulateDriver(trainer)
        driver = SamplerDriver(trainer, self.plans, self.seed)
        driver.on_loader = self._first_plan
        if mode == "auto":
            driver.on_refused = lambda error: self._fall_back(trainer, error)
        return driver

    def _reset(self) -> None:
        """Forget an earlier run: this is another one, and what was learnt there is not true of it."""
        self.load_state_dict(self._fresh)
        self.plans.max_micro = self._fresh["max_micro"]
        self._pending = self._decision = self._next_plan = None
        self._log = BatchLog(self.scope, self.log_vs_samples)

    def _fall_back(self, trainer: pl.Trainer, error: TypeError) -> None:
        """The loader's batch cannot change: change accumulation only."""
        rank_zero_warn(f"AdaptiveBatchSize: {error} Only accumulation will change.")
        self._active.detach(trainer)
        state = self._pending
        self._driver = AccumulateDriver(trainer)
        if state is not None and state["mode"] == "accumulate":
            self._driver.load_state_dict(state["driver"])

    def _split(self) -> None:
        """Make every step of at least two micro-batches: the same work, and a variance can be seen."""
        self.plans.min_accumulate = max(2, self.plans.min_accumulate)

    def _first_plan(self, plan: BatchPlan) -> None:
        """The batch size the user gave is the first plan, and fills in what was left open."""
        self._met = True
        first = plan.batch_size
        if self.mode != "monitor" and self.controller.max_batch_size < first:
            raise ValueError(
                f"`max_batch_size` ({self.controller.max_batch_size}) is below the batch that the run starts with:"
                f" {first} = {plan.world} processes * {plan.accumulate} accumulated * {plan.micro} of the loader."
                " Raise it, or lower one of those."
            )
        if self.mode != "monitor" and self.controller.max_batch_size < plan.world * self.plans.min_accumulate:
            raise ValueError(
                f"`max_batch_size` ({self.controller.max_batch_size}) is less than one sample for each of"
                f" {self.plans.min_accumulate} micro-batches (`min_accumulate`) on {plan.world} processes."
                " Raise it, or lower one of those."
            )
        if self.plans.max_micro is None:
            self.plans.max_micro = plan.micro
        if first == 1 and self.mode != "monitor":
            rank_zero_info("AdaptiveBatchSize: one sample shows no noise. The run starts with batches of two.")
            self._split()
        if self.min_batch_size is None and self.controller.min_batch_size == 1:
            self.controller.min_batch_size = min(max(2, first), self.controller.max_batch_size)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self.probe.attach(pl_module)
        if self.lr_scaler is not None:
            self.lr_scaler.attach(trainer)
        if self.mode != "monitor":
            warn_of_step_schedules(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        driver = self._active
        driver.start(trainer)
        if driver.micro:
            self._meet(driver)
        resolve_schedules(trainer, driver.population)
        self._stepped, self._used = False, True

    def _meet(self, driver: WatchDriver) -> None:
        """The batch size of a loader that keeps it is known: at the start, or from its first batch."""
        self._first_plan(driver.plan)
        if driver.accumulate < self.plans.min_accumulate:
            driver.request(BatchPlan(driver.micro, self.plans.min_accumulate, driver.world))

    @property
    def _active(self) -> WatchDriver:
        assert self._driver is not None, "setup() was not called"
        return self._driver

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._active.start_epoch(trainer)

    # ── one step ─────────────────────────────────────────────────────────────────────────────────────────────────
    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        driver = self._active
        if driver.start_batch(trainer, batch, batch_idx):
            if not self._met:
                self._meet(driver)
            for schedule in sample_schedules(trainer):
                schedule.set_progress(self.samples_seen + driver.expected)
            if self.lr_scaler is not None:
                self.lr_scaler.set_batch_size(driver.batch_size)
            self.probe.begin_step(driver, self._steps)
        self.probe.before_forward(batch)

    def _no_ghost(self, reason: object) -> None:
        """Per-sample norms cannot be told from this model: compare two micro-batches instead."""
        if self._mode_now() == "monitor":
            rank_zero_warn(
                f"AdaptiveBatchSize: {reason}. Nothing is measured: set accumulate_grad_batches >= 2, or use"
                " estimator='vmap'."
            )
            return
        rank_zero_info(f"AdaptiveBatchSize: {reason}. Every step is split into two micro-batches, which are compared.")
        self._split()
        driver = self._active
        self._next_plan = driver.plan_for(driver.plan.batch_size, self.plans)

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self.probe.before_backward(trainer, loss)

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.probe.after_backward(trainer)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        driver = self._active
        self._stepped = True
        if self._mode_now() != "monitor":
            rescale_gradients(list(pl_module.parameters()), driver.gradient_correction)
        stats = self.probe.finish(trainer, driver, optimizer, self._steps)
        if stats is None:
            return
        plan = driver.plan
        self._decision = self.controller.decide(stats, plan.batch_size, driver.population)
        if self._decision is None:
            self.skipped_tests += 1
        else:
            self.tests += 1
            if self.lr_scaler is not None:
                self.lr_scaler.observe_noise_scale(self._decision.stats.noise_scale)
        if self._mode_now() == "monitor":
            return
        new = None if self._decision is None else self._proposal(driver, plan, self._decision.batch_size)
        if trainer.world_size > 1:  # a last bit that differs would part the processes for ever
            new = trainer.strategy.broadcast(new)
        if new is not None:
            self._next_plan = new

    def _proposal(self, driver: WatchDriver, plan: BatchPlan, batch_size: int) -> BatchPlan | None:
        """Another plan that comes close to ``batch_size``, if it is allowed."""
        if batch_size == plan.batch_size:
            return None
        new = driver.plan_for(batch_size, self.plans)
        smaller = new.batch_size < plan.batch_size
        return None if new == plan or (smaller and not self.controller.allow_decrease) else new

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        driver = self._active
        stepped, self._stepped = self._stepped, False
        changed = False
        if stepped:
            self._steps += 1
            self.samples_seen += driver.count_step(trainer)
            if self._next_plan is not None:
                driver.request(self._next_plan)
                self._next_plan, changed = None, True
        driver.end_batch(trainer, batch_idx, stepped)
        if stepped:
            if self.log:
                self._log.step(
                    trainer, pl_module, driver.plan, self._decision, self.probe, self.lr_scaler, steps=self._steps,
                    samples_seen=self.samples_seen, skipped_tests=self.skipped_tests, changed=changed,
                )  # fmt: skip
            if self.max_samples is not None and self.samples_seen >= self.max_samples:
                trainer.should_stop = True
            self._decision = None

    # ── logging ──────────────────────────────────────────────────────────────────────────────────────────────────
    @override
    def tensorboard_charts(self, trainer: pl.Trainer) -> Charts:
        charts = {
            "batching": {
                "batch size": ["batching/batch_size", "batching/target", "batching/noise_scale"],
                "test (above 1: grow)": ["batching/test_ratio"],
            }
        }
        if self.lr_scaler is not None:
            charts["batching"]["learning rate"] = ["lr_scaling/effective_lr"]
            charts["batching"]["factor of the learning rate"] = ["lr_scaling/factor"]
        return charts

    # ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────
    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # Lightning calls no teardown then. What state_dict() reads stays: checkpoint callbacks save after this.
        self._restore(trainer)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._restore(trainer)

    def _restore(self, trainer: pl.Trainer) -> None:
        """Undo, once, what this fit changed in Trainer, model, loader and optimizers."""
        if not self._attached:
            return
        self._attached, self._pending = False, None
        self.probe.detach()
        if self.lr_scaler is not None:
            self.lr_scaler.detach(trainer)
        if self._driver is not None:
            self._driver.detach(trainer)
