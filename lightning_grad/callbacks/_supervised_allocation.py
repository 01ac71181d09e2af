"""Sample allocation for ordinary training data: importance-sampled examples and Neyman-allocated strata."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_grad.allocation.e_step import Processes, seed_for
from lightning_grad.allocation.importance import (
    importance_probs,
    importance_variance_ratio,
    stratified_sample,
    systematic_sample,
)
from lightning_grad.allocation.integer import allocate
from lightning_grad.data.weighted import AllocatedLoader, even_plan


class ScoreHistory:
    """Decayed mean score of every example, and the plan of an epoch that follows from it."""

    def __init__(self, loader: AllocatedLoader, kind: str, decay: float, mix: float, activate_below: float, seed: int):
        if kind == "strata" and loader.strata is None:
            raise ValueError(
                "`objective='strata'` needs AllocatedLoader(..., strata=...), the stratum of each example."
            )
        if kind == "strata" and loader.strata is not None:
            inhabited = loader.strata.unique().numel()
            if loader.draws < inhabited:
                raise ValueError(
                    f"`objective='strata'` draws every stratum at least once an epoch, but AllocatedLoader gives"
                    f" {loader.draws} examples for {inhabited} strata. Merge strata, or choose a `batch_size` that"
                    " leaves fewer examples over."
                )
        self.loader, self.kind, self.decay, self.seed = loader, kind, decay, seed
        self.mix, self.activate_below = mix, activate_below
        self.known = torch.zeros(loader.num_examples, 2, dtype=torch.float64)
        self.fresh = torch.zeros_like(self.known)
        self.current: tuple[Tensor, Tensor] | None = None  # the plan, which the loader forgets after a fit

    def go_on_from(self, before: ScoreHistory) -> None:
        """Take over the scores of an earlier fit on as many examples."""
        if len(before.known) == len(self.known):
            self.known, self.fresh = before.known, before.fresh

    def _set(self, index: Tensor, weight: Tensor, position: int = 0) -> None:
        self.current = (index, weight)
        self.loader.set_plan(index, weight, position)

    def add(self, index: Tensor, score: Tensor) -> None:
        """Scores of a batch; not-finite ones are left out."""
        value = score.detach().double().cpu()
        good = torch.isfinite(value)
        rows = torch.stack([torch.where(good, value, 0.0), good.double()], 1)
        self.fresh.index_add_(0, index.cpu(), rows)

    def fold(self, who: Processes) -> None:
        """End an epoch: scores of all processes join the history of the examples they belong to."""
        fresh = who.add(self.fresh)
        seen = fresh[:, 1:] > 0
        self.known = torch.where(seen, self.decay * self.known + fresh, self.known)
        self.fresh.zero_()

    def scores(self) -> Tensor:
        """Mean score of each example; NaN where unseen."""
        return self.known[:, 0] / self.known[:, 1]

    def plan(self, epoch: int, uniform: bool) -> dict[str, float]:
        """Give the loader the plan of an epoch; returns figures to log."""
        loader, scores = self.loader, self.scores()
        seed, draws = seed_for(self.seed, epoch), loader.draws
        finite = scores[torch.isfinite(scores)]
        report = {"variance_ratio": 1.0, "weight_max": 1.0, "ess": float(draws), "active": 0.0}
        if uniform or not len(finite) or float(finite.sum()) <= 0:
            self._set(*even_plan(loader.num_examples, draws, seed))
            return report
        generator = torch.Generator().manual_seed(seed)
        if self.kind == "importance":
            ratio = importance_variance_ratio(finite)
            report["variance_ratio"] = ratio
            if ratio >= self.activate_below:
                self._set(*even_plan(loader.num_examples, draws, seed))
                return report
            q = importance_probs(scores, self.mix)
            index = systematic_sample(q, draws, generator)
            weight = 1.0 / (loader.num_examples * q[index])
        else:
            index, weight, report["variance_ratio"] = self._strata(scores, draws, generator)
        self._set(index, weight)
        total = float(weight.sum())
        return report | {
            "weight_max": float(weight.max()),
            "ess": total**2 / float(weight.square().sum()),
            "active": 1.0,
        }

    def _strata(self, scores: Tensor, draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
        assert self.loader.strata is not None
        strata = self.loader.strata
        size = torch.bincount(strata).double()
        good = torch.isfinite(scores)
        seen = torch.bincount(strata[good], minlength=len(size)).double()
        square = torch.zeros_like(size).index_add_(0, strata[good], scores[good].square())
        spread = (square / seen).sqrt()
        spread = torch.where(seen > 0, spread, spread.nanmean())
        weights = size / size.sum() * spread
        counts = allocate(weights, draws, min_samples=(size > 0).long())
        even = allocate(size, draws, min_samples=(size > 0).long())
        value = [float((weights.square() / n.clamp_min(1)).sum()) for n in (counts, even)]
        index, weight = stratified_sample(strata, counts, draws, generator)
        return index, weight, value[0] / value[1]

    def state_dict(self, who: Processes) -> dict[str, Any]:
        """Scores and the running epoch's plan."""
        index, weight = self.current or (torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64))
        return {"known": self.known.clone(), "fresh": who.add(self.fresh.clone()), "index": index, "weight": weight}

    def load_state_dict(self, state: dict[str, Any], who: Processes, position: int) -> None:
        """Take over a saved history and plan."""
        if len(state["known"]) != len(self.known):
            raise ValueError(
                f"the checkpoint holds the scores of {len(state['known'])} examples, this run has {len(self.known)}."
                " Use the same data set or start without the checkpoint."
            )
        self.known = state["known"].clone()
        self.fresh = state["fresh"].clone() if who.rank == 0 else torch.zeros_like(self.known)
        self._set(state["index"], state["weight"], position)
