"""AdamP: Adam that does not inflate the norm of scale-invariant weights."""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

from torch.optim.optimizer import ParamsT
from typing_extensions import override

from lightning_grad.optim._checks import Switches
from lightning_grad.optim._executors import Group, Hyper, State
from lightning_grad.optim._math import adam, adam_denominator, adam_scalars, axpy, ema, ema_of_square
from lightning_grad.optim._projection import ProjectedOptimizer


class AdamP(ProjectedOptimizer):
    r"""AdamW with the radial part of the update removed from weights that are followed by a normalization layer.

    A weight (ndim >= 2) with rows :math:`p_r` counts as scale invariant if its gradient is nearly orthogonal to it:

    .. math::
        \max_r |\cos(p_r, g_r)| < \delta / \sqrt{C} \ \text{(channel), or else} \
        |\cos(p, g)| < \delta / \sqrt{R C} \ \text{(layer)}

    Then :math:`u` is made orthogonal to each :math:`p_r` (or to :math:`p`) and the decay multiplied by ``wd_ratio``:

    .. math::
        p \leftarrow (1 - \eta \lambda q)\, p - \eta\, \Pi(u), \qquad u = \hat m / (\sqrt{\hat v} + \epsilon)

    Args:
        params: Parameters or parameter groups, as for :class:`torch.optim.Optimizer`.
        lr: Step size :math:`\eta`, >= 0.
        betas: Decay rates of the two averages, each in [0, 1).
        eps: Added to :math:`\sqrt{\hat v}` and to norms, >= 0.
        weight_decay: Decoupled decay :math:`\lambda`, >= 0; multiplied by ``lr``.
        delta: Threshold :math:`\delta` of the cosine, >= 0; 0 switches the projection off (AdamW).
        wd_ratio: Factor :math:`q` of the decay of scale-invariant weights, in [0, 1].
        nesterov: Use :math:`\beta_1 m + (1 - \beta_1) g` in place of :math:`m`.
        **switches: ``maximize``, ``foreach``, ``compile``, ``capturable``, ``differentiable``, ``decay_1d``,
            ``state_dtype``, ``stochastic_rounding``.

    Raises:
        ValueError: A hyperparameter is out of range.

    State per parameter: ``step``, ``exp_avg``, ``exp_avg_sq``.

    Source: Heo et al., AdamP (arXiv:2006.08217), Algorithms 1 and 2, as in the authors' code.
    """

    state_spec: ClassVar = {"exp_avg": 0.0, "exp_avg_sq": 0.0}

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        **switches: Unpack[Switches],
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "delta": delta, "wd_ratio": wd_ratio, "nesterov": nesterov,
        }  # fmt: skip
        super().__init__(params, defaults, **switches)

    @override
    def hyper(self, group: Group, step: Any) -> Hyper:
        adams = adam_scalars(group["betas"], group["eps"], step)
        return {
            **adams, "step_size": group["lr"] * adams["unbias"],
            "decay": group["lr"] * group["weight_decay"], "eps_row": group["eps"],
            "delta": group["delta"], "wd_ratio": group["wd_ratio"],
            "projects": group["delta"] > 0.0, "nesterov": group["nesterov"],
        }  # fmt: skip

    @override
    @staticmethod
    def advance(g: Any, s: State, h: Hyper) -> State:
        return {
            "exp_avg": ema(s["exp_avg"], g, h["beta1"]),
            "exp_avg_sq": ema_of_square(s["exp_avg_sq"], g, h["beta2"]),
        }

    @override
    @classmethod
    def move(cls, g: Any, s: State, h: Hyper) -> tuple[State, Any]:
        if h["nesterov"]:
            return super().move(g, s, h)
        averages, m, denominator = adam(s, g, h)
        return averages, m if denominator is None else m / denominator

    @override
    @staticmethod
    def direction(g: Any, s: State, h: Hyper) -> Any:
        m = axpy(s["exp_avg"] * h["beta1"], g, 1.0 - h["beta1"]) if h["nesterov"] else s["exp_avg"]
        return m / adam_denominator(s["exp_avg_sq"], h)
