"""Removing the radial part of the update of scale-invariant weights: the step that AdamP and SGDP share.

A weight ``p`` of shape (R, ...) is seen as R rows of C numbers. It counts as scale invariant if its gradient ``g`` is
nearly orthogonal to it: row by row ("channel"), or as a whole ("layer"). Then the part of the update ``u`` along the
row (or along the whole weight) is removed, and the weight decay multiplied by ``wd_ratio``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lightning_grad.optim._base import Group, Hyper, Rule, RuleOptimizer, State
from lightning_grad.optim._buckets import Unit
from lightning_grad.optim._math import axpy
from lightning_grad.optim._math import stochastic_round as rounded


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

    @staticmethod
    def advance(g: Any, s: State, h: Hyper) -> State:
        """The new state."""
        raise NotImplementedError

    @staticmethod
    def direction(g: Any, s: State, h: Hyper) -> Any:
        """The update ``u`` from the gradient and the new state."""
        raise NotImplementedError

    @classmethod
    def _plain(cls, p: Tensor, g: Tensor, s: State, h: Hyper) -> tuple[Tensor, State]:
        """Without projection: vectors, and ``delta=0``."""
        new_s = cls.advance(g, s, h)
        return axpy(p * (1.0 - h["decay"]), cls.direction(g, {**s, **new_s}, h), -h["step_size"]), new_s

    @classmethod
    def _projected(cls, p: Tensor, g: Tensor, s: State, h: Hyper) -> tuple[Tensor, State]:
        """With projection, for rows ``p`` (R, C) of one tensor, or of several if ``h["rows"]`` tells which."""
        new_s = cls.advance(g, s, h)
        u = cls.direction(g, {**s, **new_s}, h)
        sums = RowSums((p * g).sum(1), (g * g).sum(1), (p * p).sum(1), (p * u).sum(1))
        keep = row_factor(sums, p.shape[1], h)
        return axpy(p * keep[:, None], u, -h["step_size"]), new_s

    @override
    def unit_rule(self, unit: Unit) -> Rule:
        return self._projected if len(unit.shape) == 2 else self._plain

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
    def _run_eager(
        self, group: Group, unit: Unit, names: list[str], p: Tensor, g: Tensor, tensors: list[Tensor], h: Hyper
    ) -> None:
        """Two passes over blocks of rows: state and row sums, then the parameters."""
        dtype, sign = unit.compute_dtype, -1.0 if group["maximize"] else 1.0
        projects = h["projects"] and len(unit.shape) == 2
        size = self._block(p)
        blocks = list(zip(p.split(size), g.split(size), *(t.split(size) for t in tensors), strict=True))
        sums, kept = [], []
        for parts in blocks:
            pb, gb = parts[0].to(dtype), parts[1].to(dtype)
            gb = -gb if sign < 0 else gb
            new_s = self.advance(gb, {n: t.to(dtype) for n, t in zip(names, parts[2:], strict=True)}, h)
            for name, tensor in zip(names, parts[2:], strict=True):
                tensor.copy_(new_s[name])
            if len(blocks) == 1 or projects:
                u = self.direction(gb, new_s, h)
            if projects:
                sums.append(RowSums(_dot(pb, gb), _dot(gb, gb), _dot(pb, pb), _dot(pb, u)))
            if len(blocks) == 1:
                kept.append((pb, u))
        keep: Any = 1.0 - h["decay"]
        if projects:
            whole = RowSums(*(torch.cat(column) for column in zip(*sums, strict=True)))
            keep = row_factor(whole, p.shape[1], {**h, "rows": unit.rows})[:, None]
        keeps = keep.split(size) if isinstance(keep, Tensor) and keep.ndim == 2 else [keep] * len(blocks)
        for index, (parts, factor) in enumerate(zip(blocks, keeps, strict=True)):
            if kept:
                pb, u = kept[index]
            else:  # again, rather than holding it for all blocks
                gb = -parts[1].to(dtype) if sign < 0 else parts[1].to(dtype)
                pb = parts[0].to(dtype)
                u = self.direction(gb, {n: t.to(dtype) for n, t in zip(names, parts[2:], strict=True)}, h)
            new_p = axpy(pb * factor, u, -h["step_size"])
            parts[0].copy_(rounded(new_p) if group["stochastic_rounding"] else new_p)


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


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)
