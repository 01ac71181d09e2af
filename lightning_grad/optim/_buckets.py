"""How the parameters of a group are laid out for a step: flat buckets, and the state as views of flat tensors.

A *unit* is what one call of an update rule works on. Small parameters of one device, dtype and step count share a unit:
their values and gradients are gathered into a scratch buffer, and each of their states is one flat tensor. A large
parameter is a unit of its own and is updated in place through a flat view.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from operator import is_
from typing import Any

import torch
from torch import Tensor

Place = tuple[torch.Size, tuple[int, ...], int]  # shape, strides, offset
WITHOUT_FLOAT64 = ("mps",)
LOW_PRECISION = (torch.float16, torch.bfloat16)


@dataclass
class Member:
    """A parameter with a gradient."""

    param: Tensor
    order: int  # among the parameters of the group that have gradients
    state: dict[str, Any]
    step: float
    real: Tensor  # the values as real numbers, outside of autograd


@dataclass
class Unit:
    """Parameters that one call of the rule updates together.

    ``state`` maps each state name to one flat tensor, or is empty if ``listed``: then the states are the members' own.
    """

    members: list[Member]
    compute_dtype: torch.dtype
    decay: bool  # weight decay applies
    steps: Tensor  # float32, one per member
    step: float
    gathered: bool
    listed: bool  # the rule gets lists of tensors
    shape: tuple[int, ...]  # of the flat tensors: (n,), or (rows, row length)
    state: dict[str, Tensor] = field(default_factory=dict)
    value: Tensor | None = None  # flat view of the parameter; None if gathered
    views: list[Tensor] = field(default_factory=list)  # gathered: places of the members in the scratch buffer
    grad_views: list[Tensor] = field(default_factory=list)
    scratch: tuple[Tensor, Tensor] | None = None
    params: list[Tensor] = field(default_factory=list)  # the members' values, as real numbers
    grads: list[Tensor] = field(default_factory=list)  # of this step
    is_complex: bool = False
    places: list[Place] = field(default_factory=list)  # of the members in flat tensors
    noise: list[Tensor] = field(default_factory=list)  # of this step
    generator: torch.Generator | None = None  # of this step: noise is to be drawn block by block
    rows: tuple[Tensor, ...] = ()  # rowwise, several members: the member of each row, and the rows of each member
    version: int = 0

    @property
    def numel(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n

    @property
    def device(self) -> torch.device:
        return self.members[0].param.device

    def release(self) -> None:
        """Forget the gradients, so that ``zero_grad(set_to_none=True)`` frees them."""
        self.grads = []
        self.noise = []
        self.generator = None

    def draw(self, generator: torch.Generator, by_block: bool) -> None:
        """Draw standard normal numbers for every member, in the order of its elements whatever its layout.

        Args:
            generator: Where from.
            by_block: If the order of the elements is that of the memory, leave it to whoever goes through the blocks.
        """
        if by_block and not (self.gathered or self.listed) and self.params[0].is_contiguous():
            self.generator = generator
            return
        shapes = [value.shape for value in self.params]
        numbers = [
            torch.randn(shape, generator=generator, dtype=self.compute_dtype, device=self.device) for shape in shapes
        ]
        if not self.listed:
            flat = torch.empty(self.numel, dtype=self.compute_dtype, device=self.device)
            for values, place in zip(numbers, self.places, strict=True):
                flat.as_strided(*place).copy_(values)
            numbers = [flat.view(self.shape)]
        self.noise = numbers

    def inputs(self) -> dict[str, Tensor]:
        """The flat tensors that the rule gets beside values and gradients."""
        return {**self.state, "noise": self.noise[0]} if self.noise else self.state

    def advance(self, capturable: bool) -> Tensor | float:
        """Count the step and return it: a number, or a 0-dim wide tensor on the device if ``capturable``."""
        self.steps.add_(1.0)
        self.version = self.steps._version
        self.step += 1.0
        return self.steps[0].to(wide_dtype(self.device)) if capturable else self.step


@dataclass
class Plan:
    """The units of a group for one set of parameters that have gradients."""

    signature: tuple[Any, ...]
    params: list[Tensor]
    states: list[dict[str, Any]]
    units: list[Unit]

    def __post_init__(self) -> None:
        self.remember()

    def remember(self) -> None:
        """Take what there is now as what must still be there at the next step."""
        self.pointers = [param.data_ptr() for param in self.params]
        # the tensors are alive as long as the plan, so an id stands for one of them
        self.entries = [value for state in self.states for value in state.values()]
        self.ids = [id(value) for value in self.entries]

    def give(self, grads: list[Tensor]) -> None:
        """Hand the units the gradients of this step, in the order of ``params``."""
        for unit in self.units:
            found = [grads[member.order] for member in unit.members]
            unit.grads = [torch.view_as_real(g.resolve_conj()) for g in found] if unit.is_complex else found

    def holds(self, signature: tuple[Any, ...], params: list[Tensor], states: Mapping[Any, Any]) -> bool:
        """Whether nothing has changed since the plan was made: parameters, their storage, and their state."""
        return (
            signature == self.signature
            and len(params) == len(self.params)
            and all(map(is_, params, self.params))
            and [param.data_ptr() for param in params] == self.pointers
            and all(map(is_, map(states.get, params), self.states))
            and [id(value) for state in self.states for value in state.values()] == self.ids
            and all(unit.steps._version == unit.version for unit in self.units)
        )


class Scratch:
    """Two buffers for each device and dtype, which all gathered units use in turn."""

    def __init__(self) -> None:
        self._pairs: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def take(self, device: torch.device, dtype: torch.dtype, numel: int) -> tuple[Tensor, Tensor]:
        """The two buffers, of at least ``numel`` elements."""
        pair = self._pairs.get((device, dtype))
        if pair is None or pair[0].numel() < numel:
            pair = (torch.empty(numel, dtype=dtype, device=device), torch.empty(numel, dtype=dtype, device=device))
            self._pairs[device, dtype] = pair
        return pair


@dataclass(frozen=True)
class Layout:
    """What decides the shape of a plan."""

    state: Mapping[str, float | None]  # name -> initial fill; None: the parameter's value
    rowwise: bool
    concatenate: bool  # parameters may share a unit
    listed: bool  # all units are lists
    listed_devices: tuple[str, ...]  # device types whose large parameters are updated as lists
    float32_state: bool
    step_on_device: bool
    split_1d: bool  # parameters with ndim <= 1 get no weight decay
    small: int  # parameters below this are gathered
    capacity: int  # elements of a gathered unit
    alone: str  # a state whose owner is not gathered with others
    scratch: Scratch


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums and scalars on a device: float64, which only MPS does not have."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def compute_dtype_of(param: Tensor) -> torch.dtype:
    """The real dtype that a parameter's update is computed in."""
    dtype = param.dtype.to_real() if param.is_complex() else param.dtype
    return torch.float32 if dtype in LOW_PRECISION else dtype


