"""One iteration's samples: pilots, plan, generation, rewards, weights. No Lightning: the callback calls this."""

from __future__ import annotations

import hashlib
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_grad._validate import check_choice, check_int, check_range
from lightning_grad.allocation.estimators import (
    AdvantageKind,
    Estimator,
    group_advantages,
    group_moments,
    sample_weights,
)
from lightning_grad.allocation.history import Moment, PromptHistory, visit_sums
from lightning_grad.allocation.mean_gradients import gradient_sums, mean_gradients, sn_mse_ratio
from lightning_grad.allocation.planner import AllocationRule, Plan, gini, share_of
from lightning_grad.allocation.scoring import GradNorm, score_norms
from lightning_grad.data.rollouts import RolloutBatch, SamplingModule, concatenate

PilotMode = Literal["reuse", "discard", "history"]

_SKETCH = 256
_MOST_SKETCHED = 2**24  # numbers, 128 MiB; with more prompts the error of the self-normalised estimate is not predicted
_LONGEST = 4096  # samples of a prompt; the prediction goes through them one by one


def seed_for(*parts: int) -> int:
    """A seed in [0, 2**63) from some integers."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _alone(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class Processes:
    """The processes that share the work; ``add`` sums a float64 tensor over them."""

    rank: int = 0
    world: int = 1
    add: Callable[[Tensor], Tensor] = _alone

    def gather(self, value: float) -> Tensor:
        """One number of every process, ``[world]``."""
        row = torch.zeros(self.world, dtype=torch.float64)
        row[self.rank] = value
        return self.add(row)


@dataclass(frozen=True)
class EStep:
    """The settings of the generation; see :class:`lightning_grad.DynamicSampleAllocation`."""

    rule: AllocationRule
    estimator: Estimator = "self_normalized"
    advantage: AdvantageKind = "loo"
    pilot_mode: PilotMode = "reuse"
    pilot_samples: int = 4
    grad_norm: GradNorm = "head"
    moment: Moment = "rms"
    grad_norm_params: tuple[str, ...] | None = None
    accept_threshold: float = 0.5
    max_weight_ratio: float | None = None
    predict_sn_mse: bool = True

    def __post_init__(self) -> None:
        check_choice("estimator", self.estimator, get_args(Estimator))
        check_choice("advantage", self.advantage, get_args(AdvantageKind))
        check_choice("pilot_mode", self.pilot_mode, get_args(PilotMode))
        check_choice("grad_norm", self.grad_norm, get_args(GradNorm))
        check_choice("moment", self.moment, get_args(Moment))
        check_int("pilot_samples", self.pilot_samples, 1)
        if self.max_weight_ratio is not None:
            check_range("max_weight_ratio", self.max_weight_ratio, 1.0, float("inf"), "[)")
        if self.rule.objective == "em" and self.estimator == "horvitz_thompson" and self.pilot_mode == "reuse":
            raise ValueError(
                "`estimator='horvitz_thompson'` is biased with `pilot_mode='reuse'`: the acceptance rate would come"
                " from the samples it weighs. Use pilot_mode='discard' or 'history'."
            )

    def run(
        self,
        module: SamplingModule,
        prompts: list[Any],
        history: PromptHistory,
        budget: int,
        *,
        seed: int,
        uniform: bool = False,
        counts: Tensor | None = None,
        processes: Processes | None = None,
    ) -> Iteration:
        """Generate and weigh the samples of one iteration.

        Args:
            module: Generates and rewards.
            prompts: The prompts of this iteration.
            history: What is known of them; not changed.
            budget: Samples over all processes.
            seed: Of everything random here.
            uniform: Split evenly and draw no pilots.
            counts: A plan to repeat.
            processes: Who shares the work.
        """
        who = processes or Processes()
        timer = _Timer()
        pilots, known, scores = None, history, None
        if not uniform and self.pilot_mode != "history":
            pilots, scores, known = self._pilots(module, prompts, seed, who, timer)
        plan = self._plan(known, budget, seed, uniform, counts)
        _same_on_all(plan.counts, who)
        rest = plan.counts - self.pilot_samples if pilots is not None and self.pilot_mode == "reuse" else plan.counts
        rollouts = self._draw(module, prompts, rest, seed_for(seed, who.rank, 1), who, timer)
        # without pilots these samples are what the next iteration knows of the prompts
        if self.pilot_mode == "history":
            scores = self._scores(module, rollouts, len(prompts), timer)
            sums = self._sums(rollouts, scores.norms, len(prompts))
        else:
            sums = self._sums(rollouts, None, len(prompts))
        if pilots is not None and scores is not None:
            sums = sums + self._sums(pilots, scores.norms, len(prompts))
            if self.pilot_mode == "reuse":
                rollouts = concatenate([pilots, rollouts])
        items = self._items(rollouts, len(prompts), plan, who)
        report = self._report(items, plan, who) | timer.seconds
        if scores is not None and scores.gradients is not None:
            report |= self._sn_mse(plan, who.add(scores.gradients))
        drawn = int(plan.counts.sum())
        report["pilot_generated"] = 0.0 if pilots is None else float(len(prompts) * self.pilot_samples)
        extra = report["pilot_generated"] if self.pilot_mode == "discard" else 0.0
        return Iteration(plan, items, who.add(sums), report | {"budget": float(drawn), "generated": drawn + extra})

    def pilot_plan(self, module: SamplingModule, prompts: list[Any], budget: int, *, seed: int) -> Plan:
        """The plan that fresh pilots would lead to; nothing else is generated."""
        known = self._pilots(module, prompts, seed, Processes(), _Timer())[2]
        return self._plan(known, budget, seed, False, None)

    def _pilots(
        self, module: SamplingModule, prompts: list[Any], seed: int, who: Processes, timer: _Timer
    ) -> tuple[RolloutBatch, _Scores, PromptHistory]:
        counts = torch.full((len(prompts),), self.pilot_samples)
        pilots = self._draw(module, prompts, counts, seed_for(seed, who.rank, 0), who, timer)
        scores = self._scores(module, pilots, len(prompts), timer)
        known = PromptHistory(len(prompts), 0.0, self.moment)
        known.visit(torch.arange(len(prompts)), who.add(self._sums(pilots, scores.norms, len(prompts))))
        return pilots, scores, known

    def _plan(self, known: PromptHistory, budget: int, seed: int, uniform: bool, counts: Tensor | None) -> Plan:
        if uniform and counts is None:
            counts = self.rule.even(known.num_prompts, budget)
        if counts is None:
            at_least = self.pilot_samples if self.pilot_mode == "reuse" else 0
            return self.rule.plan(known, budget, at_least=at_least, seed=seed_for(seed))
        return Plan(counts, known.acceptance(self.rule.prior), known.grad_norm())

    def _draw(
        self, module: SamplingModule, prompts: list[Any], counts: Tensor, seed: int, who: Processes, timer: _Timer
    ) -> RolloutBatch:
        own = share_of(counts, who.rank, who.world)
        asked = own.clone()
        if not int(own.sum()):
            asked[0] = 1  # an empty batch has the shapes of a real one
        with timer("seconds_generate"):
            rollouts = module.sample(prompts, asked, torch.Generator().manual_seed(seed))
        check_rollouts(rollouts, asked, type(module).__name__)
        return rollouts if int(own.sum()) else rollouts.rows(slice(0, 0))

    def _scores(self, module: SamplingModule, rollouts: RolloutBatch, num_prompts: int, timer: _Timer) -> _Scores:
        wanted = torch.isfinite(rollouts.reward)
        if self.rule.objective != "reward_baseline":  # rejected samples have no part in the other two
            wanted = wanted & (rollouts.reward > self.accept_threshold)
        sketched = self.rule.objective == "em" and self.estimator == "self_normalized" and self.grad_norm == "head"
        sketched = sketched and self.predict_sn_mse and num_prompts * _SKETCH <= _MOST_SKETCHED
        with timer("seconds_score"):
            norms, sketches = score_norms(
                module, rollouts, wanted, self.grad_norm, self.grad_norm_params, _SKETCH if sketched else 0
            )
        index = rollouts.prompt_index
        return _Scores(norms, gradient_sums(index[wanted], sketches[wanted], num_prompts) if sketched else None)

    def _sn_mse(self, plan: Plan, gradients: Tensor) -> dict[str, float]:
        """The error of the self-normalised estimate under a plan, over that of an even split; nothing if not known."""
        known = mean_gradients(gradients)
        if known is None or int(plan.counts.max()) > _LONGEST:
            return {}
        at_least = self.pilot_samples if self.pilot_mode == "reuse" else 0
        even = self.rule.even(len(plan.counts), int(plan.counts.sum()), at_least=at_least)
        return {"sn_mse_ratio": sn_mse_ratio(plan.counts, even, plan.p, *known)}

    def _sums(self, rollouts: RolloutBatch, norms: Tensor | None, num_prompts: int) -> Tensor:
        return visit_sums(
            rollouts.prompt_index,
            rollouts.reward,
            rollouts.length,
            num_prompts,
            grad_norm=norms,
            accept_threshold=self.accept_threshold,
            moment=self.moment,
        )

    def _items(self, rollouts: RolloutBatch, num_prompts: int, plan: Plan, who: Processes) -> dict[str, Tensor]:
        index, reward = rollouts.prompt_index, rollouts.reward.double()
        valid = torch.isfinite(reward)
        accepted = valid & (reward > self.accept_threshold)
        moments = who.add(group_moments(reward, index, num_prompts))
        found = who.add(torch.bincount(index[accepted], minlength=num_prompts).double())
        objective = self.rule.objective
        weight = sample_weights(
            index,
            accepted,
            num_prompts=num_prompts,
            objective=objective,
            estimator=self.estimator,
            p=plan.p.clamp_min(torch.finfo(torch.float64).tiny),
            counts=moments[:, 0].clamp_min(1).long(),
            accepted_counts=found,
        )
        weight = torch.where(valid, weight, 0.0)
        if self.max_weight_ratio is not None:
            total, count = who.add(torch.stack([weight.sum(), (weight > 0).double().sum()])).tolist()
            weight = weight.clamp_max(self.max_weight_ratio * total / max(count, 1.0))
        if objective == "em":
            coefficient = accepted.double()
        elif objective == "reward":
            coefficient = torch.where(valid, reward, 0.0)
        else:
            coefficient = group_advantages(reward, index, kind=self.advantage, group_sums=moments)
        items = {name.removeprefix("extra."): value for name, value in rollouts.state_dict().items()}
        return items | {"weight": weight, "advantage": coefficient, "accepted": accepted}

    def _report(self, items: dict[str, Tensor], plan: Plan, who: Processes) -> dict[str, float]:
        weight, reward = items["weight"], items["reward"].double()
        valid, accepted = torch.isfinite(reward), items["accepted"]
        m = len(plan.counts)
        found = who.add(torch.bincount(items["prompt_index"][accepted], minlength=m).double())
        sums = torch.stack([accepted.sum(), valid.sum(), (~valid).sum(), weight.sum(), weight.square().sum()]).double()
        hits, judged, unscorable, total, square = who.add(sums).tolist()
        sampled = plan.counts > 0
        missing = float((sampled & (found == 0)).sum()) / max(1, int(sampled.sum()))
        return {
            "accepted": hits,
            "acceptance_rate": hits / max(judged, 1.0),
            "unscorable": unscorable,
            "zero_accept_frac": float((found == 0).sum()) / m,
            "missing_frac": missing,
            "n_min": float(plan.counts.min()),
            "n_max": float(plan.counts.max()),
            "n_gini": gini(plan.counts),
            "variance_ratio": plan.variance_ratio,
            "fallback": float(plan.fallback),
            "weight_max": float(who.gather(float(weight.max()) if len(weight) else 0.0).max()),
            "ess": total**2 / square if square > 0 else 0.0,
        }


@dataclass
class _Scores:
    """Norms ``[n]`` of samples, and sums of sketches of the accepted ones over this process, if asked for."""

    norms: Tensor
    gradients: Tensor | None


@dataclass
class Iteration:
    """The samples of one iteration (this process's part), and sums and figures over all processes."""

    plan: Plan
    items: dict[str, Tensor]
    sums: Tensor
    report: dict[str, float]


def check_rollouts(rollouts: RolloutBatch, counts: Tensor, owner: str) -> None:
    """Refuse samples that are not the ones asked for.

    Raises:
        ValueError: Wrong number of samples of a prompt, or of rewards, or the wrong kind of number.
    """
    index = rollouts.prompt_index
    got = torch.bincount(index.long(), minlength=len(counts)) if len(index) else torch.zeros_like(counts)
    wrong = (got[: len(counts)] != counts).nonzero()
    if len(got) > len(counts):
        raise ValueError(f"{owner}.sample() returned prompt_index {len(got) - 1} for {len(counts)} prompts.")
    if len(wrong):
        i = int(wrong[0])
        raise ValueError(f"{owner}.sample() returned {int(got[i])} samples of prompt {i}, {int(counts[i])} were asked.")
    if bool((index[1:] < index[:-1]).any()):
        raise ValueError(f"{owner}.sample() must return rows grouped by prompt, in the order of the prompts.")
    reward = rollouts.reward
    if reward.shape != index.shape or not reward.is_floating_point():
        raise ValueError(
            f"{owner}.sample() must return a floating-point reward of shape {tuple(index.shape)}, got"
            f" {reward.dtype} {tuple(reward.shape)}."
        )


def _same_on_all(counts: Tensor, who: Processes) -> None:
    sums = who.gather(float(zlib.crc32(counts.numpy().tobytes())))
    if bool((sums != sums[0]).any()):
        raise RuntimeError(
            f"the processes made different plans (checksums {sums.tolist()}): the prompts or the settings differ"
            " between them. Give every process the same list in the same order."
        )


class _Timer:
    def __init__(self) -> None:
        self.seconds = {"seconds_generate": 0.0, "seconds_score": 0.0}

    def __call__(self, name: str) -> _Timer:
        self._name = name
        return self

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.seconds[self._name] += time.perf_counter() - self._start
