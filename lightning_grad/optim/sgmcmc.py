"""Stochastic-gradient Markov chain Monte Carlo: optimizers whose iterates are samples of the posterior."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from lightning_grad.optim._base import Kind, RuleOptimizer
from lightning_grad.optim._buckets import LOW_PRECISION
from lightning_grad.optim._checks import BELOW_ONE, NON_NEGATIVE, Range, Switches
from lightning_grad.optim._executors import Group, Hyper, State
from lightning_grad.optim._math import axpy, ema_of_square, ratio, scale_add, square_sum


class _Langevin(RuleOptimizer):
    """What the samplers share: temperature, size of the data set, and a random generator that is part of the state."""

    noisy = True
    allowed: ClassVar = {"temperature": NON_NEGATIVE}

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], seed: int | None, **switches: Unpack[Switches]
    ) -> None:
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63):
            raise ValueError(f"seed must be an integer in [0, 2^63) or None, got {seed!r}")
        super().__init__(params, defaults, **switches)

    @override
    def check(self, group: Group) -> None:
        n_data = group["n_data"]
        if isinstance(n_data, bool) or not isinstance(n_data, int) or n_data < 0:
            raise ValueError(f"n_data must be an integer >= 0, got {n_data!r}")

    @override
    def hyper(self, group: Group, step: Any) -> Hyper:
        """``lr``, weight decay, and whether there is noise and its standard deviation ``sqrt(2 * lr * tau / N)``."""
        noisy = bool(group["temperature"] > 0.0)
        if noisy and not group["n_data"]:
            raise ValueError(
                "n_data must be set: the noise scale depends on the dataset size"
                " (pass n_data=..., or add the callback BindDataSize)"
            )
        heat = group["temperature"] / group["n_data"] if noisy else 0.0
        return {
            "lr": group["lr"], "noisy": noisy, "std": (2.0 * group["lr"] * heat) ** 0.5,
            "decays": group["weight_decay"] != 0.0, "weight_decay": group["weight_decay"],
        }  # fmt: skip

    @override
    def _check_rounding(self, group: Group) -> None:
        super()._check_rounding(group)
        if group["stochastic_rounding"] or not group["temperature"]:
            return
        for index, param in enumerate(group["params"]):
            if param.grad is not None and param.dtype in LOW_PRECISION:
                raise ValueError(
                    f"{type(self).__name__} loses its noise in {param.dtype} (parameter {index}):"
                    " use float32 parameters, or bfloat16 with stochastic_rounding=True"
                )

    @override
    def generator(self, device: torch.device) -> torch.Generator:
        """The generator of a device, seeded by ``seed`` or else by the global seed; ``state_dict()`` has its state."""
        if device not in self._generators:
            generator = torch.Generator(device)
            seed = torch.initial_seed() if self.seed is None else self.seed
            # the index would give each process of a run another one; they must draw the same
            generator.manual_seed((seed + len(self._generators)) % (1 << 64))
            saved = self.kept(self.param_groups[0]).pop(_key(device), None)
            if saved is not None:
                generator.set_state(saved.cpu())
            self._generators[device] = generator
        return self._generators[device]

    @override
    def _is_shared(self, name: str) -> bool:
        return name.startswith("generator_")

    @override
    def state_dict(self) -> dict[str, Any]:
        saved = super().state_dict()
        for device, generator in self._generators.items():
            saved["state"].setdefault(0, {})[_key(device)] = generator.get_state()
        return saved

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._generators = {}

    @override
    def __getstate__(self) -> dict[str, Any]:
        states = {str(device): generator.get_state() for device, generator in self._generators.items()}
        return {**super().__getstate__(), "seed": self.seed, "generator_states": states}

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        states = state.pop("generator_states", {})
        super().__setstate__(state)
        if states or not hasattr(self, "_generators"):
            self._generators = {}
            for device, value in states.items():
                self._generators[torch.device(device)] = torch.Generator(device)
                self._generators[torch.device(device)].set_state(value)

    @override
    def stats(self) -> dict[str, float | Tensor]:
        """``noise_std``: standard deviation of the noise of one step (before preconditioning), first group."""
        group = self.param_groups[0]
        return {"noise_std": math.sqrt(2.0 * float(group["lr"]) * group["temperature"] / max(group["n_data"], 1))}


class SGLD(_Langevin):
    r"""Stochastic-gradient Langevin dynamics: SGD plus noise that makes the iterates samples of the posterior.

    .. math::
        \theta \leftarrow \theta - \eta\, g + \sqrt{2 \eta \tau / N}\; \xi, \qquad \xi \sim \mathcal N(0, I)

    The loss must be the **mean** negative log likelihood of the batch, and ``weight_decay`` the prior precision divided
    by N; ``lr`` then compares with that of SGD.

    Args:
        params: Parameters or parameter groups, as for :class:`torch.optim.Optimizer`.
        lr: Step size :math:`\eta`, >= 0.
        n_data: Training samples N, >= 1; 0: filled in by the callback ``BindDataSize`` (``lightning-grad`` has it).
        temperature: :math:`\tau`, >= 0; 1 is the posterior, 0 is SGD.
        weight_decay: Adds ``weight_decay * p`` to the gradient, >= 0.
        seed: Seed of the noise, in [0, 2^63); ``None``: the global seed. For several chains in one
            process give each its own: with the same seed they draw the same noise.
        sphere: Keep every tensor (ndim >= 1, not zero) on the sphere of its initial norm.
        **switches: ``maximize``, ``foreach``, ``compile``, ``capturable``, ``differentiable``, ``decay_1d``,
            ``state_dtype``, ``stochastic_rounding``.

    Raises:
        ValueError: A hyperparameter is out of range, or (at the first step) ``n_data`` is not known.

    State per parameter: ``step``; with ``sphere`` also ``radius``. In ``state_dict()``: the state of the generator.

    Source: Welling and Teh (2011); Thaler et al., Scalable Bayesian uncertainty quantification for neural network
    potentials (arXiv:2212.07959). The sphere: arXiv:2603.06028.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        n_data: int = 0,
        temperature: float = 1.0,
        weight_decay: float = 0.0,
        seed: int | None = None,
        sphere: bool = False,
        **switches: Unpack[Switches],
    ) -> None:
        defaults = {
            "lr": lr, "n_data": n_data, "temperature": temperature, "weight_decay": weight_decay, "sphere": sphere
        }  # fmt: skip
        super().__init__(params, defaults, seed, **switches)

    @override
    def kind_of(self, group: Group) -> Kind:
        return "tensor" if group["sphere"] else "elementwise"

    @override
    def _is_shared(self, name: str) -> bool:
        return super()._is_shared(name) or name == "radius"

    @override
    def hyper(self, group: Group, step: Any) -> Hyper:
        return {**super().hyper(group, step), "sphere": group["sphere"]}

    @override
    @staticmethod
    def measure(p: Tensor, g: Tensor, s: State, h: Hyper) -> Tensor:
        move = _with_prior(p, g, h) * -h["lr"]
        move = axpy(move, s["noise"], h["std"]) if h["noisy"] else move
        return torch.stack([square_sum(p), (p * move).sum(), square_sum(move)])

    @override
    def own_scalars(self, param: Tensor, total: Tensor, h: Hyper) -> dict[str, Tensor]:
        """Factors of ``p`` and of its move on the sphere."""
        state = self.state[param]
        if "radius" not in state:
            state["radius"] = total[0].detach().sqrt()
            self._remember()
        keep, factor = _onto_sphere(state["radius"] * (param.ndim > 0), *total.unbind())
        return {"keep": keep, "lr": h["lr"] * factor, "std": h["std"] * factor}

    @override
    @staticmethod
    def rule(p: Any, g: Any, s: State, h: Hyper) -> tuple[Any, State]:
        g = _with_prior(p, g, h)
        if h["sphere"]:
            p = p * h["keep"]
        p = axpy(p, g, -h["lr"])
        return (axpy(p, s["noise"], h["std"]) if h["noisy"] else p), {}


