"""Normalized gradient descent: steps of a fixed length along the gradient."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from lightning_grad.optim._base import Kind, RuleOptimizer
from lightning_grad.optim._checks import Switches
from lightning_grad.optim._executors import Group, Hyper, State
from lightning_grad.optim._math import axpy, ratio


class NormalizedGD(RuleOptimizer):
    r"""Gradient descent with the gradient divided by its norm.

    .. math::
        \theta_t = (1 - \eta \lambda)\, \theta_{t-1} - \eta\, g_t / (\|g_t\| + \epsilon)

    A zero gradient does not move.

    Args:
        params: Parameters or parameter groups, as for :class:`torch.optim.Optimizer`.
        lr: Length of the step :math:`\eta`, >= 0.
        norm: ``"global"``: one norm over all parameters; ``"tensor"``: each parameter has its own.
        eps: Added to the norm, >= 0.
        weight_decay: Decoupled decay :math:`\lambda`, >= 0; multiplied by ``lr``.
        **switches: ``maximize``, ``foreach``, ``compile``, ``capturable``, ``differentiable``, ``decay_1d``,
            ``state_dtype``, ``stochastic_rounding``.

    Raises:
        ValueError: A hyperparameter is out of range.

    State per parameter: ``step`` only.

    Source: Tyurin, From logistic regression to the perceptron algorithm (arXiv:2412.08424), for the use on
    classification losses; its logistic normalization, which needs the loss of every sample, is not offered here.
    """

    kind = "global"
    allowed: ClassVar = {"norm": ("global", "tensor")}

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        norm: Literal["global", "tensor"] = "global",
        eps: float = 0.0,
        weight_decay: float = 0.0,
        **switches: Unpack[Switches],
    ) -> None:
        super().__init__(params, {"lr": lr, "norm": norm, "eps": eps, "weight_decay": weight_decay}, **switches)

    @override
    def kind_of(self, group: Group) -> Kind:
        return "tensor" if group["norm"] == "tensor" else "global"

    @override
    def hyper(self, group: Group, step: Any) -> Hyper:
        return {
            "lr": group["lr"], "eps": group["eps"], "keep": 1.0 - group["lr"] * group["weight_decay"],
            "decays": group["weight_decay"] != 0.0,
        }  # fmt: skip

    @override
    def prologue(self, groups: list[Group], totals: list[Tensor]) -> list[dict[str, Tensor]]:
        norm = sum(totals, torch.zeros_like(totals[0])).sqrt()
        return [{"scale": _scale(group["lr"], norm, group["eps"])} for group in groups]

    @override
    def own_scalars(self, param: Tensor, total: Tensor, h: Hyper) -> dict[str, Tensor]:
        return {"scale": _scale(h["lr"], total.sqrt(), h["eps"])}

    @override
    @staticmethod
    def rule(p: Any, g: Any, s: State, h: Hyper) -> tuple[Any, State]:
        if h["decays"]:
            p = p * h["keep"]
        return axpy(p, g, -h["scale"]), {}


def _scale(lr: Any, norm: Tensor, eps: Any) -> Tensor:
    return ratio(lr, norm + eps).masked_fill(norm == 0, 0.0)
