"""Optimistic online learning: the last gradient predicts the next (OptimisticOMD, OptimisticFTRL)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from lightning_grad.optim._base import RuleOptimizer, Work
from lightning_grad.optim._checks import NON_NEGATIVE, Range, Switches
from lightning_grad.optim._executors import Group, Hyper, State
from lightning_grad.optim._math import axpy, ratio, square_sum


class _Optimistic(RuleOptimizer):
    """What the two share: step sizes from all parameters together, and a ball around the start."""

    kind = "global"
    allowed: ClassVar = {"diameter": Range(0.0, brackets="(]"), "lipschitz": NON_NEGATIVE}
    by_group: ClassVar = ("lr", "weight_decay")


class OptimisticOMD(_Optimistic):
    r"""Optimistic mirror descent, for gradients that drift or are partly adversarial, and for games.

    .. math::
        \theta_t = \Pi(\hat\theta_t - \eta_t g_{t-1}), \qquad \hat\theta_{t+1} = \Pi(\hat\theta_t - \eta_t g_t) \\
        \eta_t = D / \sqrt{\delta + 4 G^2 + V_{t-1}}, \qquad V_t = \sum_{s \le t} \|g_s - g_{s-1}\|^2, \qquad g_0 = 0

    With ``step_rule="strongly_convex"``, :math:`\eta_t = 2 / (\mu t)`; with ``"constant"``, :math:`\eta_t = 1`. All are
    multiplied by ``lr``. Without projection and with a constant step this is
    :math:`\theta \leftarrow \theta - 2 \eta g_t + \eta g_{t-1}`.

    Args:
        params: Parameters or parameter groups, as for :class:`torch.optim.Optimizer`.
        lr: Multiplies the step size, >= 0.
        step_rule: ``"convex"``, ``"strongly_convex"`` or ``"constant"``.
        diameter: Diameter :math:`D` of the domain, > 0.
        project: Keep the parameters in the ball of that diameter around their initial values (:math:`\Pi`); in a step
            in which some have no gradient, those that have one.
        lipschitz: Bound :math:`G` of the gradient norm, >= 0; 0: not known.
        smoothness: Smoothness :math:`L` of the loss, >= 0; 0: not known.
        strong_convexity: :math:`\mu`, >= 0; must be > 0 for ``"strongly_convex"``.
        delta: :math:`\delta`, >= 0; ``None``: :math:`10 D^2 L^2`, or 1e-8 if that is 0. Without ``delta``,
            ``lipschitz`` and ``smoothness`` the first step size uses :math:`V_1`, as nothing else has a scale.
        weight_decay: Adds ``weight_decay * p`` to the gradient, >= 0.
        **switches: ``maximize``, ``foreach``, ``compile``, ``capturable``, ``differentiable``, ``decay_1d``,
            ``state_dtype``, ``stochastic_rounding``.

    Raises:
        ValueError: A hyperparameter is out of range, or one other than ``lr`` and ``weight_decay`` is not the same in
            all parameter groups: the step size is that of all parameters together.

    State per parameter: ``step``, ``previous_grad``; with ``project`` also ``xhat`` and ``center``. With the first
    parameter: ``variation`` (:math:`V`), ``rounds``; with that of each group: ``eta``.
    With a parameter that has no gradient for some steps, meanwhile: ``played_eta``, the step size of its last one.

    Source: Chen et al., Optimistic online mirror descent for bridging stochastic and adversarial online convex
    optimization (arXiv:2302.04552). The constants 10 and 4 were not checked against the journal version.
    """

    alone: ClassVar = "played_eta"
    shared_state: ClassVar = ("variation", "eta", "rounds", "played_eta")  # the last: parameters that sit out
    allowed: ClassVar = {
        "step_rule": ("convex", "strongly_convex", "constant"), "smoothness": NON_NEGATIVE,
        "strong_convexity": NON_NEGATIVE, "delta": Range(0.0, optional=True),
    }  # fmt: skip

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        step_rule: Literal["convex", "strongly_convex", "constant"] = "convex",
        diameter: float = 1.0,
        project: bool = False,
        lipschitz: float = 0.0,
        smoothness: float = 0.0,
        strong_convexity: float = 0.0,
        delta: float | None = None,
        weight_decay: float = 0.0,
        **switches: Unpack[Switches],
    ) -> None:
        defaults = {
            "lr": lr, "step_rule": step_rule, "diameter": diameter, "project": project, "lipschitz": lipschitz,
            "smoothness": smoothness, "strong_convexity": strong_convexity, "delta": delta,
            "weight_decay": weight_decay,
        }  # fmt: skip
        super().__init__(params, defaults, **switches)

    @override
    def check(self, group: Group) -> None:
        if group["step_rule"] == "strongly_convex" and group["strong_convexity"] < 1e-10:
            raise ValueError(
                f"strong_convexity must be > 0 for step_rule='strongly_convex', got {group['strong_convexity']}"
            )
        if group["step_rule"] == "convex" and 0.0 < _square_scale(group) < 1e-30:  # the first step would overflow
            raise ValueError(f"delta + 4 * lipschitz^2 must be 0 or at least 1e-30, got {_square_scale(group):g}")

    @override
    def state_names(self, group: Group) -> Mapping[str, float | None]:
        return {"previous_grad": 0.0, **({"xhat": None, "center": None} if group["project"] else {})}

    @override
    def hyper(self, group: Group, step: Any) -> Hyper:
        return {
            "weight_decay": group["weight_decay"], "decays": group["weight_decay"] != 0.0, "projects": group["project"]
        }  # fmt: skip

    @override
    @staticmethod
    def measure(p: Tensor, g: Tensor, s: State, h: Hyper) -> Tensor:
        if h["decays"]:
            g = axpy(g, p, h["weight_decay"])
        sums = [square_sum(g - s["previous_grad"])]
        if h["projects"]:
            y = s["xhat"] - s["center"]
            sums += [square_sum(y), (y * g).sum(), square_sum(g)]
        return torch.stack(sums)

    @override
    def prologue(self, groups: list[Group], totals: list[Tensor]) -> list[dict[str, Tensor]]:
        sums = torch.stack(totals)
        eta, next_eta = self._step_sizes(groups, sums[:, 0].sum())
        scalars = [{"hint_eta": now, "eta": now, "next_eta": then} for now, then in zip(eta, next_eta, strict=True)]
        if self.param_groups[0]["project"]:
            radius, (yy, yg, gg) = self.param_groups[0]["diameter"] / 2, sums[:, 1:].unbind(1)
            inside, yy, yg = _ball(radius, eta, yy, yg, gg)
            next_inside, _, _ = _ball(radius, next_eta, yy, yg, gg)
            scalars = [{**s, "inside": inside, "next_inside": next_inside} for s in scalars]
        return scalars

    def _step_sizes(self, groups: list[Group], change: Tensor) -> tuple[Tensor, Tensor]:
        """Step sizes of the groups, at the point that the gradient belongs to and at the next.

        Args:
            groups: The groups that have gradients.
            change: Square of the distance of the gradient from the last one.
        """
        first = self.param_groups[0]
        rounds, variation = self.shared(first, "rounds", 0.0) + 1, self.shared(first, "variation", 0.0)
        grown = variation + change
        scale_known = first["step_rule"] != "convex" or first["delta"] is not None or _square_scale(first) > 1e-8
        start = _step_size(first, rounds, variation if scale_known else grown)
        following = _step_size(first, rounds + 1, grown)
        self.set_shared(first, "rounds", rounds)
        self.set_shared(first, "variation", grown)
        pairs = []
        for group in groups:
            eta = self.shared(group, "eta", -1.0)  # not known at the first step
            pairs.append((torch.where(eta < 0, group["lr"] * start, eta), group["lr"] * following))
            self.set_shared(group, "eta", pairs[-1][1])
        eta, next_eta = (torch.stack(column) for column in zip(*pairs, strict=True))
        return eta, next_eta

    @override
    def _measure_all(self, work: Work) -> None:
        for group, units in work:
            # with projection the rule takes no hint back
            if not group["project"] and sum(len(unit.members) for unit, _ in units) < len(group["params"]):
                self._sit_out(group)
        super()._measure_all(work)
        for group, units in work:
            for index, (unit, h) in enumerate(units):
                if self.alone in unit.members[0].state:
                    own = unit.members[0].state.pop(self.alone)
                    units[index] = (unit, {**h, **self._readable(group, unit, {"hint_eta": own})})

    def _sit_out(self, group: Group) -> None:
        """Keep the step size that the point was made with for parameters that have no gradient from now on."""
        for param in group["params"]:
            state = self.state.get(param, {}) if param.grad is None else {}
            if "previous_grad" in state and self.alone not in state and "eta" in self.kept(group):
                state[self.alone] = self.kept(group)["eta"].clone()

    @override
    @staticmethod
    def rule(p: Any, g: Any, s: State, h: Hyper) -> tuple[Any, State]:
        if h["decays"]:
            g = axpy(g, p, h["weight_decay"])
        if not h["projects"]:
            p = axpy(axpy(p, s["previous_grad"], h["hint_eta"]), g, -(h["eta"] + h["next_eta"]))
            return p, {"previous_grad": g}
        y = axpy(s["xhat"] - s["center"], g, -h["eta"]) * h["inside"]
        xhat = s["center"] + y
        return axpy(y, g, -h["next_eta"]) * h["next_inside"] + s["center"], {"previous_grad": g, "xhat": xhat}

    @override
    def stats(self) -> dict[str, float | Tensor]:
        """``eta`` of the coming step, and ``variation``, the square root of V."""
        state = self.kept(self.param_groups[0])
        return {"eta": state["eta"], "variation": state["variation"].sqrt()} if "eta" in state else {}


class OptimisticFTRL(_Optimistic):
    r"""Optimistic follow-the-regularized-leader, with a regret bound for every sequence of gradients.

    .. math::
        \theta_t = \Pi\big(\theta_1 - \tfrac{\eta_t}{2} (g_{t-1} + \textstyle\sum_{s<t} g_s)\big), \qquad
        \eta_t = D^2 / \big(\nu + \textstyle\sum_{s<t} \eta_s \|g_s - g_{s-1}\|^2\big)

    Args:
        params: Parameters or parameter groups, as for :class:`torch.optim.Optimizer`.
        diameter: Diameter :math:`D` of the domain, > 0.
        nu: :math:`\nu`, >= 1e-10; ``None``: :math:`2 D G` if ``lipschitz`` is given, else 1.
        lipschitz: Bound :math:`G` of the gradient norm, >= 0; 0: not known.
        project: Keep the parameters in the ball of that diameter around their initial values (:math:`\Pi`).
        lr: Multiplies the step size, >= 0, for schedulers; the regret bound is for 1. The sum of all gradients is
            scaled, so that a smaller value moves the parameters back towards their start.
        **switches: ``maximize``, ``foreach``, ``compile``, ``capturable``, ``differentiable``, ``decay_1d``,
            ``state_dtype``, ``stochastic_rounding``.

    Raises:
        ValueError: A hyperparameter is out of range, or one other than ``lr`` is not the same in all parameter groups:
            the step size is that of all parameters together.

    State per parameter: ``step``, ``grad_sum``, ``previous_grad``, ``center``. With the first parameter: ``penalty``
    (the sum in :math:`\eta`).

    Source: Sachs et al., Between stochastic and adversarial online convex optimization (arXiv:2202.07554), Theorem 5.
    """

    state_spec: ClassVar = {"grad_sum": 0.0, "previous_grad": 0.0, "center": None}
    shared_state: ClassVar = ("penalty",)
    allowed: ClassVar = {"nu": Range(1e-10, largest=1e20, optional=True)}

    def __init__(
        self,
        params: ParamsT,
        diameter: float = 1.0,
        nu: float | None = None,
        lipschitz: float = 0.0,
        project: bool = True,
        lr: float = 1.0,
        **switches: Unpack[Switches],
    ) -> None:
        defaults = {"diameter": diameter, "nu": nu, "lipschitz": lipschitz, "project": project, "lr": lr}
        super().__init__(params, defaults, **switches)

    @override
    def hyper(self, group: Group, step: Any) -> Hyper:
        return {}

    @override
    @staticmethod
    def measure(p: Tensor, g: Tensor, s: State, h: Hyper) -> Tensor:
        return torch.stack([square_sum(g - s["previous_grad"]), square_sum(torch.add(s["grad_sum"], g, alpha=2.0))])

    @override
    def prologue(self, groups: list[Group], totals: list[Tensor]) -> list[dict[str, Tensor]]:
        first, sums = self.param_groups[0], torch.stack(totals)
        diameter, nu = first["diameter"], first["nu"]
        if nu is None:
            nu = max(2.0 * diameter * first["lipschitz"], 1e-10) if first["lipschitz"] > 0.0 else 1.0
        penalty = self.shared(first, "penalty", 0.0)
        grown = penalty + diameter**2 / (nu + penalty) * sums[:, 0].sum()
        self.set_shared(first, "penalty", grown)
        steps = torch.stack([ratio(group["lr"] * diameter**2 / 2, nu + grown) for group in groups])
        if first["project"]:
            steps = steps * _shrink(diameter / 2, (steps**2 * sums[:, 1]).sum().sqrt())
        return [{"step": step} for step in steps]

    @override
    @staticmethod
    def rule(p: Any, g: Any, s: State, h: Hyper) -> tuple[Any, State]:
        grad_sum = s["grad_sum"] + g
        new_p = axpy(axpy(s["center"], g, -h["step"]), grad_sum, -h["step"])
        return new_p, {"grad_sum": grad_sum, "previous_grad": g}

    @override
    def stats(self) -> dict[str, float | Tensor]:
        """``penalty``: the sum in the denominator of the step size."""
        state = self.kept(self.param_groups[0])
        return {"penalty": state["penalty"]} if "penalty" in state else {}


def _square_scale(group: Group) -> float:
    """``delta + 4 G^2`` in the denominator of the convex rule."""
    delta = group["delta"]
    if delta is None:
        delta = 10.0 * group["diameter"] ** 2 * group["smoothness"] ** 2 or 1e-8
    return float(delta + 4.0 * group["lipschitz"] ** 2)


def _step_size(group: Group, rounds: Tensor, variation: Tensor) -> Tensor:
    """The step size of a round, but for ``lr``."""
    if group["step_rule"] == "convex":
        return ratio(group["diameter"], (_square_scale(group) + variation).sqrt())
    eta = torch.ones_like(variation)
    return eta * 2.0 / (group["strong_convexity"] * rounds) if group["step_rule"] == "strongly_convex" else eta


def _shrink(radius: float, length: Tensor) -> Tensor:
    """Factor that brings a vector of this length into the ball."""
    return torch.where(length <= radius, torch.ones_like(length), ratio(radius, length))


def _ball(radius: float, eta: Tensor, yy: Tensor, yg: Tensor, gg: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factor that brings ``y - eta * g`` into the ball, and its ``<y, y>`` and ``<y, g>`` afterwards.

    Args:
        radius: Of the ball.
        eta: Step size of each group.
        yy: ``<y, y>`` of each group.
        yg: ``<y, g>`` of each group.
        gg: ``<g, g>`` of each group.
    """
    moved = (yy - 2 * eta * yg + eta**2 * gg).clamp_min(0.0)
    factor = _shrink(radius, moved.sum().sqrt())
    return factor, factor**2 * moved, factor * (yg - eta * gg)
