"""SGDP: SGD with momentum that does not inflate the norm of scale-invariant weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

from torch.optim.optimizer import ParamsT
from typing_extensions import override

from lightning_grad.optim._checks import BELOW_ONE, FRACTION, Switches
from lightning_grad.optim._executors import Group, Hyper, State
from lightning_grad.optim._math import axpy, scale_add
from lightning_grad.optim._projection import ProjectedOptimizer


class SGDP(ProjectedOptimizer):
    r"""SGD with the radial part of the update removed from weights that are followed by a normalization layer.

    .. math::
        b \leftarrow \mu b + (1 - \text{dampening})\, g, \qquad u = b \ \text{or}\ g + \mu b \ \text{(nesterov)} \\
        p \leftarrow (1 - \eta \lambda q / (1 - \mu))\, p - \eta\, \Pi(u)

    :math:`\Pi` and :math:`q` are those of :class:`AdamP`.

    Args:
        params: Parameters or parameter groups, as for :class:`torch.optim.Optimizer`.
        lr: Step size :math:`\eta`, >= 0.
        momentum: Momentum :math:`\mu`, in [0, 1).
        dampening: Dampening of the gradient in the momentum buffer, in [0, 1].
        weight_decay: Decoupled decay :math:`\lambda`, >= 0; multiplied by ``lr / (1 - momentum)``.
        nesterov: Look ahead along the momentum.
        eps: Added to norms, >= 0.
        delta: Threshold of the cosine, >= 0; 0 switches the projection off.
        wd_ratio: Factor :math:`q` of the decay of scale-invariant weights, in [0, 1].
        **switches: ``maximize``, ``foreach``, ``compile``, ``capturable``, ``differentiable``, ``decay_1d``,
            ``state_dtype``, ``stochastic_rounding``.

    Raises:
        ValueError: A hyperparameter is out of range.

    State per parameter: ``step``; ``momentum_buffer``, unless momentum and dampening are 0.

    Source: Heo et al., AdamP (arXiv:2006.08217), Algorithm 1 (SGDP). The authors' code projects the momentum buffer
    itself when ``nesterov=False``; this follows the paper, which projects the update only.
    """

    state_spec: ClassVar = {"momentum_buffer": 0.0}
    allowed: ClassVar = {"momentum": BELOW_ONE, "dampening": FRACTION}

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        **switches: Unpack[Switches],
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov,
            "eps": eps, "delta": delta, "wd_ratio": wd_ratio,
        }  # fmt: skip
        super().__init__(params, defaults, **switches)

    @override
    def state_names(self, group: Group) -> Mapping[str, float | None]:
        return self.state_spec if group["momentum"] != 0.0 or group["dampening"] != 0.0 else {}

    @override
    def hyper(self, group: Group, step: Any) -> Hyper:
        return {
            "momentum": group["momentum"], "fresh": 1.0 - group["dampening"], "step_size": group["lr"],
            "decay": group["lr"] * group["weight_decay"] / (1.0 - group["momentum"]), "eps_row": group["eps"],
            "delta": group["delta"], "wd_ratio": group["wd_ratio"],
            "projects": group["delta"] > 0.0, "nesterov": group["nesterov"],
        }  # fmt: skip

    @override
    @staticmethod
    def advance(g: Any, s: State, h: Hyper) -> State:
        if "momentum_buffer" not in s:
            return {}
        return {"momentum_buffer": scale_add(s["momentum_buffer"], h["momentum"], g, h["fresh"])}

    @override
    @staticmethod
    def direction(g: Any, s: State, h: Hyper) -> Any:
        if "momentum_buffer" not in s:
            return g
        return axpy(g, s["momentum_buffer"], h["momentum"]) if h["nesterov"] else s["momentum_buffer"]
