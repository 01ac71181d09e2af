r"""How many samples the next step should use: tests on gradient statistics, and the plan that carries them out.

A criterion turns statistics of one batch of :math:`b` samples into a target batch size; the test is passed while the
target does not exceed :math:`b`. With :math:`S` the total variance, :math:`V_{ip}` and :math:`V_{or}` the variances
along and across the gradient (:mod:`lightning_grad.statistics.gradient_noise`):

=========================  ================================================================
`NormTest`                 :math:`S / (\eta^2 \|g\|^2)`
`InnerProductTest`         :math:`V_{ip} / (\theta^2 \|g\|^4)`
`AugmentedInnerProduct…`   the larger of that and :math:`V_{or} / (\nu^2 \|g\|^2)`
`CoordinateNormTest`       a quantile over blocks j of :math:`S_j / (\eta^2 \|g_j\|^2)`
`NoiseScale`               :math:`c \, S / |G|^2`, always with the unbiased :math:`|G|^2`
`CABS`                     :math:`\gamma S / (\mathrm{loss} - \mathrm{floor})`
=========================  ================================================================

Sources: Lau, Liu, Kolar (arXiv:2402.11215); Byrd et al. 2012; Bollapragada, Byrd, Nocedal 2018; McCandlish et al.
(arXiv:1812.06162); Balles, Romero, Hennig (arXiv:1612.05086).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_grad._validate import check_choice, check_int, check_range
from lightning_grad.statistics.gradient_noise import Denominator, GradStats


def _ratio(numerator: float, denominator: float) -> float:
    if numerator <= 0.0:
        return 0.0
    return numerator / denominator if denominator > 0.0 else math.inf


def _needed(name: str, value: Any) -> Any:
    if value is None:
        raise ValueError(f"the statistics hold no `{name}`; a criterion that reads it must list it in `needs`.")
    return value


class Criterion:
    """Base of all batch-size rules, and of your own: say what you need and return a target batch size.

    ``needs`` is a subset of ``{"inner", "tensor", "element", "loss", "lr"}``: variance along the gradient, per-tensor
    or per-element variances, the training loss, the learning rate. What is listed is not None in the statistics.
    """

    needs: frozenset[str] = frozenset()

    def target(self, stats: GradStats) -> float:
        """Batch size in samples that the statistics call for; ``inf`` if no batch is large enough."""
        raise NotImplementedError


class NormTest(Criterion):
    r"""Keep the noise of the batch gradient below ``eta`` times its length: :math:`S/b \le \eta^2 \|g\|^2`.

    Args:
        eta: Noise-to-signal ratio :math:`\eta` > 0; usual values 0.1 (large batches) to 0.5.
    """

    def __init__(self, eta: float = 0.5) -> None:
        self.eta = check_range("eta", eta, 0.0, math.inf, "()")

    def target(self, stats: GradStats) -> float:
        """See the class."""
        return _ratio(stats.trace_cov, self.eta**2 * stats.sq_norm)


class InnerProductTest(Criterion):
    r"""Make most sampled gradients a descent direction: :math:`V_{ip}/b \le \theta^2 \|g\|^4`.

    Args:
        theta: Allowed relative spread :math:`\theta` > 0 of the inner products with the gradient.
    """

    needs = frozenset({"inner"})

    def __init__(self, theta: float = 0.5) -> None:
        self.theta = check_range("theta", theta, 0.0, math.inf, "()")

    def target(self, stats: GradStats) -> float:
        """See the class."""
        inner_var: float = _needed("inner_var", stats.inner_var)
        return math.inf if stats.sq_norm <= 0.0 else _ratio(inner_var, (self.theta * stats.sq_norm) ** 2)


class AugmentedInnerProductTest(InnerProductTest):
    r"""The inner-product test and, across the gradient, :math:`V_{or}/b \le \nu^2 \|g\|^2`.

    Args:
        theta: As in :class:`InnerProductTest`.
        nu: Allowed relative spread :math:`\nu` > 0 orthogonal to the gradient.
    """

    def __init__(self, theta: float = 0.5, nu: float = 1.0) -> None:
        super().__init__(theta)
        self.nu = check_range("nu", nu, 0.0, math.inf, "()")

    def target(self, stats: GradStats) -> float:
        """See the class."""
        across = stats.orth_var
        if across is None:
            return super().target(stats)
        return max(super().target(stats), _ratio(across, self.nu**2 * stats.sq_norm))


class CoordinateNormTest(Criterion):
    r"""The norm test for every block of coordinates on its own: :math:`S_j/b \le \eta^2 \|g_j\|^2`.

    Args:
        eta: As in :class:`NormTest`.
        granularity: A block is a parameter ``"tensor"`` or a single ``"element"`` (the paper's form; costs one buffer
            of the size of the parameters).
        reduce: ``"max"`` asks all blocks to pass (driven by blocks whose mean gradient is near zero), ``"quantile"``
            the fraction ``q`` of them.
        q: Quantile in (0, 1].
    """

    def __init__(
        self,
        eta: float = 0.5,
        granularity: Literal["tensor", "element"] = "tensor",
        reduce: Literal["quantile", "max"] = "quantile",
        q: float = 0.9,
    ) -> None:
        self.eta = check_range("eta", eta, 0.0, math.inf, "()")
        self.needs = frozenset({check_choice("granularity", granularity, ("tensor", "element"))})
        self.q = (
            1.0 if check_choice("reduce", reduce, ("quantile", "max")) == "max" else check_range("q", q, 0, 1, "(]")
        )

    def targets(self, stats: GradStats) -> Tensor:
        """Target batch size of each block."""
        spread: Tensor = _needed("tensor_trace_cov", stats.tensor_trace_cov).clamp(min=0)
        signal: Tensor = self.eta**2 * _needed("tensor_grad_sq", stats.tensor_sq_norm)
        ratio = torch.where(signal > 0, spread / signal, torch.full_like(spread, math.inf))
        return torch.where(spread > 0, ratio, torch.zeros_like(spread))

    def target(self, stats: GradStats) -> float:
        """See the class."""
        each = self.targets(stats)
        return float(each.kthvalue(max(1, math.ceil(self.q * each.numel()))).values)


class NoiseScale(Criterion):
    r"""A multiple of the gradient noise scale :math:`\mathrm{tr}\,\Sigma / \|G\|^2`.

    Args:
        multiplier: Factor > 0. ``1/eta**2`` makes this the norm test with the unbiased denominator.
    """

    def __init__(self, multiplier: float = 1.0) -> None:
        self.multiplier = check_range("multiplier", multiplier, 0.0, math.inf, "()")

    def target(self, stats: GradStats) -> float:
        """See the class."""
        return self.multiplier * _ratio(stats.trace_cov, stats.grad_sq_norm_unbiased)


class CABS(Criterion):
    """Coupled adaptive batch size: learning rate times variance over the loss.

    Args:
        loss_floor: Smallest loss that can be reached; subtracted from the training loss.
    """

    needs = frozenset({"loss", "lr"})

    def __init__(self, loss_floor: float = 0.0) -> None:
        self.loss_floor = check_range("loss_floor", loss_floor, -math.inf, math.inf, "()")

    def target(self, stats: GradStats) -> float:
        """See the class."""
        lr: float = _needed("lr", stats.lr)
        loss: float = _needed("loss", stats.loss)
        return _ratio(lr * stats.trace_cov, loss - self.loss_floor)


CriterionName = Literal["norm", "inner_product", "augmented_inner_product", "coordinate_norm", "noise_scale", "cabs"]


def criterion_named(name: CriterionName) -> Criterion:
    """The criterion of that name with its default arguments."""
    criteria: dict[str, type[Criterion]] = {
        "norm": NormTest,
        "inner_product": InnerProductTest,
        "augmented_inner_product": AugmentedInnerProductTest,
        "coordinate_norm": CoordinateNormTest,
        "noise_scale": NoiseScale,
        "cabs": CABS,
    }
    return criteria[check_choice("criterion", name, tuple(criteria))]()


@dataclass(frozen=True)
class BatchPlan:
    """One optimizer step: ``accumulate`` micro-batches of ``micro`` samples on each of ``world`` ranks."""

    micro: int
    accumulate: int
    world: int = 1

    @property
    def batch_size(self) -> int:
        """Samples in one optimizer step."""
        return self.micro * self.accumulate * self.world

    @classmethod
    def from_target(
        cls,
        target: int,
        world: int,
        max_micro: int,
        round_to: int = 1,
        min_accumulate: int = 1,
        cap: int | None = None,
        quantize: Literal["none", "pow2"] = "none",
    ) -> BatchPlan:
        """The smallest plan of at least ``target`` samples: larger micro-batches first, then accumulation.

        Args:
            target: Samples asked for.
            world: Number of ranks.
            max_micro: Largest micro-batch per rank.
            round_to: The micro-batch is a multiple of this where ``max_micro`` and ``cap`` leave room for one.
            min_accumulate: Smallest accumulation, a power of two.
            cap: Largest batch; a plan above it is rounded down.
            quantize: ``"pow2"`` allows only ``round_to`` times a power of two as micro-batch.
        """
        per_rank = math.ceil(target / world)
        k = min_accumulate
        while math.ceil(per_rank / k) > max_micro:
            k *= 2
        m = math.ceil(per_rank / k / round_to) * round_to
        if quantize == "pow2":
            m = round_to * 2 ** math.ceil(math.log2(m / round_to))
        room = max_micro if cap is None else min(max_micro, cap // (world * k))
        if m > room:
            m = max(1, room // round_to * round_to or room)
            if quantize == "pow2" and m >= round_to:
                m = round_to * 2 ** math.floor(math.log2(m / round_to))
        return cls(m, k, world)


@dataclass(frozen=True)
class Decision:
    """Outcome of one test."""

    batch_size: int
    target: float
    stats: GradStats

    @property
    def test_ratio(self) -> float:
        """Target over the batch that was tested; above 1 the test failed."""
        return self.target / self.stats.batch_size


class BatchSizeController:
    r"""Smooth the statistics, ask the criterion, and limit the answer.

    Variances and squared gradient norm are averaged separately, :math:`x_t = \beta x_{t-1} + (1-\beta) v_t` with bias
    correction; never their ratio.

    Args:
        criterion: The rule.
        max_batch_size: Largest batch.
        min_batch_size: Smallest batch.
        ema: Decay :math:`\beta` in [0, 1); 0 uses each test alone.
        denominator: ``"biased"`` divides by :math:`\|g\|^2` of the batch, ``"unbiased"`` by an estimate of the
            population's.
        finite_population: Count that samples are drawn without replacement from ``population``.
        allow_decrease: Let the batch shrink.
        max_growth: Largest factor of one change, > 1; None for no limit.
        min_change: A change by less than this factor, >= 1, is not worth it.
    """

    def __init__(
        self,
        criterion: Criterion,
        max_batch_size: int,
        min_batch_size: int = 1,
        *,
        ema: float = 0.95,
        denominator: Denominator = "unbiased",
        finite_population: bool = False,
        allow_decrease: bool = False,
        max_growth: float | None = 2.0,
        min_change: float = 1.1,
    ) -> None:
        self.criterion = criterion
        self.max_batch_size = check_int("max_batch_size", max_batch_size, 1)
        self.min_batch_size = check_int("min_batch_size", min_batch_size, 1, max_batch_size)
        self.ema = check_range("ema", ema, 0.0, 1.0, "[)")
        self.denominator: Denominator = denominator
        check_choice("denominator", denominator, get_args(Denominator))
        self.finite_population, self.allow_decrease = finite_population, allow_decrease
        self.max_growth = None if max_growth is None else check_range("max_growth", max_growth, 1.0, math.inf, "(]")
        self.min_change = check_range("min_change", min_change, 1.0, math.inf, "[)")
        if denominator == "biased" and isinstance(criterion, NormTest) and criterion.eta >= 1.0:
            warnings.warn(
                f"NormTest(eta={criterion.eta}) with denominator='biased': this test never grows the batch in"
                " expectation, because the batch gradient's norm contains its own noise. Use denominator='unbiased'"
                " or eta < 1.",
                stacklevel=2,
            )
        self._averages: dict[str, float | Tensor] = {}
        self._count = 0

    def decide(self, stats: GradStats, batch_size: int, population: int | None = None) -> Decision | None:
        """Next batch size after a step of ``batch_size`` samples; None if the statistics are not finite."""
        stats = replace(stats, denominator=self.denominator, population=population if self.finite_population else None)
        if not stats.finite:
            return None
        smooth = self._smooth(stats)
        target = self.criterion.target(smooth)
        if math.isnan(target):
            return None
        if smooth.population is not None:
            n = smooth.population
            target = n if math.isinf(target) else target / (1.0 + target / n)
        return Decision(self._limit(target, smooth, batch_size), target, smooth)

    def _smooth(self, stats: GradStats) -> GradStats:
        unbiased = self.denominator == "unbiased"
        new: dict[str, float | Tensor | None] = {
            "trace_cov": stats.trace_cov,
            "sq_norm": stats.sq_norm,
            "inner_var": stats.inner_var,
            "tensor_trace_cov": stats.tensor_trace_cov,
            "tensor_sq_norm": stats.tensor_sq_norm,
            "loss": stats.loss,
        }
        self._count += 1
        correction = 1.0 - self.ema**self._count
        mean: dict[str, Any] = dict.fromkeys(new)
        for name, value in new.items():
            if value is not None:
                old = self._averages.get(name, 0.0)
                self._averages[name] = self.ema * old + (1.0 - self.ema) * value
                mean[name] = self._averages[name] / correction
        n, q = stats.n_groups, stats.group_size
        noise = stats.noise_per_trace
        grad_sq = mean["sq_norm"] + (mean["trace_cov"] * noise if unbiased else 0.0)
        blocks = mean["tensor_sq_norm"]
        if blocks is not None and unbiased:
            blocks = blocks + mean["tensor_trace_cov"] * noise
        return replace(
            stats,
            mean_sq_norm=grad_sq + mean["trace_cov"] * (n - 1) / (n * q),
            grad_sq_norm=grad_sq,
            inner_var=mean["inner_var"],
            tensor_trace_cov=mean["tensor_trace_cov"],
            tensor_grad_sq=blocks,
            loss=mean["loss"],
        )

    def _limit(self, target: float, stats: GradStats, current: int) -> int:
        if stats.trace_cov <= 0.0:
            return current
        wanted = self.max_batch_size if math.isinf(target) else math.ceil(target)
        if not self.allow_decrease:
            wanted = max(wanted, current)
        if self.max_growth is not None and not math.isinf(self.max_growth):
            wanted = min(wanted, max(current + 1, math.floor(self.max_growth * current)))
            if wanted < current:
                wanted = max(wanted, math.ceil(current / self.max_growth))
        wanted = min(max(wanted, self.min_batch_size), self.max_batch_size)
        if wanted != self.max_batch_size and current / self.min_change < wanted < current * self.min_change:
            return current
        return wanted

    def forget(self) -> None:
        """Start the averages anew: what they were of is no longer measured."""
        self._averages, self._count = {}, 0

    def state_dict(self) -> dict[str, Any]:
        """Averages and their count."""
        return {"averages": dict(self._averages), "count": self._count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the averages of :meth:`state_dict`."""
        self._averages, self._count = dict(state_dict["averages"]), int(state_dict["count"])
