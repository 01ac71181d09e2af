"""The ways to run a rule on a unit: in place, on lists, through autograd, and compiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from lightning_grad.optim._buckets import Unit
from lightning_grad.optim._math import Buffer, Pool, TensorList, stochastic_round

Hyper = dict[str, Any]
State = dict[str, Any]
Group = dict[str, Any]
Rule = Callable[[Any, Any, State, Hyper], tuple[Any, State]]

# One compiled callable per rule, dtype, device type and set of switches; None after a failure.
_compiled: dict[tuple[Any, ...], Callable[..., None] | None] = {}


def real_view(value: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones; other tensors as they are."""
    return torch.view_as_real(value) if value.is_complex() else value


def load(unit: Unit) -> tuple[Tensor, Tensor]:
    """Flat values and gradients of a unit; gathered units are copied into scratch, others are views."""
    if unit.scratch is not None:
        torch._foreach_copy_(unit.views, unit.params)
        torch._foreach_copy_(unit.grad_views, unit.grads)
        return unit.scratch
    value, grad = unit.params[0], unit.grads[0]
    if grad.stride() != value.stride():
        grad = torch.empty_like(value).copy_(grad)
    return cast(Tensor, unit.value), grad.as_strided((grad.numel(),), (1,)).view(unit.shape)


def store(unit: Unit) -> None:
    """Write the values of a gathered unit back to its parameters."""
    if unit.scratch is not None:
        torch._foreach_copy_(unit.params, unit.views)


def blocks(tensor: Tensor, size: int) -> tuple[Tensor, ...]:
    """Pieces of at most ``size`` along the first dimension."""
    return (tensor,) if tensor.shape[0] <= size else tensor.split(size)


def pieces(
    unit: Unit, names: list[str], block: Callable[[Tensor], int]
) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """Values, gradients and states of a unit, block by block, in the dtype of computation.

    Args:
        unit: The unit.
        names: Of the states.
        block: Elements (or rows) of a block of a flat tensor.
    """
    dtype = unit.compute_dtype
    if unit.listed:
        for index, (member, grad) in enumerate(zip(unit.members, unit.grads, strict=True)):
            state = {name: real_view(member.state[name]).to(dtype) for name in names}
            noise = {"noise": unit.noise[index]} if unit.noise else {}
            yield real_view(member.param).clone().to(dtype), grad.to(dtype), {**state, **noise}
        return
    p, g = load(unit)
    size, inputs = block(p), unit.inputs()
    for pb, gb, *states in zip(*(blocks(t, size) for t in (p, g, *inputs.values())), strict=True):
        state = {name: t.to(dtype) for name, t in zip(inputs, states, strict=True)}
        if unit.generator is not None:
            state["noise"] = torch.empty_like(pb, dtype=dtype).normal_(generator=unit.generator)
        yield pb.to(dtype), gb.to(dtype), state


def run_in_place(
    rule: Rule, group: Group, unit: Unit, h: Hyper, size: int, pool: Pool, p: Tensor, g: Tensor,
    extra: dict[str, Tensor] | None = None,
) -> None:  # fmt: skip
    """Run the rule block by block on the tensors themselves, or on copies in the dtype of computation.

    Args:
        rule: The rule.
        group: The parameter group.
        unit: The unit.
        h: Scalars of the rule.
        size: Elements (or rows) of a block.
        pool: Temporaries, used again for each block.
        p: Values, from :func:`load`.
        g: Gradients, from :func:`load`.
        extra: More states, which the rule only reads.
    """
    inputs, dtype = {**unit.inputs(), **(extra or {})}, unit.compute_dtype
    names = list(inputs)
    for pb, gb, *states in zip(*(blocks(t, size) for t in (p, g, *inputs.values())), strict=True):
        pool.reset()
        gradient = signed(gb.to(dtype), group, pool)
        state = {name: Buffer(t.to(dtype), pool=pool) for name, t in zip(names, states, strict=True)}
        value = Buffer(pb.to(dtype), pool=pool, own=True)
        if unit.generator is not None:
            state["noise"] = Buffer(pool.take(value.tensor).normal_(generator=unit.generator), pool=pool)
        new_p, new_s = rule(value, gradient, state, h)
        write(pb, new_p.tensor, group["stochastic_rounding"])
        for name, t in zip(names, states, strict=True):
            if name in new_s:
                write(t, new_s[name].tensor)


def signed(gradient: Tensor, group: Group, pool: Pool) -> Buffer:
    """The gradient to descend along."""
    return Buffer((-Buffer(gradient, pool=pool)).tensor if group["maximize"] else gradient, pool=pool)


def write(target: Tensor, value: Tensor, rounding: bool = False) -> None:
    """Copy a result to where it belongs, unless it was computed there."""
    if rounding:
        value = stochastic_round(value)
    if value is not target:
        target.copy_(value)


