"""Iterations over prompts: which prompts, their samples in the loader, what is remembered, and how a run goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_grad._validate import check_int, check_range
from lightning_grad.allocation.e_step import EStep, Iteration, Processes, seed_for
from lightning_grad.allocation.history import PromptHistory
from lightning_grad.data.rollouts import RolloutLoader


@dataclass(frozen=True)
class IterationSettings:
    """How iterations follow each other; see :class:`lightning_grad.DynamicSampleAllocation`."""

    samples_per_prompt: float = 8.0
    budget: int | None = None
    history_decay: float = 0.5
    warmup_iterations: int = 0
    prompts_per_iteration: int | None = None
    steps_per_iteration: int = 4
    every_n_epochs: int = 1
    patience_empty: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        check_range("samples_per_prompt", self.samples_per_prompt, 0.0, float("inf"), "()")
        check_range("history_decay", self.history_decay, 0.0, 1.0)
        check_int("warmup_iterations", self.warmup_iterations, 0)
        check_int("steps_per_iteration", self.steps_per_iteration, 1)
        check_int("every_n_epochs", self.every_n_epochs, 1)
        check_int("patience_empty", self.patience_empty, 1)
        check_int("seed", self.seed, 0)
        for name in ("budget", "prompts_per_iteration"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1)

    def total(self, num_prompts: int) -> int:
        """Samples of an iteration."""
        return self.budget if self.budget is not None else round(self.samples_per_prompt * num_prompts)


class PromptAllocation:
    """The prompts of a run and their samples.

    Args:
        loader: Holds the prompts; gets the samples.
        e_step: Makes them.
        settings: How iterations follow each other.
        who: The processes that share the work.

    Raises:
        ValueError: The bounds do not admit the budget.
        MisconfigurationException: The loader does not fit the settings.
    """

    def __init__(self, loader: RolloutLoader, e_step: EStep, settings: IterationSettings, who: Processes) -> None:
        if len(loader) != settings.steps_per_iteration:
            raise MisconfigurationException(
                f"the RolloutLoader has steps_per_iteration={len(loader)}, DynamicSampleAllocation"
                f" {settings.steps_per_iteration}. Give both the same."
            )
        m = len(loader.prompts)
        if settings.prompts_per_iteration is not None and settings.prompts_per_iteration > m:
            raise MisconfigurationException(
                f"prompts_per_iteration={settings.prompts_per_iteration} exceeds the {m} prompts of the data;"
                " lower it, or leave it out for all of them."
            )
        rule = e_step.rule
        if rule.floor > rule.min_samples:
            rank_zero_info("DynamicSampleAllocation: min_samples is 2, which a baseline from other samples needs.")
        at_least = e_step.pilot_samples if e_step.pilot_mode == "reuse" else 0
        k = settings.prompts_per_iteration or m
        rule.even(k, settings.total(k), at_least=at_least)  # raises if the bounds do not admit the budget
        if settings.total(k) == at_least * k:
            raise ValueError(
                f"pilot_mode='reuse' with pilot_samples={at_least} leaves nothing to allocate of the"
                f" {settings.total(k)} samples for {k} prompts; use fewer pilots or 'discard'."
            )
        self.loader, self.e_step, self.settings, self.who = loader, e_step, settings, who
        self.history = PromptHistory(m, settings.history_decay, e_step.moment)
        self.iteration = -1
        self.generated = 0
        self.plan: Tensor | None = None
        self._pass = 0  # epochs on the samples of this iteration, before the running one
        self._empty = 0

    def begin(self, pl_module: pl.LightningModule) -> Iteration | None:
        """Start the next epoch: new samples, or (``None``) another pass over those that are there."""
        if self.loader.items is not None and self.more_passes:
            self._pass += 1
            self.loader.reshuffle(self._order_seed())
            return None
        self.iteration += 1
        self._pass = 0
        done = self._generate(pl_module, None)
        self.history.visit(self.chosen(), done.sums)
        self.plan = done.plan.counts
        self.generated += int(done.report["generated"])
        self._watch(done)
        return done

    @property
    def more_passes(self) -> bool:
        """Whether the next epoch is on the same samples."""
        return self._pass + 1 < self.settings.every_n_epochs

    def _order_seed(self) -> int:
        return seed_for(self.settings.seed, self.iteration, self.who.rank, self._pass, 2)

    def chosen(self) -> Tensor:
        """Indices of the prompts of this iteration: slices of a permutation, drawn anew when it is used up."""
        m = len(self.loader.prompts)
        k = self.settings.prompts_per_iteration or m
        if k == m:
            return torch.arange(m)
        turn, place = divmod(self.iteration, m // k)
        order = torch.randperm(m, generator=torch.Generator().manual_seed(seed_for(self.settings.seed, turn)))
        return order[place * k : (place + 1) * k]

    def _generate(self, pl_module: pl.LightningModule, counts: Tensor | None) -> Iteration:
        chosen, seed = self.chosen(), self.settings.seed
        modes = {module: module.training for module in pl_module.modules()}
        pl_module.eval()
        try:
            with isolate_rng(), torch.no_grad():
                torch.manual_seed(seed_for(seed, self.iteration, self.who.rank, 3))
                done = self.e_step.run(
                    pl_module,  # type: ignore[arg-type]
                    [self.loader.prompts[i] for i in chosen.tolist()],
                    self.history.of(chosen),
                    self.settings.total(len(chosen)),
                    seed=seed_for(seed, self.iteration),
                    uniform=self.iteration < self.settings.warmup_iterations,
                    counts=counts,
                    processes=self.who,
                )
        finally:
            for module, mode in modes.items():
                module.training = mode
        # each micro-batch estimates the gradient of the whole iteration, after the mean over processes
        scale = self.settings.steps_per_iteration * self.who.world
        self.loader.fill(done.items | {"weight": done.items["weight"] * scale}, self._order_seed(), 0)
        return done

    def by_difficulty(self, sums: Tensor) -> dict[str, float]:
        """Acceptance rate of the prompts of each level, by the sums of an iteration."""
        if self.loader.difficulty is None:
            return {}
        level = self.loader.difficulty[self.chosen()]
        values = {}
        for k in level.unique().tolist():
            hits, trials = sums[level == k][:, :2].sum(0).tolist()
            if trials:
                values[f"alloc/acceptance_difficulty_{k}"] = hits / trials
        return values

    def _watch(self, done: Iteration) -> None:
        if done.report["unscorable"]:
            rank_zero_warn(
                f"DynamicSampleAllocation: {done.report['unscorable']:.0f} samples of iteration {self.iteration} have a"
                " reward that is not finite; they count as not drawn."
            )
        if done.plan.fallback:
            rank_zero_warn(
                "DynamicSampleAllocation: no prompt has a positive, finite weight; samples are split evenly."
            )
        if done.report["accepted"]:
            self._empty = 0
            return
        self._empty += 1
        if self._empty >= self.settings.patience_empty:
            raise RuntimeError(
                f"DynamicSampleAllocation: no sample was accepted in {self._empty} iterations in a row. Use easier"
                " prompts, more samples_per_prompt or a lower accept_threshold."
            )
        rank_zero_warn(f"DynamicSampleAllocation: no sample of iteration {self.iteration} was accepted.")

    def state_dict(self, save_rollouts: bool) -> dict[str, Any]:
        """All that the next plan depends on; with ``save_rollouts`` the samples of all processes too."""
        saved = save_rollouts and self.loader.items is not None
        return {
            "iteration": self.iteration, "pass": self._pass, "generated": self.generated, "empty": self._empty,
            "plan": self.plan, "history": self.history.state_dict(), "rollouts": self._everyones() if saved else None,
        }  # fmt: skip

    def _everyones(self) -> list[dict[str, Tensor]]:
        assert self.loader.items is not None
        if self.who.world == 1:
            return [self.loader.items]
        everyone: list[Any] = [None] * self.who.world
        dist.all_gather_object(everyone, self.loader.items)
        return everyone

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state; samples come back through :meth:`refill`."""
        self.iteration, self._pass = state["iteration"], state["pass"]
        self.generated, self._empty, self.plan = state["generated"], state["empty"], state["plan"]
        if state["history"] is not None:
            self.history.load_state_dict(state["history"])

    def refill(self, pl_module: pl.LightningModule, saved: list[dict[str, Tensor]] | None, position: int) -> None:
        """Bring the samples of the running iteration back, from the checkpoint or by drawing them again."""
        if saved is not None and len(saved) == self.who.world:
            self.loader.fill(saved[self.who.rank], self._order_seed(), position)
            return
        rank_zero_warn(
            "DynamicSampleAllocation: the checkpoint holds no samples for this run; they are generated anew by the"
            " model as it is now. save_rollouts=True makes a run resumed in mid-epoch exact."
        )
        self._generate(pl_module, self.plan)
        self.loader.reshuffle(self._order_seed(), position)