def make_plan(
    signature: tuple[Any, ...],
    params: list[Tensor],
    states: Mapping[Any, dict[str, Any]],
    layout: Layout,
) -> Plan:
    """Lay out parameters, carrying over the states they have.

    Args:
        signature: Compared by :meth:`Plan.holds`.
        params: The parameters of the group that have a gradient.
        states: The optimizer's ``state``; entries are made for new parameters, and replaced by views.
        layout: See :class:`Layout`.
    """
    members = []
    for order, param in enumerate(params):
        state = states[param]
        step = float(state["step"]) if "step" in state else 0.0
        value = param.detach()
        real = torch.view_as_real(value) if value.is_complex() else value
        members.append(Member(param, order, state, step, real))
    units = []
    for group in _split(members, layout):
        unit = _list_unit(group, layout) if _is_listed(group[0], layout) else _flat_unit(group, layout)
        device = unit.device if layout.step_on_device else torch.device("cpu")
        unit.steps = torch.full((len(group),), group[0].step, dtype=torch.float32, device=device)
        for member, count in zip(group, unit.steps.unbind(), strict=True):
            _adopt(member, "step", count)
        unit.version = unit.steps._version
        units.append(unit)
    return Plan(signature, params, [member.state for member in members], units)


def _split(members: list[Member], layout: Layout) -> list[list[Member]]:
    """Members of each unit: parameters that may share one, in order, up to the capacity."""
    groups: list[list[Member]] = []
    open_groups: dict[tuple[Any, ...], tuple[list[Member], int]] = {}
    for member in members:
        param, numel = member.param, member.real.numel()
        if numel == 0:
            continue
        listed = _is_listed(member, layout)
        row = numel // param.shape[0] if layout.rowwise and param.ndim >= 2 else 0
        key = (param.device, param.dtype, member.step, layout.split_1d and param.ndim <= 1, listed, row)
        group, filled = open_groups.get(key, ([], 0))
        if not layout.concatenate or layout.alone in member.state or (not listed and numel >= layout.small):
            groups.append([member])
        elif group and (listed or filled + numel <= layout.capacity):
            group.append(member)
            open_groups[key] = (group, filled + numel)
        else:
            groups.append([member])
            open_groups[key] = (groups[-1], numel)
    return groups