def run_list(rule: Rule, group: Group, unit: Unit, names: list[str], h: Hyper) -> None:
    """Run the rule once on lists of tensors."""
    dtype = unit.compute_dtype
    states = {name: [real_view(member.state[name]) for member in unit.members] for name in names}
    p, g = (TensorList([t.to(dtype) for t in tensors]) for tensors in (unit.params, unit.grads))
    s: State = {name: TensorList([t.to(dtype) for t in tensors]) for name, tensors in states.items()}
    if unit.noise:
        s["noise"] = TensorList(unit.noise)
    new_p, new_s = rule(p, -g if group["maximize"] else g, s, h)
    values = [stochastic_round(t) for t in new_p.items] if group["stochastic_rounding"] else new_p.items
    torch._foreach_copy_(unit.params, values)
    for name, value in new_s.items():
        torch._foreach_copy_(states[name], value.items)


def run_differentiable(
    rule_for: Callable[[Tensor, Hyper], Rule], group: Group, unit: Unit, names: list[str], h: Hyper
) -> None:
    """Run the rule on one parameter under autograd; states are replaced, so that the graph outlives the next step."""
    (member,), (grad,), dtype = unit.members, unit.grads, unit.compute_dtype
    g = grad.to(dtype)
    s = {name: real_view(member.state[name]).to(dtype) for name in names}
    if unit.noise:
        s["noise"] = unit.noise[0]
    # a copy: the graph must not see the in-place change below
    p = real_view(member.param).clone().to(dtype)
    new_p, new_s = rule_for(member.param, h)(p, -g if group["maximize"] else g, s, h)
    new_p = stochastic_round(new_p) if group["stochastic_rounding"] else new_p
    member.param.copy_(torch.view_as_complex(new_p) if unit.is_complex else new_p)
    for name, value in new_s.items():
        value = torch.view_as_complex(value) if unit.is_complex else value
        member.state[name] = value.to(member.state[name].dtype)


def run_compiled(
    owner: type, rule: Rule, group: Group, unit: Unit, h: Hyper, p: Tensor, g: Tensor,
    extra: dict[str, Tensor] | None = None, stage: str = "",
) -> bool:  # fmt: skip
    """Run the compiled rule on the whole unit; ``False`` if it cannot be compiled, now or before.

    Args:
        owner: The optimizer's class; one callable is kept per class, dtype, device type and set of flags.
        rule: The rule.
        group: The parameter group.
        unit: The unit.
        h: Scalars of the rule; numbers become tensors so that a schedule does not compile again.
        p: Values, from :func:`load`.
        g: Gradients, from :func:`load`.
        extra: More states of the rule, of a shape of their own.
        stage: Tells the rules of a class that has several from each other.
    """
    inputs = {**unit.inputs(), **(extra or {})}
    names, tensors, dtype = tuple(inputs), list(inputs.values()), unit.compute_dtype
    if p.shape != unit.shape:
        tensors = [t.view(p.shape) if t.shape == unit.shape else t for t in tensors]
    if "packed" not in h:
        h["packed"] = _pack(h, dtype, p.device)
    flags, scalars, packed = h["packed"]
    maximize, rounding = group["maximize"], group["stochastic_rounding"]
    key = (owner, stage, dtype, p.device.type, names, flags, scalars, maximize, rounding, p.ndim, len(unit.rows))
    if key not in _compiled:
        _compiled[key] = _compile(rule, names, dtype, dict(flags), scalars, maximize, rounding)
    update = _compiled[key]
    if update is None:
        return False
    try:
        update(p, g, tensors, packed, unit.rows)
    except Exception as error:
        _compiled[key] = None
        reason = (str(error).splitlines() or [""])[0]
        warnings.warn(
            f"{owner.__name__}: torch.compile failed ({type(error).__name__}: {reason}); continuing without it",
            stacklevel=5,
        )
        return False
    return True


def _pack(h: Hyper, dtype: torch.dtype, device: torch.device) -> tuple[Any, tuple[str, ...], Tensor]:
    """The flags, the names of the scalars, and the scalars as one tensor: once for all units that share ``h``."""
    flags = tuple((k, v) for k, v in h.items() if isinstance(v, bool))
    scalars = tuple(k for k, v in h.items() if not isinstance(v, bool))
    values = [h[k] for k in scalars]
    if any(isinstance(v, Tensor) for v in values):
        return flags, scalars, torch.stack([torch.as_tensor(v, dtype=dtype, device=device) for v in values])
    return flags, scalars, torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def _compile(
    rule: Rule, names: tuple[str, ...], dtype: torch.dtype, flags: Hyper, scalars: tuple[str, ...], maximize: bool,
    rounding: bool,
) -> Callable[..., None]:  # fmt: skip
    def update(p: Tensor, g: Tensor, tensors: list[Tensor], packed: Tensor, rows: tuple[Tensor, ...]) -> None:
        h = {**flags, **dict(zip(scalars, packed.unbind(0), strict=True)), "rows": rows}
        g = g.to(dtype)
        state = {name: tensor.to(dtype) for name, tensor in zip(names, tensors, strict=True)}
        new_p, new_s = rule(p.to(dtype), -g if maximize else g, state, h)
        if new_p is not None:
            p.copy_(stochastic_round(new_p) if rounding else new_p)
        for name, tensor in zip(names, tensors, strict=True):
            if name in new_s:
                tensor.copy_(new_s[name])

    # The compiler files its results, and counts recompilations, under the code object: each rule needs its own.
    update.__code__ = update.__code__.replace(co_name=f"update_{len(_compiled)}")
    compiled: Callable[..., None] = torch.compile(update, dynamic=True, fullgraph=True)
    return compiled
