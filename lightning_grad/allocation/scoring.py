"""Score norms of generated samples, by the means a sampling model offers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_grad.data.rollouts import RolloutBatch
from lightning_grad.statistics.head_norm import HeadNormMethod, head_grad_norm, head_grad_sketch

GradNorm = Literal["head", "token", "full", "module", "none"]
_CHUNK_BYTES = 256 * 2**20
_FIRST_CHUNK = 64


def needed_method(kind: GradNorm) -> str | None:
    """The method a module must have for a kind of score norm."""
    return {"module": "sample_scores", "none": None}.get(kind, "hidden_and_logits")


def score_norms(
    module: Any,
    rollouts: RolloutBatch,
    wanted: Tensor,
    kind: GradNorm,
    params: tuple[str, ...] | None = None,
    sketch_dim: int = 0,
) -> tuple[Tensor, Tensor]:
    """Norms of the wanted samples, float64 ``[n]``, and sketches of their scores ``[n, sketch_dim]``, on the CPU.

    Both are NaN for the other samples.

    Args:
        module: Has the method :func:`needed_method` names.
        rollouts: The samples.
        wanted: bool ``[n]``.
        kind: ``"head"`` the output head's gradient, without a backward pass; ``"token"`` its forward-only proxy;
            ``"full"`` the gradient of ``params`` by one backward pass per sample; ``"module"`` whatever
            ``sample_scores`` says; ``"none"`` 1 for all.
        params: Names of the parameters for ``"full"``; ``None``: all that are trained.
        sketch_dim: Length of the sketches, for ``"head"``; 0: none.
    """
    norms = torch.full((len(rollouts),), torch.nan, dtype=torch.float64)
    sketches = torch.full((len(rollouts), sketch_dim), torch.nan)
    rows = wanted.nonzero()[:, 0]
    if not len(rows):
        return norms, sketches
    if kind == "none":
        norms[rows] = 1.0
    elif kind == "module":
        norms[rows] = module.sample_scores(rollouts.rows(rows)).detach().double().cpu()
    elif kind == "full":
        chosen = _parameters(module, params)
        norms[rows] = torch.tensor([_full(module, rollouts.rows(row[None]), chosen) for row in rows]).double()
    else:
        parts = list(_by_head(module, rollouts.rows(rows), kind, sketch_dim))
        norms[rows] = torch.cat([part[0] for part in parts])
        if sketch_dim:
            sketches[rows] = torch.cat([part[1] for part in parts])
    return norms, sketches


@torch.no_grad()
def _by_head(module: Any, rollouts: RolloutBatch, kind: GradNorm, sketch_dim: int) -> Iterator[tuple[Tensor, Tensor]]:
    length, vocabulary = rollouts.completion_ids.shape[1], getattr(module, "vocab_size", None)
    bias = getattr(module, "head_bias", False)
    start, size = 0, _FIRST_CHUNK if vocabulary is None else _chunk(length, vocabulary)
    while start < len(rollouts):
        part = rollouts.rows(slice(start, start + size))
        hidden, logits = module.hidden_and_logits(part)
        start += size
        # the vocabulary is known only now
        size = _chunk(logits.shape[1], logits.shape[2])
        samples = hidden, logits, part.completion_ids.to(logits.device), part.completion_mask.to(logits.device)
        method: HeadNormMethod = "token" if kind == "token" else "auto"
        norms = head_grad_norm(*samples, bias=bias, method=method, generator=torch.Generator().manual_seed(0))
        sketches = norms[:, None]
        if sketch_dim:
            same = torch.Generator().manual_seed(1)  # for all samples of all processes
            sketches = head_grad_sketch(*samples, bias=bias, dim=sketch_dim, generator=same)
        yield norms.double().cpu(), sketches.float().cpu()


def _chunk(length: int, vocabulary: int) -> int:
    return max(1, _CHUNK_BYTES // (4 * length * vocabulary))


def _parameters(module: Any, names: tuple[str, ...] | None) -> list[Tensor]:
    known = dict(module.named_parameters())
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise ValueError(
            f"`grad_norm_params` names {unknown[0]!r}, which {type(module).__name__} does not have; its parameters are"
            f" {', '.join(list(known)[:5])}{' and others' if len(known) > 5 else ''}."
        )
    return [p for name, p in known.items() if p.requires_grad and (names is None or name in names)]


def _full(module: Any, sample: RolloutBatch, parameters: list[Tensor]) -> float:
    with torch.enable_grad():
        logits = module.hidden_and_logits(sample)[1]
        if not logits.requires_grad:
            raise RuntimeError("grad_norm='full' needs hidden_and_logits() to keep the graph: no no_grad() inside it.")
        logp = torch.log_softmax(logits.float(), -1)
        ids, mask = sample.completion_ids.to(logits.device), sample.completion_mask.to(logits.device)
        total = (logp.gather(-1, ids[..., None])[..., 0] * mask).sum()
        grads = torch.autograd.grad(total, parameters, allow_unused=True)
    return float(torch.stack([g.double().square().sum() for g in grads if g is not None]).sum().sqrt())
