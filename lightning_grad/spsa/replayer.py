"""Rebuild the weights of a run from its base weights and its journal.

Steps are sequential for an element (each ends on the grid) but elements do not depend on each other: a cache-sized
range of elements goes through all records before the next one starts, so memory traffic does not grow with the number
of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_grad.spsa.engine import SPSAEngine, changes
from lightning_grad.spsa.errors import JournalError, ReplicaMismatchError
from lightning_grad.spsa.grid import CHUNK, digest_chunk
from lightning_grad.spsa.journal import Journal
from lightning_grad.spsa.kernels import Pass, Weighted
from lightning_grad.spsa.layout import Restore
from lightning_grad.spsa.rule import UpdateRule, quantize

Progress = Callable[[int, int], None]  # (done, total) in units of element ranges


@dataclass
class Plan:
    """The updates of a stretch of records, ready to be applied to any element range.

    Attributes:
        rule: The replicated state after the last record.
        updates: Per step, the weights of its pass; empty where nothing changes.
        digests: Digest after a step, where the journal has one.
        first: Step number of the first entry.
    """

    rule: UpdateRule
    first: int = 0
    updates: list[list[Weighted]] = field(default_factory=list)
    digests: dict[int, int] = field(default_factory=dict)


def make_plan(journal: Journal, upto: int | None = None, after: UpdateRule | None = None) -> Plan:
    """Go through the records without touching any weight.

    Args:
        journal: The run.
        upto: Number of records to use; ``None`` for all.
        after: State to start from; its ``step`` records are skipped. It stays as it is.

    Raises:
        UpdateOverflowError: An update is not finite or too large.
    """
    plan = Plan(after.copy() if after is not None else UpdateRule(journal.header))
    plan.first = plan.rule.step
    end = len(journal) if upto is None else min(upto, len(journal))
    for number, record in enumerate(journal):
        if number < plan.first:
            continue
        if number >= end:
            break
        quantized = quantize(plan.rule.advance(record).terms)
        plan.updates.append(changes(quantized) if quantized else [])
        if record.digest is not None:
            plan.digests[number] = record.digest
    return plan


def check_base(engine: SPSAEngine, journal: Journal) -> None:
    """Raise ``JournalError`` unless the engine started from the parameters and weights that a journal names."""
    header = journal.header
    if engine.specification != header.params:
        ours, theirs = (
            {n: (s, d) for n, s, d in engine.specification},
            {n: (s, d) for n, s, d in header.params},
        )
        wrong = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        raise JournalError(
            f"the journal trains other parameters; these differ: {', '.join(wrong[:20]) or 'their order'}."
        )
    if engine.base != header.base:
        raise JournalError(
            f"the journal starts from other weights (SHA-256 {header.base[:16]}..., these have {engine.base[:16]}...);"
            " give it those that the run started from."
        )


def replay(
    params: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    journal: Journal,
    upto: int | None = None,
    verify: bool = True,
    *,
    restore: Restore = "exact",
    kernel: str = "auto",
    progress: Progress | None = None,
) -> SPSAEngine:
    """Bring base weights, in place, to where a journal leads.

    Args:
        params: Tensors or parameters by name (a state dict, or ``named_parameters()``); those the journal names are
            used.
        journal: The run.
        upto: Number of records to use; ``None`` for all.
        verify: Whether digests in the journal are compared.
        restore: As for :class:`SPSAEngine`.
        kernel: As for :class:`SPSAEngine`.
        progress: Called with (done, total) as the work goes on.

    Returns:
        The engine that holds the result.

    Raises:
        JournalError: Names, shapes, types or base weights do not fit.
        ReplicaMismatchError: A digest differs; names the first such step.
    """
    tensors = dict(params.items() if isinstance(params, Mapping) else params)
    missing = [name for name, _, _ in journal.header.params if name not in tensors]
    if missing:
        raise JournalError(f"the base weights lack parameters of the journal: {', '.join(missing[:20])}.")
    named = [(name, _as_parameter(tensors[name])) for name, _, _ in journal.header.params]
    header = journal.header
    engine = SPSAEngine(named, seed=header.seed, eps_log2=header.eps_log2, restore=restore, kernel=kernel)
    check_base(engine, journal)
    catch_up(engine, make_plan(journal, upto), verify=verify, progress=progress)
    for name, p in named:  # a parameter made here shares the tensor's memory unless the tensor was not a plain one
        if tensors[name].data_ptr() != p.data_ptr():
            tensors[name].detach().copy_(p.detach())
    return engine


@torch.no_grad()
def catch_up(engine: SPSAEngine, plan: Plan, *, verify: bool = True, progress: Progress | None = None) -> None:
    """Apply a plan to an engine that stands at step ``plan.first``."""
    engine.restore()
    got = dict.fromkeys(plan.digests, 0)
    size = 4 * CHUNK if engine.device.type == "cpu" else 256 * CHUNK
    ranges = [(b, min(b + size, engine.layout.extent)) for b in range(0, engine.layout.extent, size)]
    stores = engine.stores
    for store in stores:
        store.open()
    try:
        for done, (start, stop) in enumerate(ranges):
            pieces = list(engine.layout.pieces(start, stop))
            for number, weights in enumerate(plan.updates, start=plan.first):
                if weights:
                    work = Pass(engine.seed, engine.eps, (), weights)
                    engine.kernel.run(engine.layout, stores, work, start, stop)
                if verify and number in got:
                    for piece in pieces:
                        chunk = stores[piece.index].load(piece.begin, piece.end, moving=True)
                        got[number] += digest_chunk(chunk, piece.virtual)
            if progress is not None:
                progress(done + 1, len(ranges))
    finally:
        for store in stores:
            store.close()
    if verify:
        for step, expected in plan.digests.items():
            found = got[step] & ((1 << 64) - 1)
            if found != expected:
                raise ReplicaMismatchError(
                    f"after step {step} the journal has digest {expected:016x}, the replay gives {found:016x}; the"
                    " weights, the records or the code differ from those of the run.",
                    step,
                    expected,
                    found,
                )


def _as_parameter(tensor: Tensor) -> torch.nn.Parameter:
    if isinstance(tensor, torch.nn.Parameter):
        tensor.requires_grad_(True)
        return tensor
    return torch.nn.Parameter(tensor.detach(), requires_grad=True)
