"""OptimisticAdam: Adam that steps ahead along its last update, for games."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

from torch.optim.optimizer import ParamsT
from typing_extensions import override

from lightning_grad.optim._base import RuleOptimizer
from lightning_grad.optim._checks import Switches
from lightning_grad.optim._executors import Group, Hyper, State
from lightning_grad.optim._math import adam, adam_scalars, axpy


class OptimisticAdam(RuleOptimizer):
    r"""Adam with the last update as a prediction of the next, for min-max problems such as GANs.

    .. math::
        u_t = \hat m_t / (\sqrt{\hat v_t} + \epsilon), \qquad
        \theta_t = (1 - \eta \lambda)\, \theta_{t-1} - 2 \eta\, u_t + \eta\, u_{t-1}, \qquad u_0 = 0

    Args:
        params: Parameters or parameter groups, as for :class:`torch.optim.Optimizer`.
        lr: Step size :math:`\eta`, >= 0.
        betas: Decay rates of the two averages, each in [0, 1).
        eps: Added to :math:`\sqrt{\hat v}`, >= 0.
        weight_decay: Decoupled decay :math:`\lambda`, >= 0; multiplied by ``lr``.
        **switches: ``maximize``, ``foreach``, ``compile``, ``capturable``, ``differentiable``, ``decay_1d``,
            ``state_dtype``, ``stochastic_rounding``.

    Raises:
        ValueError: A hyperparameter is out of range.

    State per parameter: ``step``, ``exp_avg``, ``exp_avg_sq``, ``previous_update``.

    Source: Daskalakis et al., Training GANs with optimism (arXiv:1711.00141), Optimistic Adam.
    """

    state_spec: ClassVar = {"exp_avg": 0.0, "exp_avg_sq": 0.0, "previous_update": 0.0}

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.5, 0.9),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **switches: Unpack[Switches],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, **switches)

    @override
    def hyper(self, group: Group, step: Any) -> Hyper:
        return {
            **adam_scalars(group["betas"], group["eps"], step), "lr": group["lr"],
            "keep": 1.0 - group["lr"] * group["weight_decay"], "decays": group["weight_decay"] != 0.0,
        }  # fmt: skip

    @override
    @staticmethod
    def rule(p: Any, g: Any, s: State, h: Hyper) -> tuple[Any, State]:
        if h["decays"]:
            p = p * h["keep"]
        averages, m, denominator = adam(s, g, h)
        u = (m if denominator is None else m / denominator) * h["unbias"]
        p = axpy(axpy(p, u, -2.0 * h["lr"]), s["previous_update"], h["lr"])
        return p, {**averages, "previous_update": u}
