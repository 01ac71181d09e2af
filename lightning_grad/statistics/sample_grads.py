"""Gradients, gradient norms and directional derivatives of single samples.

``ghost`` reads them off one ordinary backward pass (:mod:`lightning_grad.statistics.ghost`); ``vmap`` differentiates
each sample by itself and works for any module; ``jvp`` gives inner products with one direction for about two forward
passes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from operator import itemgetter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_grad._validate import check_choice
from lightning_grad.statistics.ghost import GhostRecorder

LossFn = Callable[[Any, Any], Tensor]
SampleLoss = Callable[[dict[str, Tensor], Any], Tensor]

_BATCH_NORM = torch.nn.modules.batchnorm._BatchNorm


def batch_axis(batch: Any) -> int | None:
    """Length of the first axis of the first tensor in ``batch`` that has one."""
    return next((len(t) for t in flatten_batch(batch)[0] if isinstance(t, Tensor) and t.dim() > 0), None)


def flatten_batch(batch: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """Leaves of a batch, and a function that puts as many others in their places.

    It looks into what torch's pytree knows, and into any other mapping or dataclass.
    """
    nodes, spec = tree_flatten(batch)
    leaves: list[Any] = []
    makes: list[tuple[int, Callable[[Sequence[Any]], Any]]] = []
    for node in nodes:
        items = _items(node)
        if items is None:
            leaves.append(node)
            makes.append((1, itemgetter(0)))
        else:
            inner, join = flatten_batch(items)
            leaves += inner
            makes.append((len(inner), partial(_with_items, node, join)))

    def rebuild(values: Sequence[Any]) -> Any:
        rest = iter(values)
        return tree_unflatten([make(list(islice(rest, count))) for count, make in makes], spec)

    return leaves, rebuild


def _items(node: Any) -> dict[Any, Any] | None:
    if isinstance(node, Mapping):
        return dict(node)
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
    return None


def _with_items(node: Any, join: Callable[[Sequence[Any]], dict[Any, Any]], values: Sequence[Any]) -> Any:
    new = copy.copy(node)
    for key, value in join(values).items():
        if isinstance(new, Mapping):
            new[key] = value  # type: ignore[index]
        else:
            object.__setattr__(new, key, value)  # a frozen dataclass too
    return new


def samples_in(batch: Any) -> int:
    """Samples of a batch: the length of the first axis of its first tensor.

    Raises:
        ValueError: There is no tensor with an axis.
    """
    samples = batch_axis(batch)
    if samples is None:
        raise ValueError("the batch holds no tensor with a batch axis, so its number of samples is unknown.")
    return samples


def refuse_batchnorm(model: nn.Module, allow: bool) -> None:
    """Raise if a BatchNorm in training mode would turn the gradient of a sample into that of another function."""
    if not allow and any(isinstance(m, _BATCH_NORM) and m.training for m in model.modules()):
        raise ValueError(
            "'vmap' would normalise every sample by its own statistics in a BatchNorm in training mode: the gradient of"
            " another function. Use the estimator 'micro_batch' or 'ghost'; functions that have the argument do it all"
            " the same with allow_batchnorm=True."
        )


def loss_of_model(model: nn.Module, loss_fn: LossFn) -> SampleLoss:
    """The function ``(params, (x, y)) -> loss_fn(model(x), y)`` of the model's named parameters."""

    def loss(params: dict[str, Tensor], batch: Any) -> Tensor:
        return loss_fn(functional_call(model, params, (batch[0],)), batch[1])

    return loss


@contextlib.contextmanager
def _math_attention() -> Iterator[None]:
    # the fused attention kernels have no batching rule and no forward-mode derivative
    with sdpa_kernel(SDPBackend.MATH):
        yield


def _split(
    batch: Any, samples: int, chunk: int
) -> Iterator[tuple[list[Any], list[int | None], Callable[[Sequence[Any]], Any]]]:
    """Leaves of ``batch`` cut into chunks of samples, with the axis to map over (None: the same for all samples)."""
    leaves, rebuild = flatten_batch(batch)
    axes = [0 if isinstance(t, Tensor) and t.dim() > 0 and len(t) == samples else None for t in leaves]
    for i in range(0, samples, chunk):
        yield [t[i : i + chunk] if axis == 0 else t for t, axis in zip(leaves, axes, strict=True)], axes, rebuild


def _single(
    loss: SampleLoss, axes: Sequence[int | None], rebuild: Callable[[Sequence[Any]], Any]
) -> Callable[..., Tensor]:
    def of_one(params: dict[str, Tensor], *leaves: Any) -> Tensor:
        # the loss function always sees a batch axis: here a batch of one
        ones = [t.unsqueeze(0) if axis == 0 else t for t, axis in zip(leaves, axes, strict=True)]
        return loss(params, rebuild(ones))

    return of_one