class PSGLD(_Langevin):
    r"""Langevin dynamics preconditioned by a running average of squared gradients, as RMSprop.

    .. math::
        V \leftarrow \alpha V + (1 - \alpha) g^2, \qquad Q = 1 / (\lambda + \sqrt V) \\
        \theta \leftarrow \theta - \eta\, Q g + \sqrt{2 \eta \tau Q / N}\; \xi

    The correction term for the change of Q is left out, as in the implementations in use; V starts at ``v_init``.

    Args:
        params: Parameters or parameter groups, as for :class:`torch.optim.Optimizer`.
        lr: Step size :math:`\eta`, >= 0.
        n_data: Training samples N, >= 1; 0: filled in by the callback ``BindDataSize`` (``lightning-grad`` has it).
        temperature: :math:`\tau`, >= 0; 1 is the posterior, 0 is RMSprop.
        weight_decay: Adds ``weight_decay * p`` to the gradient, >= 0.
        seed: Seed of the noise, in [0, 2^63); ``None``: the global seed. For several chains in one
            process give each its own: with the same seed they draw the same noise.
        alpha: Decay of the average, in [0, 1).
        lam: :math:`\lambda`, >= 1e-12.
        v_init: Initial V, >= 0; with 0 the first steps are up to :math:`1 / \sqrt{1 - \alpha}` times larger.
        **switches: ``maximize``, ``foreach``, ``compile``, ``capturable``, ``differentiable``, ``decay_1d``,
            ``state_dtype``, ``stochastic_rounding``.

    Raises:
        ValueError: A hyperparameter is out of range, or (at the first step) ``n_data`` is not known.

    State per parameter: ``step``, ``square_avg``. In ``state_dict()``: the state of the generator.

    Source: Li et al., Preconditioned stochastic gradient Langevin dynamics (arXiv:1512.07666).
    """

    state_spec: ClassVar = {"square_avg": 0.0}
    allowed: ClassVar = {"alpha": BELOW_ONE, "lam": Range(1e-12), "v_init": NON_NEGATIVE}

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        n_data: int = 0,
        temperature: float = 1.0,
        weight_decay: float = 0.0,
        seed: int | None = None,
        alpha: float = 0.99,
        lam: float = 1e-5,
        v_init: float = 0.0,
        **switches: Unpack[Switches],
    ) -> None:
        defaults = {
            "lr": lr, "n_data": n_data, "temperature": temperature, "weight_decay": weight_decay,
            "alpha": alpha, "lam": lam, "v_init": v_init,
        }  # fmt: skip
        super().__init__(params, defaults, seed, **switches)

    @override
    def state_names(self, group: Group) -> Mapping[str, float | None]:
        return {"square_avg": group["v_init"]}

    @override
    def hyper(self, group: Group, step: Any) -> Hyper:
        return {**super().hyper(group, step), "alpha": group["alpha"], "lam": group["lam"]}

    @override
    @staticmethod
    def rule(p: Any, g: Any, s: State, h: Hyper) -> tuple[Any, State]:
        g = _with_prior(p, g, h)
        v = ema_of_square(s["square_avg"], g, h["alpha"])
        p = axpy(p, g / (v.sqrt() + h["lam"]), -h["lr"])
        if h["noisy"]:
            p = axpy(p, s["noise"] / (v.sqrt() + h["lam"]).sqrt(), h["std"])
        return p, {"square_avg": v}


