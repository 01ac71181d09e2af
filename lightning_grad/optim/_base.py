"""The base of all optimizers whose update is one pure rule: layout, execution modes, precision and state dict, once."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_grad.optim._buckets import Layout, Plan, Scratch, Unit, make_plan, wide_dtype
from lightning_grad.optim._checkpoint import check_state_dict, placed
from lightning_grad.optim._checks import (
    NON_NEGATIVE,
    SWITCH_DEFAULTS,
    Allowed,
    Switches,
    check_equal,
    check_group,
    check_params,
)
from lightning_grad.optim._executors import (
    Group,
    Hyper,
    Rule,
    State,
    load,
    pieces,
    run_compiled,
    run_differentiable,
    run_in_place,
    run_list,
    store,
)
from lightning_grad.optim._math import Pool, square_sum

Kind = Literal["elementwise", "rowwise", "global", "tensor"]
Work = list[tuple[Group, list[tuple[Unit, Hyper]]]]


class RuleOptimizer(Optimizer):
    """An optimizer given by one pure update rule.

    A subclass supplies ``state_spec`` (name -> initial fill), :meth:`hyper` and :meth:`rule`, and may be

    - ``"elementwise"``: the rule sees flat tensors with the values of many parameters, or slices of one;
    - ``"global"``: elementwise after a prologue (:meth:`measure`, :meth:`prologue`) that reduces over all parameters;
    - ``"tensor"``: elementwise after one that reduces over each parameter (:meth:`measure`, :meth:`own_scalars`);
    - ``"rowwise"``: the rule sees rows of weights and may reduce over them (``_projection.py``).
    """

    kind: ClassVar[Kind] = "elementwise"
    noisy: ClassVar[bool] = False  # the rule finds standard normal numbers in ``s["noise"]`` if ``h["noisy"]``
    state_spec: ClassVar[Mapping[str, float | None]] = {}  # None: starts as the parameter's value
    allowed: ClassVar[Allowed] = {"eps": NON_NEGATIVE, "weight_decay": NON_NEGATIVE}  # what base classes say holds too
    by_group: ClassVar[tuple[str, ...] | None] = None  # hyperparameters that groups may differ in; None: all
    alone: ClassVar[str] = ""  # a parameter whose state has this entry does not share a bucket
    small: ClassVar[int] = 32768  # parameters with fewer elements share a bucket
    capacity: ClassVar[int] = 131072  # elements of a bucket
    block: ClassVar[Mapping[str, int]] = {"cpu": 1 << 18, "cuda": 1 << 24}  # elements per call of the eager rule
    listed_devices: ClassVar[tuple[str, ...]] = ("cuda",)  # where `foreach=None` means lists for large parameters

    def __init__(self, params: ParamsT, defaults: dict[str, Any], **switches: Unpack[Switches]) -> None:
        unknown = set(switches) - set(SWITCH_DEFAULTS)
        if unknown:
            raise TypeError(f"{type(self).__name__} got an unexpected argument {sorted(unknown)[0]!r}")
        self._forget_plans()
        super().__init__(params, {**defaults, **SWITCH_DEFAULTS, **switches})

    # ---- what a subclass supplies -------------------------------------------------------------------------------

    def hyper(self, group: Group, step: Any) -> Hyper:
        """Scalars of the rule at a step: numbers (or 0-dim tensors), and bools that choose the form of the rule.

        Args:
            group: The parameter group.
            step: Number of this step (from 1) of the parameters; a 0-dim float64 tensor if ``capturable``.
        """
        raise NotImplementedError

    @staticmethod
    def rule(p: Any, g: Any, s: State, h: Hyper) -> tuple[Any, State]:
        """New parameter and new state entries; changes nothing, reads no tensor on the host."""
        raise NotImplementedError

    @staticmethod
    def measure(p: Tensor, g: Tensor, s: State, h: Hyper) -> Tensor:
        """``"global"`` and ``"tensor"`` rules: what to sum; by default the squared norm of ``g``."""
        return square_sum(g)

    def prologue(self, groups: list[Group], totals: list[Tensor]) -> list[dict[str, Tensor]]:
        """``"global"`` rules: scalars to add to ``h``, for each group, from the sums of :meth:`measure`.

        Args:
            groups: The groups that have gradients.
            totals: One float64 sum per group.
        """
        raise NotImplementedError

    def own_scalars(self, param: Tensor, total: Tensor, h: Hyper) -> dict[str, Tensor]:
        """``"tensor"`` rules: scalars that ``h`` has for this parameter, from its float64 sum of :meth:`measure`."""
        raise NotImplementedError

    def rule_for(self, param: Tensor, h: Hyper) -> Rule:
        """The rule for one whole parameter."""
        return self.rule

    def kind_of(self, group: Group) -> Kind:
        """The kind of the rule for a group."""
        return self.kind

    def state_names(self, group: Group) -> Mapping[str, float | None]:
        """State names and fills that the group needs."""
        return self.state_spec

    def check(self, group: Group) -> None:
        """Raise ``ValueError`` for values of the group that :attr:`allowed` cannot tell."""

    def stats(self) -> dict[str, float | Tensor]:
        """Quantities worth logging, computed when asked."""
        return {}

    # ---- torch.optim.Optimizer ----------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; values it does not name come from the constructor.

        Args:
            param_group: ``{"params": ..., "lr": ..., ...}``, as for :class:`torch.optim.Optimizer`.

        Raises:
            ValueError: A value is out of range, or differs from that of another group and must not.
        """
        merged = {**self.defaults, **param_group}
        check_group(merged, ChainMap(*(vars(cls).get("allowed", {}) for cls in type(self).__mro__)))
        self.check(merged)
        if self.by_group is not None and self.param_groups:
            check_equal(merged, self.param_groups[0], [n for n in self._hyperparameters() if n not in self.by_group])
        super().add_param_group(param_group)
        _with_scalar_lr(self.param_groups[-1])
        check_params(self.param_groups[-1]["params"], type(self).__name__)

    def _hyperparameters(self) -> list[str]:
        return [name for name in self.defaults if name not in SWITCH_DEFAULTS]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_plans()
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            _with_scalar_lr(group)

    def state_dict(self) -> dict[str, Any]:
        """As in torch, with tensors of their own: the live ones are views of buckets and would be saved whole."""
        saved = super().state_dict()
        saved["state"] = {key: {n: _own(v) for n, v in entry.items()} for key, entry in saved["state"].items()}
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but every state keeps the precision it was saved in, and nothing is shared with ``state_dict``.

        Args:
            state_dict: From :meth:`state_dict` of the same class.

        Raises:
            KeyError: A group lacks a hyperparameter, or the state of a parameter a key, or it has an unknown one: the
                state dict is another optimizer's. Switches that a group lacks have their defaults.
        """
        seen: list[dict[str, Any]] = []

        def check(_: Optimizer, loaded: dict[str, Any]) -> None:
            name = type(self).__name__
            check_state_dict(name, loaded, self._hyperparameters(), self.state_names, self._is_shared)
            seen.append(loaded)

        handle = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        self._forget_plans()
        # torch casts all state but "step" to the parameter's dtype
        for saved_group, group in zip(seen[-1]["param_groups"], self.param_groups, strict=True):
            for key, param in zip(saved_group["params"], group["params"], strict=True):
                for name, value in seen[-1]["state"].get(key, {}).items():
                    self.state[param][name] = placed(name, value, param, group, self._is_shared(name))

    shared_state: ClassVar[tuple[str, ...]] = ()  # scalars of the whole optimizer, kept with the first parameter

    def _is_shared(self, name: str) -> bool:
        return name in self.shared_state

    def keeper(self, group: Group) -> Tensor:
        """The parameter whose state has the scalars of a group: its first, or that of another group if it is empty."""
        found: Tensor = next(param for one in (group, *self.param_groups) for param in one["params"])
        return found

    def kept(self, group: Group) -> dict[str, Any]:
        """The state of :meth:`keeper`, without making it; empty before the first step."""
        return self.state.get(self.keeper(group), {}) if any(one["params"] for one in self.param_groups) else {}

    def shared(self, group: Group, name: str, start: float, dtype: torch.dtype | None = None) -> Tensor:
        """A scalar of the whole optimizer (or group), kept with the state of the group's first parameter."""
        param = self.keeper(group)
        state = self.state[param]
        if name not in state:
            state[name] = torch.full((), start, dtype=dtype or wide_dtype(param.device), device=param.device)
            self._remember()
        found: Tensor = state[name]
        return found

    def _remember(self) -> None:
        """Keep the plans of this step although a state got another entry; others are still to be compared."""
        for plan in self._in_step:
            plan.remember()

    def set_shared(self, group: Group, name: str, value: Tensor) -> None:
        """Change such a scalar; replaced under autograd, so that the graph of this step survives the next."""
        state = self.state[self.keeper(group)]
        old = state[name]
        if group["differentiable"]:
            state[name] = value.to(old.dtype)
        else:
            old.copy_(value)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient.

        Args:
            closure: Re-evaluates the model and returns the loss; called once, with gradients enabled.

        Returns:
            The closure's loss, or ``None``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            self._update()
        return loss

    # ---- planning -----------------------------------------------------------------------------------------------

    def _forget_plans(self) -> None:
        self._plans: dict[int, Plan] = {}
        self._in_step: list[Plan] = []  # those that hold in this step
        self._scratch = Scratch()

    def _plan(self, index: int, group: Group) -> Plan | None:
        """The layout of a group for the parameters that have gradients now."""
        params, grads = [], []
        for param in group["params"]:
            grad = param.grad
            if grad is None:
                continue
            if grad.layout is not torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__} does not support sparse gradients;"
                    " use torch.optim.SparseAdam for this parameter"
                )
            params.append(param)
            grads.append(grad)
        if not params:
            return None
        kind = self.kind_of(group)
        listed = bool(group["foreach"]) and kind == "elementwise"
        split_1d = not group["decay_1d"] and group.get("weight_decay", 0.0) != 0.0
        signature = (
            listed, group["foreach"], group["differentiable"], group["capturable"], group["compile"],
            group["state_dtype"], group["stochastic_rounding"], split_1d, tuple(self.state_names(group)), kind,
        )  # fmt: skip
        plan = self._plans.get(index)
        if plan is not None and plan.holds(signature, params, self.state):
            plan.give(grads)
            return plan
        self._check_rounding(group)
        single = group["foreach"] is False or group["differentiable"] or kind == "tensor"
        layout = Layout(
            state=self.state_names(group),
            rowwise=kind == "rowwise",
            concatenate=not single,
            listed=listed or group["differentiable"],
            listed_devices=self.listed_devices
            if kind == "elementwise" and group["foreach"] is None and not group["compile"]
            else (),
            float32_state=group["state_dtype"] == "float32",
            step_on_device=group["capturable"],
            split_1d=split_1d,
            small=self.small,
            capacity=self.capacity,
            alone=self.alone,
            scratch=self._scratch,
        )
        plan = make_plan(signature, params, self.state, layout)
        plan.give(grads)
        self._plans[index] = plan
        return plan

    def _check_rounding(self, group: Group) -> None:
        if not group["stochastic_rounding"]:
            return
        for index, param in enumerate(group["params"]):
            if param.grad is not None and param.dtype is not torch.bfloat16:
                raise ValueError(
                    f"stochastic_rounding needs bfloat16 parameters, got {param.dtype} for parameter {index}"
                )

    # ---- execution ----------------------------------------------------------------------------------------------

    def _update(self) -> None:
        plans = [self._plan(index, group) for index, group in enumerate(self.param_groups)]
        self._in_step = [plan for plan in plans if plan is not None]
        work: Work = [
            (group, self._with_hyper(group, plan.units))
            for group, plan in zip(self.param_groups, plans, strict=True)
            if plan is not None and plan.units
        ]
        if any(self.kind_of(group) == "global" for group, _ in work):
            self._measure_all([pair for pair in work if self.kind_of(pair[0]) == "global"])
        pool = Pool()
        for group, units in work:
            for unit, h in units:
                self._run(group, unit, h, pool)
                unit.release()

    def _with_hyper(self, group: Group, units: list[Unit]) -> list[tuple[Unit, Hyper]]:
        """Each unit with the scalars of its rule; units at the same step share them."""
        found: dict[Any, Hyper] = {}
        pairs = []
        for unit in units:
            step = unit.advance(group["capturable"])
            key = (id(unit) if group["capturable"] else step, unit.decay, unit.compute_dtype, unit.device)
            if key not in found:
                found[key] = self._hyper(group, unit, step)
            pairs.append((unit, found[key]))
        return pairs

    def _hyper(self, group: Group, unit: Unit, step: Any) -> Hyper:
        values = group if unit.decay else {**group, "weight_decay": 0.0}
        lr = group.get("lr")
        if isinstance(lr, Tensor) and not (group["capturable"] or group["differentiable"]):
            values = {**values, "lr": lr.item()}
        h = self.hyper(values, step)
        return {k: v.to(unit.compute_dtype) if isinstance(v, Tensor) else v for k, v in h.items()}

    def _run(self, group: Group, unit: Unit, h: Hyper, pool: Pool) -> None:
        """Update the parameters of a unit in place."""
        by_tensor = self.kind_of(group) == "tensor"
        if self.noisy and h["noisy"]:
            # a rule that measures first needs the noise twice, and a CUDA graph cannot set a generator back
            unit.draw(self.generator(unit.device), not (group["compile"] or (by_tensor and group["capturable"])))
        if by_tensor:
            h = {**h, **self._measure_one(group, unit, h)}
        if group["differentiable"]:
            run_differentiable(self.rule_for, group, unit, list(self.state_names(group)), h)
        elif unit.listed:
            run_list(self.rule, group, unit, list(self.state_names(group)), h)
        else:
            p, g = load(unit)
            if not (group["compile"] and self._run_compiled(group, unit, h, p, g)):
                self._run_eager(group, unit, h, pool, p, g)
            store(unit)

    def _run_compiled(self, group: Group, unit: Unit, h: Hyper, p: Tensor, g: Tensor) -> bool:
        return run_compiled(type(self), self.rule, group, unit, h, p, g)

    def _run_eager(self, group: Group, unit: Unit, h: Hyper, pool: Pool, p: Tensor, g: Tensor) -> None:
        run_in_place(self.rule, group, unit, h, self._block(p), pool, p, g)

    def generator(self, device: torch.device) -> torch.Generator:
        """The random numbers of a noisy rule."""
        raise NotImplementedError

    def _block(self, p: Tensor) -> int:
        """Rows (or elements) of a flat tensor that the eager rule works on at a time."""
        return max(1, self.block.get(p.device.type, 1 << 24) * p.shape[0] // p.numel())

    def _measure_all(self, work: Work) -> None:
        """Sum :meth:`measure` over the parameters of each group, and add what :meth:`prologue` makes of it to ``h``."""
        totals: list[Tensor] = []
        for group, units in work:
            parts = [part for unit, h in units for part in self._measured(group, unit, h)]
            totals.append(torch.stack(parts).sum(0))
        scalars = self.prologue([group for group, _ in work], totals)
        for (group, units), extra in zip(work, scalars, strict=True):
            for unit, h in units:
                h.update(self._readable(group, unit, extra))

    def _measure_one(self, group: Group, unit: Unit, h: Hyper) -> Hyper:
        """Sum :meth:`measure` over the parameter of a unit; returns what :meth:`own_scalars` makes of it."""
        generator = unit.generator
        before = generator.get_state() if generator is not None else None
        total = torch.stack(list(self._measured(group, unit, h))).sum(0)
        if generator is not None and before is not None:  # the rule needs the same noise
            generator.set_state(before)
        return self._readable(group, unit, self.own_scalars(unit.members[0].param, total, h))

    @staticmethod
    def _readable(group: Group, unit: Unit, scalars: dict[str, Tensor]) -> Hyper:
        """Scalars as numbers, which make the rule faster, where reading them does not stop a GPU or cut a graph."""
        on_host = not (group["capturable"] or group["differentiable"])
        return {
            name: value.item() if on_host and value.device.type == "cpu" else value.to(unit.compute_dtype)
            for name, value in scalars.items()
        }

    def _measured(self, group: Group, unit: Unit, h: Hyper) -> Iterator[Tensor]:
        """:meth:`measure` of a unit block by block, in float64."""
        for p, g, state in pieces(unit, list(self.state_names(group)), self._block):
            yield self.measure(p, -g if group["maximize"] else g, state, h).to(wide_dtype(unit.device))


def _with_scalar_lr(group: Group) -> None:
    """Let a learning rate that is a tensor of one element have no dimensions: a view, as a scheduler may hold it."""
    lr = group.get("lr")
    if isinstance(lr, Tensor) and lr.ndim:
        group["lr"] = lr.reshape(())


def _own(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
