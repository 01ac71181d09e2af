"""Decide how many samples each prompt (or how often each example) gets, so that the gradient varies least."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_grad._lightning import refuse_twin
from lightning_grad._tensorboard import Charts, TensorBoardCharts, log_histogram, log_scalars
from lightning_grad._validate import check_choice, check_range
from lightning_grad.allocation.e_step import EStep, Iteration, PilotMode, Processes
from lightning_grad.allocation.estimators import AdvantageKind, Estimator
from lightning_grad.allocation.history import Moment
from lightning_grad.allocation.integer import Rounding
from lightning_grad.allocation.planner import AllocationRule, Cost
from lightning_grad.allocation.prompt_weights import ZeroPolicy
from lightning_grad.allocation.scoring import GradNorm, needed_method
from lightning_grad.callbacks._prompt_allocation import IterationSettings, PromptAllocation
from lightning_grad.callbacks._supervised_allocation import ScoreHistory
from lightning_grad.data.rollouts import RolloutLoader, SamplingModule
from lightning_grad.data.weighted import AllocatedLoader
from lightning_grad.sampling.data_module import RolloutDataModule

AllocationObjective = Literal["em", "reward", "reward_baseline", "importance", "strata"]
_SUPERVISED = ("importance", "strata")
_DEFAULT_DECAY = 0.5
_NOT_LOGGED = ("accepted", "generated")
_NOT_SETTINGS = ("self", "log_histograms", "log_sn_mse_ratio", "save_rollouts")  # no plan depends on them


class DynamicSampleAllocation(TensorBoardCharts):
    r"""Give every prompt as many samples as keeps the variance of the gradient lowest, under a fixed total.

    Once per iteration (an epoch): draw a few pilot samples per prompt or use what is remembered, estimate acceptance
    rate :math:`p_i` and score norm :math:`G_i`, split the budget with :math:`n_i \propto w_i`, generate, and train on
    the weighted samples. With ``objective="em"``, :math:`w_i = G_i / \sqrt{p_i + \alpha p_i^{1-\beta}}`; the reward
    objectives have rules of their own, for which this one would be worse than an even split.

    The module implements :class:`lightning_grad.data.rollouts.SamplingModule`, its data is a
    :class:`lightning_grad.sampling.RolloutDataModule`, its loss
    :func:`lightning_grad.data.rollouts.weighted_policy_loss`. With ``objective="importance"`` or ``"strata"`` ordinary
    examples are drawn instead, from an :class:`lightning_grad.data.weighted.AllocatedLoader`; ``training_step`` then
    returns ``{"loss": ..., "score": [B]}``, or the module has ``per_example_score(batch)``.

    Args:
        samples_per_prompt: Mean samples per prompt, > 0.
        budget: Samples of an iteration; ``None``: ``samples_per_prompt`` times the prompts.
        objective: ``"em"`` mean log p (rejection sampling), ``"reward"`` mean reward without a baseline,
            ``"reward_baseline"`` with one (RLOO, GRPO), ``"importance"`` or ``"strata"`` for ordinary examples.
        estimator: Weights of ``em``: ``"self_normalized"``; ``"horvitz_thompson"``, whose variance the rule minimises;
            ``"flat"``, as published.
        advantage: Baseline of ``reward_baseline``: ``"loo"`` (unbiased), ``"mean"`` or ``"mean_std"``.
        pilot_mode: ``"reuse"`` counts the pilots as samples; ``"discard"`` draws them in addition; ``"history"`` draws
            none and plans by the samples of earlier visits.
        pilot_samples: Pilots per prompt, >= 1.
        history_decay: Factor in [0, 1] on what is remembered at the next visit, of a prompt with
            ``pilot_mode="history"`` or of an example. The other modes plan by the pilots of the visit alone.
        warmup_iterations: First iterations with an even split and no pilots.
        alpha: Damping of hopeless prompts in ``em``, >= 0.
        beta: Its exponent, >= 1.
        prior: Beta prior of the acceptance rates; ``None``: none.
        zero_policy: ``"keep"`` gives prompts without an accepted pilot the median norm, ``"drop"`` no samples.
        shrink: Mix of the weights with uniform, in [0, 1]. ``None``: 0 for ``em``, 0.75 for the reward objectives.
        min_samples: Least samples per prompt, >= 0.
        max_samples: Most samples per prompt.
        rounding: ``"optimal"`` integers or the ``"largest_remainder"`` rule.
        cost: What the budget counts: ``"samples"`` or ``"tokens"``.
        grad_norm: Source of norms: ``"head"`` (no backward pass), ``"token"``, ``"full"``, ``"module"``, ``"none"``.
        moment: ``"rms"`` or ``"mean"`` of the norms.
        grad_norm_params: Parameter names for ``grad_norm="full"``.
        accept_threshold: A sample is accepted if its reward is above.
        prompts_per_iteration: Prompts of an iteration, in turn; ``None``: all.
        steps_per_iteration: Micro-batches into which the samples of an iteration are cut.
        every_n_epochs: Epochs on the same samples.
        uniform_mix: Uniform part of the ``importance`` probabilities, in [0, 1]; bounds the weights by its inverse.
        activate_below: ``importance`` starts once the predicted variance ratio is below this.
        patience_empty: Iterations without one accepted sample until an error is raised.
        max_weight_ratio: Cut weights at this multiple of their mean, >= 1; then no estimator is unbiased.
        log_histograms: Write histograms to TensorBoard.
        save_rollouts: Put the samples into checkpoints. Without them a run resumed in mid-epoch generates anew.
        seed: Seed of pilots, samples and order.
        log_sn_mse_ratio: Predict ``alloc/sn_mse_ratio`` (with ``em``, ``self_normalized`` and ``head``); scoring then
            takes a few per cent longer.

    Raises:
        ValueError: An argument is out of range, or two do not fit.
        MisconfigurationException: The module or the loader lacks what is needed.

    State: iteration, position, plan, decayed sums per prompt, totals; with ``save_rollouts`` the samples.

    Source: arXiv 2505.02391, Algorithms 1 and 2; differences in ``docs/methods/sample_allocation.md``.
    """

    def __init__(
        self,
        samples_per_prompt: float = 8.0,
        budget: int | None = None,
        objective: AllocationObjective = "em",
        estimator: Estimator = "self_normalized",
        advantage: AdvantageKind = "loo",
        pilot_mode: PilotMode = "reuse",
        pilot_samples: int = 4,
        history_decay: float = _DEFAULT_DECAY,
        warmup_iterations: int = 0,
        alpha: float = 1e-3,
        beta: float = 2.0,
        prior: tuple[float, float] | None = (0.5, 0.5),
        zero_policy: ZeroPolicy = "keep",
        shrink: float | None = None,
        min_samples: int = 1,
        max_samples: int | None = None,
        rounding: Rounding = "optimal",
        cost: Cost = "samples",
        grad_norm: GradNorm = "head",
        moment: Moment = "rms",
        grad_norm_params: list[str] | None = None,
        accept_threshold: float = 0.5,
        prompts_per_iteration: int | None = None,
        steps_per_iteration: int = 4,
        every_n_epochs: int = 1,
        uniform_mix: float = 0.1,
        activate_below: float = 0.9,
        patience_empty: int = 3,
        max_weight_ratio: float | None = None,
        log_histograms: bool = True,
        save_rollouts: bool = False,
        seed: int = 0,
        log_sn_mse_ratio: bool = True,
    ) -> None:
        # for the check that a checkpoint was made with the same settings
        settings = {k: v for k, v in locals().items() if k not in _NOT_SETTINGS}
        self._settings = hashlib.sha256(repr(sorted(settings.items(), key=str)).encode()).hexdigest()
        check_choice("objective", objective, ("em", "reward", "reward_baseline", *_SUPERVISED))
        self.supervised = objective in _SUPERVISED
        self.objective = objective
        self.uniform_mix = check_range("uniform_mix", uniform_mix, 0.0, 1.0)
        self.activate_below = check_range("activate_below", activate_below, 0.0, float("inf"), "[)")
        self.log_histograms, self.save_rollouts = log_histograms, save_rollouts
        self.settings = IterationSettings(
            samples_per_prompt, budget, history_decay, warmup_iterations, prompts_per_iteration, steps_per_iteration,
            every_n_epochs, patience_empty, seed,
        )  # fmt: skip
        self.rule = AllocationRule(
            "em" if self.supervised else objective,  # type: ignore[arg-type]
            alpha, beta, None if prior is None else (prior[0], prior[1]), zero_policy, shrink, min_samples, max_samples,
            rounding, cost,
        )  # fmt: skip
        self.e_step = EStep(
            self.rule, estimator, advantage, pilot_mode, pilot_samples, grad_norm, moment,
            None if grad_norm_params is None else tuple(grad_norm_params), accept_threshold, max_weight_ratio,
            log_sn_mse_ratio,
        )  # fmt: skip
        if budget is None and not self.supervised and pilot_mode == "reuse" and pilot_samples >= samples_per_prompt:
            raise ValueError(
                f"pilot_mode='reuse' with pilot_samples={pilot_samples} leaves nothing to allocate at"
                f" samples_per_prompt={samples_per_prompt:g}; use fewer pilots or 'discard'."
            )
        if history_decay != _DEFAULT_DECAY and not self.supervised and pilot_mode != "history":
            rank_zero_warn(
                f"DynamicSampleAllocation: history_decay={history_decay} has no effect with pilot_mode={pilot_mode!r},"
                " which plans by fresh pilots; use pilot_mode='history', or leave it out."
            )
        self.iteration = -1
        self._position = 0  # batches done
        self._prompts: PromptAllocation | None = None
        self._scores: ScoreHistory | None = None
        self._who = Processes()
        self._restored: dict[str, Any] | None = None
        self._prepared = False

    @property
    def plan(self) -> Tensor | None:
        """Samples of each prompt of the running iteration; ``None`` before the first."""
        return None if self._prompts is None else self._prompts.plan

    @property
    def generated(self) -> int:
        """Samples drawn since the start of the run, pilots included."""
        return 0 if self._prompts is None else self._prompts.generated

    @classmethod
    def reference(cls, **changes: Any) -> DynamicSampleAllocation:
        """The published pipeline: discarded pilots, no smoothing, hopeless prompts dropped, flat weights."""
        published: dict[str, Any] = {
            "pilot_mode": "discard", "pilot_samples": 8, "alpha": 1e-3, "beta": 2.0, "prior": None,
            "zero_policy": "drop", "min_samples": 0, "rounding": "largest_remainder", "moment": "mean",
            "estimator": "flat",
        }  # fmt: skip
        return cls(**(published | changes))

    @property
    @override
    def state_key(self) -> str:
        return "DynamicSampleAllocation"

    @override
    def tensorboard_charts(self, trainer: pl.Trainer) -> Charts:
        """Variance against an even split; for prompts budget and acceptance, for examples their weights."""
        charts = {"predicted variance, 1 = even split": ["alloc/variance_ratio", "alloc/sn_mse_ratio"]}
        if self.supervised:
            weights = {"largest weight": ["alloc/weight_max"], "effective number of examples": ["alloc/ess"]}
            return {"alloc": charts | weights}
        charts |= {
            "samples of a prompt": ["alloc/n_min", "alloc/n_max"],
            "budget": ["alloc/budget", "alloc/pilot_generated"],
            "acceptance": ["alloc/acceptance_rate", "alloc/zero_accept_frac", "alloc/missing_frac"],
        }
        loader = getattr(getattr(trainer, "datamodule", None), "loader", None)
        if not isinstance(loader, RolloutLoader) or loader.difficulty is not None:  # or it is not known yet
            charts["acceptance by difficulty"] = ["alloc/acceptance_difficulty_*"]
        return {"alloc": charts}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_twin(trainer)
        if stage != "fit":
            return
        reload: int = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        if reload:
            raise MisconfigurationException(
                "DynamicSampleAllocation needs `reload_dataloaders_every_n_epochs=0`: a new epoch's samples go into the"
                f" loader that exists, got {reload}."
            )
        self._who = _processes(trainer)
        datamodule = getattr(trainer, "datamodule", None)
        if isinstance(datamodule, RolloutDataModule):  # a loader of the user's own has a number of its own
            datamodule.loader.steps_per_iteration = self.settings.steps_per_iteration
        if self.supervised:
            return
        name = type(pl_module).__name__
        if not isinstance(pl_module, SamplingModule):
            raise MisconfigurationException(
                f"DynamicSampleAllocation(objective={self.objective!r}) needs a LightningModule with sample(prompts,"
                f" counts, generator); {name} has none."
            )
        method = needed_method(self.e_step.grad_norm)
        if method is not None and not hasattr(pl_module, method):
            raise MisconfigurationException(
                f"grad_norm={self.e_step.grad_norm!r} needs a LightningModule with {method}(rollouts); {name} has none."
                " Add it or use grad_norm='none'."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._prepared = False
        loader = trainer.train_dataloader
        wanted = AllocatedLoader if self.supervised else RolloutLoader
        if not isinstance(loader, wanted):
            raise MisconfigurationException(
                f"DynamicSampleAllocation(objective={self.objective!r}) needs the training loader to be a"
                f" {wanted.__module__}.{wanted.__name__}, got {type(loader).__name__}. A DataLoader reads its"
                " data before the first allocation is made."
            )
        if isinstance(loader, AllocatedLoader):
            kind, decay, seed = self.objective, self.settings.history_decay, self.settings.seed
            earlier = self._scores
            self._scores = ScoreHistory(loader, kind, decay, self.uniform_mix, self.activate_below, seed)
            if earlier is not None:  # fit() called once more
                self._scores.go_on_from(earlier)
        else:
            before = self._prompts
            self._prompts = PromptAllocation(loader, self.e_step, self.settings, self._who)
            if before is not None and before.history.num_prompts == self._prompts.history.num_prompts:
                self._prompts.load_state_dict(before.state_dict(False))  # fit() called once more
        if self._restored is not None:
            state, self._restored = self._restored, None
            self._resume(trainer, pl_module, state)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._prepared:
            self._begin(trainer, pl_module)
        self._prepared = False

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._prepared = False
        if self._scores is not None and not outputs:  # training_step returned None: nothing was trained on
            self._position = self._scores.loader.position
        elif self._scores is not None:
            score = outputs.get("score") if isinstance(outputs, dict) else None
            if score is None:
                score = _score_by_module(pl_module, batch)
            self._scores.add(batch["index"], score)
            self._position = self._scores.loader.position
        elif self._prompts is not None:
            self._position = self._prompts.loader.position

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Say what a batch holds, if the first one failed: ``x, y = batch`` was right with another loader."""
        self.teardown(trainer, pl_module, "fit")
        first = self._scores is not None and self.iteration == 0 and self._position == 0
        if first and isinstance(exception, ValueError | TypeError | LookupError | AttributeError):
            exception.add_note(
                "A batch of AllocatedLoader is a dict with `data` (what a DataLoader would give), `index` and `weight`."
                f" {type(pl_module).__name__}.training_step takes its examples from batch['data'] and returns the loss"
                " (batch['weight'] * losses).mean()."
            )

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave no plan in the loader, which may be trained on without this callback."""
        if stage == "fit" and self._scores is not None:
            self._scores.loader.clear_plan()

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the next epoch."""
        if self._scores is not None:
            self.iteration += 1
            self._scores.fold(self._who)
            report = self._scores.plan(self.iteration, self.iteration < self.settings.warmup_iterations)
            log_scalars(trainer, {f"alloc/{name}": value for name, value in report.items()})
        elif self._prompts is not None:
            done = self._prompts.begin(pl_module)
            self.iteration = self._prompts.iteration
            if done is not None:
                self._log(trainer, done, self._prompts)
        self._position = 0

    def _log(self, trainer: pl.Trainer, done: Iteration, prompts: PromptAllocation) -> None:
        values = {f"alloc/{name}": value for name, value in done.report.items() if name not in _NOT_LOGGED}
        values["alloc/generated_total"] = float(prompts.generated)
        log_scalars(trainer, values | prompts.by_difficulty(done.sums))
        if self.log_histograms:
            log_histogram(trainer, "alloc/hist_n", done.plan.counts)
            log_histogram(trainer, "alloc/hist_p", done.plan.p)
            log_histogram(trainer, "alloc/hist_grad_norm", done.plan.grad_norm)

    @override
    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "version": 1, "iteration": self.iteration, "pass": 0, "position": self._position, "generated": 0,
            "empty": 0, "settings": self._settings, "plan": None, "history": None, "rollouts": None,
            "scores": None if self._scores is None else self._scores.state_dict(self._who),
        }  # fmt: skip
        return state if self._prompts is None else state | self._prompts.state_dict(self.save_rollouts)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("version") != 1:
            raise ValueError(
                f"DynamicSampleAllocation: the saved state has version {state_dict.get('version')!r}, this release"
                " reads 1. Resume with the release that wrote it, or leave the callback out."
            )
        self._restored = state_dict

    def _resume(self, trainer: pl.Trainer, pl_module: pl.LightningModule, state: dict[str, Any]) -> None:
        if state["settings"] != self._settings:
            rank_zero_warn("DynamicSampleAllocation: the checkpoint was written with other settings; these are used.")
        self.iteration, self._position = state["iteration"], state["position"]
        if self._scores is not None:
            self._scores.load_state_dict(state["scores"], self._who, self._position)
        finished = self.iteration < 0 or self._position >= int(trainer.num_training_batches)
        if self._prompts is not None:
            self._prompts.load_state_dict(state)
            # for this epoch's rest, or further passes
            if self.iteration >= 0 and (not finished or self._prompts.more_passes):
                self._prompts.refill(pl_module, state["rollouts"], self._position)
        if finished:  # Lightning may go on with the next epoch without announcing it
            self._begin(trainer, pl_module)
            self._prepared = True
        elif self._position == 0:
            self._prepared = True


def _score_by_module(pl_module: pl.LightningModule, batch: Any) -> Tensor:
    if not hasattr(pl_module, "per_example_score"):
        raise MisconfigurationException(
            f"{type(pl_module).__name__}.training_step must return a dict with 'loss' and 'score' (one number per"
            " example), or the module must have per_example_score(batch)."
        )
    with torch.no_grad():
        score: Tensor = pl_module.per_example_score(batch)  # type: ignore[operator]
    return score


def _processes(trainer: pl.Trainer) -> Processes:
    if trainer.world_size == 1:
        return Processes()
    device = trainer.strategy.root_device

    def add(value: Tensor) -> Tensor:
        total = value.to(device)
        dist.all_reduce(total)
        return total.cpu()

    return Processes(trainer.global_rank, trainer.world_size, add)
