"""Removing the radial part of the update of scale-invariant weights: the step that AdamP and SGDP share.

A weight ``p`` of shape (R, ...) is seen as R rows of C numbers. It counts as scale invariant if its gradient ``g`` is
nearly orthogonal to it: row by row ("channel"), or as a whole ("layer"). Then the part of the update ``u`` along the
row (or along the whole weight) is removed, and the weight decay multiplied by ``wd_ratio``.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lightning_grad.optim._base import RuleOptimizer
from lightning_grad.optim._buckets import Unit
from lightning_grad.optim._checks import FRACTION, NON_NEGATIVE
from lightning_grad.optim._executors import Group, Hyper, Rule, State, blocks, run_compiled, run_in_place, signed, write
from lightning_grad.optim._math import Buffer, Pool, axpy


class RowSums(NamedTuple):
    """Sums over each row, of shape (R,)."""

    pg: Tensor
    gg: Tensor
    pp: Tensor
    pu: Tensor


class ProjectedOptimizer(RuleOptimizer):
    """An optimizer ``p <- p * (1 - decay * q) - step_size * project(u)``, ``u`` from the gradient and the state.

    A subclass supplies :meth:`advance` and :meth:`direction`, and in ``h``: ``step_size``, ``decay``, ``eps_row``,
    ``delta``, ``wd_ratio`` and the flag ``projects``.
    """

    kind = "rowwise"
    allowed: ClassVar = {"delta": NON_NEGATIVE, "wd_ratio": FRACTION}

    @staticmethod
    def advance(g: Any, s: State, h: Hyper) -> State:
        """The new state."""
        raise NotImplementedError

    @staticmethod
    def direction(g: Any, s: State, h: Hyper) -> Any:
        """The update ``u`` from the gradient and the new state."""
        raise NotImplementedError

    @classmethod
    def move(cls, g: Any, s: State, h: Hyper) -> tuple[State, Any]:
        """The new state and the update ``u``."""
        new_s = cls.advance(g, s, h)
        return new_s, cls.direction(g, {**s, **new_s}, h)

    @classmethod
    def _plain(cls, p: Tensor, g: Tensor, s: State, h: Hyper) -> tuple[Tensor, State]:
        """Without projection: vectors, and ``delta=0``."""
        new_s, u = cls.move(g, s, h)
        return axpy(p * (1.0 - h["decay"]), u, -h["step_size"]), new_s

    @classmethod
    def _projected(cls, p: Tensor, g: Tensor, s: State, h: Hyper) -> tuple[Tensor, State]:
        """With projection, for rows ``p`` (R, C) of one tensor, or of several if ``h["rows"]`` tells which."""
        new_s, u = cls.move(g, s, h)
        keep = cls._factor(p, g, u, h)
        return axpy(p * keep[:, None], u, -h["step_size"]), new_s

    @classmethod
    def _first_pass(cls, p: Tensor, g: Tensor, s: State, h: Hyper) -> tuple[None, State]:
        """State and row factors."""
        state = {name: value for name, value in s.items() if name != "keep"}
        new_s, u = cls.move(g, state, h)
        return None, {**new_s, "keep": cls._factor(p, g, u, h)}

    @classmethod
    def _second_pass(cls, p: Tensor, g: Tensor, s: State, h: Hyper) -> tuple[Tensor, State]:
        """Parameters from the new state and the row factors."""
        keep = s["keep"].view(-1, *(1 for _ in p.shape[1:]))
        return axpy(p * keep, cls.direction(g, s, h), -h["step_size"]), {}

    @staticmethod
    def _factor(p: Tensor, g: Tensor, u: Tensor, h: Hyper) -> Tensor:
        row = tuple(range(1, p.ndim))
        sums = RowSums((p * g).sum(row), (g * g).sum(row), (p * p).sum(row), (p * u).sum(row))
        return row_factor(sums, p.numel() // p.shape[0], h)

    @override
    def _run_compiled(self, group: Group, unit: Unit, h: Hyper, p: Tensor, g: Tensor) -> bool:
        """In two calls: in one, the compiler would work out the row factor again for every element of the row."""
        cls = type(self)
        if not h["projects"] or len(unit.shape) == 1:
            return run_compiled(cls, self._plain, group, unit, h, p.view(-1), g.view(-1))
        extra = {"keep": torch.empty(p.shape[0], dtype=unit.compute_dtype, device=p.device)}
        if not run_compiled(cls, self._first_pass, group, unit, h, p, g, extra, "first"):
            return False
        if not run_compiled(cls, self._second_pass, group, unit, h, p, g, extra, "second"):
            gradient = -g.to(unit.compute_dtype) if group["maximize"] else g.to(unit.compute_dtype)
            state = {name: t.to(unit.compute_dtype) for name, t in {**unit.state, **extra}.items()}
            write(p, self._second_pass(p.to(unit.compute_dtype), gradient, state, h)[0], group["stochastic_rounding"])
        return True

    @override
    def rule_for(self, param: Tensor, h: Hyper) -> Rule:
        if param.ndim < 2 or not h["projects"]:
            return self._plain

        def rule(p: Tensor, g: Tensor, s: State, h: Hyper) -> tuple[Tensor, State]:
            flat = {name: value.flatten(1) for name, value in s.items()}
            new_p, new_s = self._projected(p.flatten(1), g.flatten(1), flat, {**h, "rows": ()})
            return new_p.view(p.shape), {name: value.view(p.shape) for name, value in new_s.items()}

        return rule

    @override
    def _run_eager(self, group: Group, unit: Unit, h: Hyper, pool: Pool, p: Tensor, g: Tensor) -> None:
        plain = not h["projects"] or len(unit.shape) == 1
        if plain or not (p.device.type == "cpu" and len(unit.members) == 1 and not group["capturable"]):
            run = self._run_plain if plain else self._run_many
            run(group, unit, h, pool, p, g)
            return
        # where a number is read at no cost, the test comes first, and most weights need nothing more
        channel, layer, norms = self._test(unit, h, pool, p, g)
        if channel:
            h = {**h, "decay": h["decay"] * h["wd_ratio"]}
            run_in_place(self._along_rows, group, unit, h, self._block(p), pool, p, g, {"norm": norms})
        else:
            run = self._run_many if layer else self._run_plain
            run(group, unit, h, pool, p, g)

    def _run_plain(self, group: Group, unit: Unit, h: Hyper, pool: Pool, p: Tensor, g: Tensor) -> None:
        run_in_place(self._plain, group, unit, h, self._block(p), pool, p, g)

    def _test(self, unit: Unit, h: Hyper, pool: Pool, p: Tensor, g: Tensor) -> tuple[bool, bool, Tensor]:
        """Whether a weight counts as scale invariant by its rows or as a whole, and the norms of its rows."""
        dtype, size = unit.compute_dtype, self._block(p)
        columns = []
        for pb, gb in zip(blocks(p, size), blocks(g, size), strict=True):
            pool.reset()
            value, gradient = pb.to(dtype), gb.to(dtype)
            norms = (torch.linalg.vector_norm(t, dim=1) for t in (gradient, value))
            columns.append((_row_dots(value, gradient, pool), *norms))
        pg, norm_g, norm_p = (torch.cat(c) for c in zip(*columns, strict=True)) if len(columns) > 1 else columns[0]
        low, delta = max(h["eps_row"], torch.finfo(dtype).tiny), h["delta"]
        cosine = pg.abs().div_(norm_g.clamp_min(low)).div_(norm_p.clamp_min(low))
        if float(cosine.max()) < delta * p.shape[1] ** -0.5:
            return True, False, norm_p
        whole = [max(float(torch.linalg.vector_norm(norm)), low) for norm in (norm_g, norm_p)]
        return False, abs(float(pg.sum())) / whole[0] / whole[1] < delta * p.numel() ** -0.5, norm_p

    @classmethod
    def _along_rows(cls, p: Buffer, g: Buffer, s: State, h: Hyper) -> tuple[Any, State]:
        """A block of rows of a weight that is scale invariant by its rows."""
        norm, state = s["norm"].tensor, {name: value for name, value in s.items() if name != "norm"}
        new_s, u = cls.move(g, state, h)
        square = (norm + h["eps_row"]).square_().clamp_min_(torch.finfo(norm.dtype).tiny)
        keep = _row_dots(p.tensor, u.tensor, p.pool).div_(square).mul_(h["step_size"]).add_(1.0 - h["decay"])
        return axpy(p * keep[:, None], u, -h["step_size"]), new_s

    def _run_many(self, group: Group, unit: Unit, h: Hyper, pool: Pool, p: Tensor, g: Tensor) -> None:
        """Weights that share a unit, or one on a device, in two passes over blocks of rows, with no test on the host.

        First state, direction and row sums; then the parameters.
        """
        dtype, names, size = unit.compute_dtype, list(unit.state), self._block(p)
        pieces = list(zip(*(blocks(t, size) for t in (p, g, *unit.state.values())), strict=True))
        sums = []
        for pb, gb, *states in pieces:
            pool.reset()
            value, gradient = pb.to(dtype), signed(gb.to(dtype), group, pool)
            state: State = {name: Buffer(t.to(dtype), pool) for name, t in zip(names, states, strict=True)}
            new_s, u = self.move(gradient, state, h)
            for name, t in zip(names, states, strict=True):
                write(t, {**state, **new_s}[name].tensor)
            products = [(value, gradient.tensor), (gradient.tensor,) * 2, (value, value), (value, u.tensor)]
            sums.append(RowSums(*(_row_dots(a, b, pool) for a, b in products)))
        whole = RowSums(*(torch.cat(column) for column in zip(*sums, strict=True))) if len(sums) > 1 else sums[0]
        factor = row_factor(whole, p.shape[1], {**h, "rows": unit.rows})[:, None]
        for (pb, gb, *states), rows in zip(pieces, factor.split(size), strict=True):
            if len(pieces) > 1:  # again, rather than a temporary of the parameter's size
                pool.reset()
                state = {name: Buffer(t.to(dtype), pool) for name, t in zip(names, states, strict=True)}
                u = self.direction(signed(gb.to(dtype), group, pool), state, h)
            new_p = axpy(Buffer(pb.to(dtype), pool, own=True) * rows, u, -h["step_size"])
            write(pb, new_p.tensor, group["stochastic_rounding"])


def _row_dots(a: Tensor, b: Tensor, pool: Pool) -> Tensor:
    """Inner product of each row of ``a`` with that of ``b``."""
    if a is b:
        norms: Tensor = torch.linalg.vector_norm(a, dim=1)
        return norms.square_()
    product: Tensor = torch.mul(a, b, out=pool.take(a))
    return product.sum(1)


def row_factor(sums: RowSums, row_length: int, h: Hyper) -> Tensor:
    """What each row of ``p`` is multiplied by: decay, and the projection of the update, which is along the row too.

    With ``u' = u - c * p`` the new weight is ``p * (1 - decay * q + step_size * c) - step_size * u``.

    Args:
        sums: Sums over each row.
        row_length: C.
        h: ``step_size``, ``decay``, ``eps_row``, ``delta``, ``wd_ratio``; ``rows``: ``()`` for rows of one tensor, else
            the tensor of each row and the number of rows of each tensor.
    """
    eps, tiny = h["eps_row"], torch.finfo(sums.pp.dtype).tiny
    row_g, row_p = sums.gg.sqrt(), sums.pp.sqrt()
    cosine = sums.pg.abs() / _at_least(row_g, eps, tiny) / _at_least(row_p, eps, tiny)
    counts: Any
    if h["rows"]:
        member, counts = h["rows"]
        stacked = torch.stack(sums, 1)
        total = torch.zeros(counts.shape[0], 4, dtype=stacked.dtype, device=stacked.device)
        total = total.index_add(0, member, stacked)
        largest = torch.zeros_like(counts).scatter_reduce(0, member, cosine, "amax")
        pg, gg, pp, pu = total.unbind(1)
    else:
        largest, counts = cosine.max(), float(cosine.shape[0])
        pg, gg, pp, pu = (column.sum() for column in sums)
    norm_g, norm_p = gg.sqrt(), pp.sqrt()
    channel = largest < h["delta"] * row_length**-0.5
    whole = pg.abs() / _at_least(norm_g, eps, tiny) / _at_least(norm_p, eps, tiny)
    layer = ~channel & (whole < h["delta"] * (counts * row_length) ** -0.5)
    along_layer = pu / (norm_p + eps).square().clamp_min(tiny)
    ones = torch.ones_like(norm_p)
    scale = 1.0 - h["decay"] * torch.where(channel | layer, ones * h["wd_ratio"], ones)
    if h["rows"]:
        channel, layer, along_layer, scale = (x[member] for x in (channel, layer, along_layer, scale))
    along_row = sums.pu / (row_p + eps).square().clamp_min(tiny)
    along: Tensor = torch.where(channel, along_row, torch.where(layer, along_layer, torch.zeros_like(along_layer)))
    step_size: Any = h["step_size"]
    return torch.add(scale, along * step_size)


def _at_least(norm: Tensor, eps: Any, tiny: float) -> Tensor:
    if isinstance(eps, Tensor):
        norm = torch.maximum(norm, eps)
        eps = 0.0
    return norm.clamp_min(max(eps, tiny))
