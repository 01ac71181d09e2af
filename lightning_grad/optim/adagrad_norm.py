"""AdaGrad-Norm: one step size for all parameters, from the accumulated gradient norm."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from lightning_grad.optim._base import RuleOptimizer
from lightning_grad.optim._checks import NON_NEGATIVE, Switches
from lightning_grad.optim._executors import Group, Hyper, State
from lightning_grad.optim._math import axpy, ratio


class AdaGradNorm(RuleOptimizer):
    r"""AdaGrad with a scalar step size: no Lipschitz constant to know, no state per parameter.

    .. math::
        b_t^2 = b_{t-1}^2 + \|g_t\|^2, \qquad \theta_t = (1 - \eta \lambda)\, \theta_{t-1} - (\eta / b_t)\, g_t

    The norm runs over all parameters. A step with :math:`b_t = 0` does not move.

    Args:
        params: Parameters or parameter groups, as for :class:`torch.optim.Optimizer`.
        lr: Step size :math:`\eta`, >= 0; the first step has length at most ``lr``.
        b0: Initial :math:`b`, >= 0; for ``scope="global"`` that of the first parameter group.
        weight_decay: Decoupled decay :math:`\lambda`, >= 0; multiplied by ``lr``, not divided by :math:`b`.
        scope: ``"global"``: one :math:`b` for all parameter groups; ``"group"``: one for each group.
        **switches: ``maximize``, ``foreach``, ``compile``, ``capturable``, ``differentiable``, ``decay_1d``,
            ``state_dtype``, ``stochastic_rounding``.

    Raises:
        ValueError: A hyperparameter is out of range, or ``scope`` is not the same in all parameter groups.

    State: one 0-dim ``sum_sq`` = :math:`b^2`, with the first parameter (of each group, for ``scope="group"``).

    Source: Ward, Wu and Bottou, AdaGrad stepsizes (arXiv:1806.01811), Algorithm 1.
    """

    kind = "global"
    shared_state: ClassVar = ("sum_sq",)
    by_group: ClassVar = ("lr", "b0", "weight_decay")
    allowed: ClassVar = {"b0": NON_NEGATIVE, "scope": ("global", "group")}

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
    def hyper(self, group: Group, step: Any) -> Hyper:
        return {"keep": 1.0 - group["lr"] * group["weight_decay"], "decays": group["weight_decay"] != 0.0}

    @override
    def prologue(self, groups: list[Group], totals: list[Tensor]) -> list[dict[str, Tensor]]:
        if groups[0]["scope"] == "global":
            b = self._accumulate(self.param_groups[0], sum(totals, torch.zeros_like(totals[0])))
            return [{"scale": ratio(group["lr"], b)} for group in groups]
        pairs = zip(groups, totals, strict=True)
        return [{"scale": ratio(group["lr"], self._accumulate(group, total))} for group, total in pairs]

    def _accumulate(self, group: Group, total: Tensor) -> Tensor:
        """Add to the group's sum of squares; returns its root."""
        exact = self.keeper(group).dtype in (torch.float64, torch.complex128)
        dtype = torch.float64 if exact else torch.float32
        grown = (self.shared(group, "sum_sq", group["b0"] ** 2, dtype) + total).to(dtype)
        self.set_shared(group, "sum_sq", grown)
        return grown.to(total.dtype).sqrt()

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
            kept = self.kept(group) if group["params"] or len(groups) == 1 else {}
            b = kept.get("sum_sq", torch.tensor(group["b0"] ** 2)).sqrt()
            suffix = f"_{i}" if len(groups) > 1 else ""
            found |= {f"b{suffix}": b, f"effective_lr{suffix}": ratio(group["lr"], b)}
        return found
