"""DiffGrad: Adam whose step is damped where the gradient barely changes."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

from torch.optim.optimizer import ParamsT
from typing_extensions import override

from lightning_grad.optim._base import RuleOptimizer
from lightning_grad.optim._checks import Switches
from lightning_grad.optim._executors import Group, Hyper, State
from lightning_grad.optim._math import adam, adam_scalars, addcdiv, axpy, damped, spent


class DiffGrad(RuleOptimizer):
    r"""Adam with a friction coefficient that shrinks the step where the gradient did not change.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \xi_t &= \mathrm{sigmoid}(|g_{t-1} - g_t|) \in [0.5, 1), \qquad g_0 = 0 \\
        \theta_t &= \theta_{t-1} - \eta \, \xi_t \, \hat m_t / (\sqrt{\hat v_t} + \epsilon)

    The friction depends on the absolute scale of the gradient: where gradients change by much less than 1, it is 0.5
    and DiffGrad is Adam at half the learning rate.

    Args:
        params: Parameters or parameter groups, as for :class:`torch.optim.Optimizer`.
        lr: Step size :math:`\eta`, >= 0.
        betas: Decay rates of the two averages, each in [0, 1).
        eps: Added to :math:`\sqrt{\hat v}`, >= 0.
        weight_decay: Decay :math:`\lambda`, >= 0.
        decoupled_weight_decay: If ``True``, shrink the parameter by ``1 - lr * weight_decay`` as AdamW does; otherwise
            add ``weight_decay * p`` to the gradient, as the authors' code does.
        **switches: ``maximize``, ``foreach``, ``compile``, ``capturable``, ``differentiable``, ``decay_1d``,
            ``state_dtype``, ``stochastic_rounding``.

    Raises:
        ValueError: A hyperparameter is out of range.

    State per parameter: ``step``, ``exp_avg``, ``exp_avg_sq``, ``previous_grad``.

    Source: Dubey et al., diffGrad (arXiv:1909.11015), Algorithm 1. The authors' code divides by
    :math:`\sqrt{v} + \epsilon` before the bias correction; this follows the paper and torch.
    """

    state_spec: ClassVar = {"exp_avg": 0.0, "exp_avg_sq": 0.0, "previous_grad": 0.0}

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        **switches: Unpack[Switches],
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
        }  # fmt: skip
        super().__init__(params, defaults, **switches)

    @override
    def hyper(self, group: Group, step: Any) -> Hyper:
        decays, adams = group["weight_decay"] != 0.0, adam_scalars(group["betas"], group["eps"], step)
        return {
            **adams, "step_size": group["lr"] * adams["unbias"],
            "weight_decay": group["weight_decay"], "keep": 1.0 - group["lr"] * group["weight_decay"],
            "coupled": decays and not group["decoupled_weight_decay"],
            "decoupled": decays and group["decoupled_weight_decay"],
        }  # fmt: skip

    @override
    @staticmethod
    def rule(p: Any, g: Any, s: State, h: Hyper) -> tuple[Any, State]:
        if h["coupled"]:
            g = axpy(g, p, h["weight_decay"])
        if h["decoupled"]:
            p = p * h["keep"]
        averages, *fraction = adam(s, g, h)
        change = (spent(s["previous_grad"]) - g).abs()
        p = addcdiv(p, *damped(change, *fraction), -h["step_size"])
        return p, {**averages, "previous_grad": g}
