"""AdaGrad-Norm: one step size for all parameters, from the accumulated gradient norm."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from lightning_grad._validate import check_choice
from lightning_grad.optim._base import RuleOptimizer, Switches
from lightning_grad.optim._executors import Group, Hyper, State
from lightning_grad.optim._math import axpy


class AdaGradNorm(RuleOptimizer):
    r"""AdaGrad with a scalar step size: no Lipschitz constant to know, no state per parameter.

    .. math::
        b_t^2 = b_{t-1}^2 + \|g_t\|^2, \qquad \theta_t = (1 - \eta \lambda)\, \theta_{t-1} - (\eta / b_t)\, g_t

    The norm runs over all parameters. A step with :math:`b_t = 0` does not move.

    Args:
        params: Parameters or parameter groups, as for :class:`torch.optim.Optimizer`.
        lr: Step size :math:`\eta`, >= 0; the first step has length at most ``lr``.
        b0: Initial :math:`b`, >= 0.
        weight_decay: Decoupled decay :math:`\lambda`, >= 0; multiplied by ``lr``, not divided by :math:`b`.
        scope: ``"global"``: one :math:`b` for all parameter groups; ``"group"``: one for each group.
        **switches: ``maximize``, ``foreach``, ``compile``, ``capturable``, ``differentiable``, ``decay_1d``,
            ``state_dtype``, ``stochastic_rounding``.

    Raises:
        ValueError: A hyperparameter is out of range.

    State: one 0-dim ``sum_sq`` = :math:`b^2`, with the first parameter (of each group, for ``scope="group"``).

    Source: Ward, Wu and Bottou, AdaGrad stepsizes (arXiv:1806.01811), Algorithm 1.
    """

    kind = "global"
    shared_state: ClassVar = ("sum_sq",)

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        b0: float = 1e-2,
        weight_decay: float = 0.0,
        scope: Literal["global", "group"] = "global",
        **switches: Unpack[Switches],
    ) -> None:
        super().__init__(params, {"lr": lr, "b0": b0, "weight_decay": weight_decay, "scope": scope}, **switches)

    @override
    def check(self, group: Group) -> None:
        check_choice("scope", group["scope"], ("global", "group"))

    @override
    def hyper(self, group: Group, step: Any) -> Hyper:
        return {"keep": 1.0 - group["lr"] * group["weight_decay"], "decays": group["weight_decay"] != 0.0}

    @override
    def prologue(self, groups: list[Group], totals: list[Any]) -> list[Hyper]:
        if groups[0]["scope"] == "global":
            b = self._accumulate(self.param_groups[0], sum(totals))
            return [{"scale": _ratio(group["lr"], b)} for group in groups]
        pairs = zip(groups, totals, strict=True)
        return [{"scale": _ratio(group["lr"], self._accumulate(group, total))} for group, total in pairs]

    def _accumulate(self, group: Group, total: Any) -> Any:
        """Add to the group's sum of squares; returns its root."""
        param = group["params"][0]
        state = self.state[param]
        if "sum_sq" not in state:
            dtype = torch.float64 if param.dtype in (torch.float64, torch.complex128) else torch.float32
            state["sum_sq"] = torch.full((), group["b0"] ** 2, dtype=dtype, device=param.device)
        if isinstance(total, Tensor):
            state["sum_sq"] = (state["sum_sq"] + total).to(state["sum_sq"].dtype)
            return state["sum_sq"].sqrt()
        state["sum_sq"] += total
        return math.sqrt(state["sum_sq"].item())

    @override
    @staticmethod
    def rule(p: Any, g: Any, s: State, h: Hyper) -> tuple[Any, State]:
        if h["decays"]:
            p = p * h["keep"]
        return axpy(p, g, -h["scale"]), {}

    @override
    def stats(self) -> dict[str, float | Tensor]:
        """``b`` and ``effective_lr`` = ``lr / b``; with ``scope="group"`` and several groups ``b_0``, ``b_1``, ..."""
        groups = self.param_groups if self.param_groups[0]["scope"] == "group" else self.param_groups[:1]
        found: dict[str, float | Tensor] = {}
        for i, group in enumerate(groups):
            b = self.state[group["params"][0]]["sum_sq"].sqrt() if self.state[group["params"][0]] else group["b0"]
            suffix = f"_{i}" if len(groups) > 1 else ""
            found |= {f"b{suffix}": b, f"effective_lr{suffix}": _ratio(group["lr"], b)}
        return found


def _ratio(lr: Any, b: Any) -> Any:
    """``lr / b``, and 0 where ``b`` is 0 (no gradient was seen yet)."""
    if isinstance(b, Tensor):
        return torch.where(b > 0, lr / torch.where(b > 0, b, 1.0), 0.0)
    return lr / b if b > 0 else 0.0