def _is_listed(member: Member, layout: Layout) -> bool:
    if layout.listed:
        return True
    return member.param.device.type in layout.listed_devices and member.real.numel() >= layout.small


def _new_unit(
    group: list[Member], layout: Layout, shape: tuple[int, ...], *, gathered: bool = False, listed: bool = False
) -> Unit:
    first = group[0]
    decay = not (layout.split_1d and first.param.ndim <= 1)
    unit = Unit(group, compute_dtype_of(first.param), decay, torch.empty(0), first.step, gathered, listed, shape)
    unit.params = [member.real for member in group]
    unit.is_complex = first.param.is_complex()
    return unit


def _flat_unit(group: list[Member], layout: Layout) -> Unit:
    first = group[0].param
    strides = [_flat_strides(member.real, layout.rowwise and first.ndim >= 2) for member in group]
    sizes = [member.real.numel() for member in group]
    total = sum(sizes)
    gathered = len(group) > 1 or strides[0] != group[0].real.stride()
    rowwise = layout.rowwise and first.ndim >= 2
    row = sizes[0] // first.shape[0] if rowwise else 0
    unit = _new_unit(group, layout, (total // row, row) if rowwise else (total,), gathered=gathered)
    offsets = accumulate(sizes[:-1], initial=0)
    unit.places = places = [(m.real.shape, s, o) for m, s, o in zip(group, strides, offsets, strict=True)]
    for name, fill in layout.state.items():
        unit.state[name] = _flat_state(unit, name, fill, places, layout).view(unit.shape)
    if rowwise and len(group) > 1:
        counts = torch.tensor([size // row for size in sizes])
        members = torch.arange(len(group)).repeat_interleave(counts)
        unit.rows = (members.to(unit.device), counts.to(unit.device, unit.compute_dtype))
    if gathered:
        value, grad = layout.scratch.take(unit.device, unit.compute_dtype, total)
        unit.scratch = (value[:total].view(unit.shape), grad[:total].view(unit.shape))
        unit.views = [value.as_strided(*place) for place in places]
        unit.grad_views = [grad.as_strided(*place) for place in places]
    else:
        unit.value = _flatten(group[0].real).view(unit.shape)
    return unit


def _flat_strides(value: Tensor, rowwise: bool) -> tuple[int, ...]:
    """Strides of a dense block with the parameter's order of dimensions; rows must be contiguous if ``rowwise``."""
    strides = torch.empty_like(value, device="meta").stride()
    if rowwise and value.shape[0] > 1 and strides[0] * value.shape[0] != value.numel():
        return torch.empty(value.shape, device="meta").stride()
    return strides


def _flatten(value: Tensor) -> Tensor:
    return value.as_strided((value.numel(),), (1,))


def _flat_state(unit: Unit, name: str, fill: float | None, places: list[Place], layout: Layout) -> Tensor:
    """One flat tensor for a state of all members, whose entries become views of it."""
    first = unit.members[0]
    dtype = torch.float32 if layout.float32_state else first.real.dtype
    old = first.state.get(name)
    if len(places) == 1 and old is not None:
        old = torch.view_as_real(old) if old.is_complex() else old
        whole = old.untyped_storage().nbytes() == old.numel() * old.element_size()
        if whole and old.dtype is dtype and old.stride() == places[0][1] and old.device == unit.device:
            return _flatten(old)
    flat = torch.full((unit.numel,), fill or 0.0, dtype=dtype, device=unit.device)
    for member, place in zip(unit.members, places, strict=True):
        view = flat.as_strided(*place)
        if fill is None:
            view.copy_(member.real)
        view = torch.view_as_complex(view) if member.param.is_complex() else view
        _adopt(member, name, view)
    return flat


def _list_unit(group: list[Member], layout: Layout) -> Unit:
    unit = _new_unit(group, layout, (sum(member.real.numel() for member in group),), listed=True)
    for member in group:
        for name, fill in layout.state.items():
            dtype = torch.float32 if layout.float32_state else member.real.dtype
            dtype = dtype.to_complex() if member.param.is_complex() else dtype
            old = member.state.get(name)
            if old is None or old.dtype is not dtype or old.device != member.param.device:
                view = torch.full_like(member.param, fill or 0.0, dtype=dtype, requires_grad=False)
                _adopt(member, name, view.copy_(member.param.detach()) if fill is None else view)
    return unit


def _adopt(member: Member, name: str, view: Tensor) -> None:
    """Make ``view`` the member's state, with the values the state has."""
    if name in member.state:
        view.copy_(member.state[name])
    member.state[name] = view