class SGHMC(_Langevin):
    r"""Stochastic-gradient Hamiltonian Monte Carlo: heavy-ball momentum plus noise that balances its friction.

    .. math::
        v \leftarrow (1 - f)\, v - \eta\, g + \sqrt{2 f \eta \tau / N}\; \xi, \qquad \theta \leftarrow \theta + v

    Args:
        params: Parameters or parameter groups, as for :class:`torch.optim.Optimizer`.
        lr: Step size :math:`\eta`, >= 0.
        n_data: Training samples N, >= 1; 0: filled in by the callback ``BindDataSize`` (``lightning-grad`` has it).
        temperature: :math:`\tau`, >= 0; 1 is the posterior, 0 is SGD with momentum ``1 - friction``.
        weight_decay: Adds ``weight_decay * p`` to the gradient, >= 0.
        seed: Seed of the noise, in [0, 2^63); ``None``: the global seed. For several chains in one
            process give each its own: with the same seed they draw the same noise.
        friction: f, in (0, 1].
        **switches: ``maximize``, ``foreach``, ``compile``, ``capturable``, ``differentiable``, ``decay_1d``,
            ``state_dtype``, ``stochastic_rounding``.

    Raises:
        ValueError: A hyperparameter is out of range, or (at the first step) ``n_data`` is not known.

    State per parameter: ``step``, ``velocity``. In ``state_dict()``: the state of the generator.

    Source: Chen, Fox and Guestrin, Stochastic gradient Hamiltonian Monte Carlo (arXiv:1402.4102), equation 15.
    """

    state_spec: ClassVar = {"velocity": 0.0}
    allowed: ClassVar = {"friction": Range(0.0, 1.0, "(]")}

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        n_data: int = 0,
        temperature: float = 1.0,
        weight_decay: float = 0.0,
        seed: int | None = None,
        friction: float = 0.1,
        **switches: Unpack[Switches],
    ) -> None:
        defaults = {
            "lr": lr, "n_data": n_data, "temperature": temperature, "weight_decay": weight_decay, "friction": friction
        }  # fmt: skip
        super().__init__(params, defaults, seed, **switches)

    @override
    def hyper(self, group: Group, step: Any) -> Hyper:
        h, friction = super().hyper(group, step), group["friction"]
        return {**h, "std": h["std"] * friction**0.5, "momentum": 1.0 - friction}

    @override
    @staticmethod
    def rule(p: Any, g: Any, s: State, h: Hyper) -> tuple[Any, State]:
        g = _with_prior(p, g, h)
        v = scale_add(s["velocity"], h["momentum"], g, -h["lr"])
        if h["noisy"]:
            v = scale_add(v, 1.0, s["noise"], h["std"])
        return p + v, {"velocity": v}


def _with_prior(p: Any, g: Any, h: Hyper) -> Any:
    """The gradient with that of the prior."""
    return axpy(g, p, h["weight_decay"]) if h["decays"] else g


def _onto_sphere(radius: Tensor, pp: Tensor, pu: Tensor, uu: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of ``p`` and ``u`` in their sum without the part of ``u`` along ``p``, scaled to a norm.

    Args:
        radius: The norm; 0 (a tensor that starts at zero): both factors are 1.
        pp: ``<p, p>``.
        pu: ``<p, u>``.
        uu: ``<u, u>``.
    """
    one, bound = torch.ones_like(pp), (pp > 0) & (radius > 0)
    along = torch.where(bound, pu / torch.where(bound, pp, one), torch.zeros_like(pp))
    length = torch.where(bound, pp + (uu - along * pu).clamp_min(0.0), one).sqrt()
    factor = torch.where(bound, ratio(radius, length), one)
    return (1.0 - along) * factor, factor


def _key(device: torch.device) -> str:
    return f"generator_{device}"