def per_sample_grads(
    loss: SampleLoss,
    params: Mapping[str, Tensor],
    batch: Any,
    *,
    chunk_size: int | None = None,
    memory_mb: float = 256.0,
) -> Iterator[dict[str, Tensor]]:
    """Gradients of each sample's own loss, a chunk of samples at a time.

    Args:
        loss: ``loss(params, batch)``, a mean over the samples of ``batch``; see :func:`loss_of_model`.
        params: Named tensors to differentiate with respect to.
        batch: Nested tensors whose first axis is the samples; anything else is passed on unchanged.
        chunk_size: Samples at a time; default as many as fit ``memory_mb``.
        memory_mb: Bound on the memory of one chunk of gradients.

    Yields:
        For each chunk, ``name -> [chunk, *shape]``.
    """
    samples = samples_in(batch)
    values = {name: p.detach() for name, p in params.items()}
    if chunk_size is None:
        floats = sum(p.numel() for p in values.values())
        chunk_size = max(1, min(samples, int(memory_mb * 2**20 / (4 * max(1, floats)))))
    for leaves, axes, rebuild in _split(batch, samples, chunk_size):
        with _math_attention():
            one = grad(_single(loss, axes, rebuild))
            yield vmap(one, in_dims=(None, *axes), randomness="different")(values, *leaves)


def per_sample_directional(
    loss: SampleLoss, params: Mapping[str, Tensor], direction: Mapping[str, Tensor], batch: Any
) -> Tensor:
    """Inner product of each sample's gradient with ``direction``, by one forward-mode derivative of the losses."""
    samples = samples_in(batch)
    leaves, axes, rebuild = next(_split(batch, samples, samples))
    values = {name: p.detach() for name, p in params.items() if name in direction}
    rest = {name: p.detach() for name, p in params.items() if name not in direction}
    tangents = {name: direction[name].detach().to(value.dtype) for name, value in values.items()}

    def losses(moving: dict[str, Tensor]) -> Tensor:
        of_one = _single(loss, axes, rebuild)
        mapped = vmap(lambda *one: of_one({**rest, **moving}, *one), in_dims=tuple(axes), randomness="different")
        out: Tensor = mapped(*leaves)
        return out

    with _math_attention():
        result: Tensor = jvp(losses, (values,), (tangents,))[1]
    return result.detach()


def _ghost(model: nn.Module, loss_fn: LossFn, x: Tensor, y: Any, keep: bool) -> GhostRecorder:
    recorder = GhostRecorder(model, keep=keep)
    try:
        params = [p for p in model.parameters() if p.requires_grad]
        recorder.start(len(x))
        torch.autograd.grad(loss_fn(model(x), y), params, allow_unused=True)
    finally:
        recorder.remove()
    return recorder


def per_sample_sq_norms(
    model: nn.Module,
    loss_fn: LossFn,
    x: Tensor,
    y: Any,
    method: Literal["ghost", "vmap"] = "ghost",
    *,
    allow_batchnorm: bool = False,
) -> Tensor:
    r"""Squared gradient norm of each sample, ``[b]``: :math:`\|g_i\|^2` with :math:`g = \frac1b \sum_i g_i`.

    Args:
        model: Called as ``model(x)``.
        loss_fn: ``loss_fn(output, y)``, a mean over the samples.
        x: Inputs, samples first.
        y: Targets, samples first.
        method: ``"ghost"`` for Linear, ConvNd, Embedding and norm layers; ``"vmap"`` for any module.
        allow_batchnorm: Let ``"vmap"`` run through a BatchNorm in training mode.

    Raises:
        ValueError: ``method`` is unknown, or BatchNorm under ``"vmap"``.
        lightning_grad.statistics.ghost.UnsupportedLayerError: ``"ghost"`` has no rule for a parameter.
    """
    check_choice("method", method, ("ghost", "vmap"))
    if method == "ghost":
        squares = _ghost(model, loss_fn, x, y, keep=False).sq_norms().values()
        return torch.stack(list(squares)).sum(0) * len(x) ** 2
    refuse_batchnorm(model, allow_batchnorm)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    parts = [
        torch.stack([g.flatten(1).square().sum(1) for g in grads.values()]).sum(0)
        for grads in per_sample_grads(loss_of_model(model, loss_fn), params, (x, y))
    ]
    return torch.cat(parts)


def per_sample_inner(
    model: nn.Module,
    loss_fn: LossFn,
    x: Tensor,
    y: Any,
    direction: Mapping[str, Tensor],
    method: Literal["ghost", "jvp"] = "ghost",
    *,
    allow_batchnorm: bool = False,
) -> Tensor:
    r"""Inner product of each sample's gradient with ``direction`` (parameter name -> tensor), ``[b]``.

    Arguments and errors as :func:`per_sample_sq_norms`; ``"jvp"`` is one forward-mode pass and works for any module.
    """
    check_choice("method", method, ("ghost", "jvp"))
    if method == "ghost":
        return _ghost(model, loss_fn, x, y, keep=True).inner_products(direction) * len(x)
    refuse_batchnorm(model, allow_batchnorm)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return per_sample_directional(loss_of_model(model, loss_fn), params, direction, (x, y))
