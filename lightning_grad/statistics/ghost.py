"""Per-sample gradient norms without per-sample gradients, from what a layer saw and what came back.

The gradient of sample i with respect to a layer's weight is a sum of outer products of the layer's inputs ``a`` and
its output gradients ``d``. Its norm, and its inner product with any direction, follow from ``a`` and ``d`` alone
(Goodfellow 2015; Li et al. 2022; the choice between the Gram and the direct form is that of Bu et al. 2022).

Every rule takes ``a`` and ``d`` as ``[samples, positions, features]`` and works on the *contribution* of a sample to
the gradient that the backward pass computes. For a loss that is a mean over b samples the gradient of a sample is b
times that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_grad.statistics.pause import paused

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_NORMS: tuple[type[nn.Module], ...] = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, *_BATCH_NORMS)
_RULED: tuple[type[nn.Module], ...] = (nn.Linear, *_CONVS, nn.Embedding, *_NORMS)


class UnsupportedLayerError(RuntimeError):
    """A parameter for which no per-sample norm can be told from one backward pass; the text says which and why."""


def _is_ruled(module: nn.Module) -> bool:
    if isinstance(module, nn.Embedding) and (module.sparse or module.scale_grad_by_freq or module.max_norm is not None):
        return False
    # a subclass with another forward is another function, and reparametrised weights are not leaves
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in _RULED)


def unsupported(model: nn.Module, names: Iterable[str] | None = None) -> list[str]:
    """Names of the trainable parameters that no rule covers (tied ones included), among ``names`` if given."""
    wanted = None if names is None else set(names)
    owners: dict[int, int] = {}
    bad: list[str] = []
    for name, module in model.named_modules():
        for leaf, param in module.named_parameters(recurse=False):
            full = f"{name}.{leaf}" if name else leaf
            if not param.requires_grad:
                continue
            owners[id(param)] = owners.get(id(param), 0) + 1
            if (owners[id(param)] > 1 or not _is_ruled(module)) and (wanted is None or full in wanted):
                bad.append(full)
    first_name = {id(p): n for n, p in model.named_parameters()}
    tied = [first_name[key] for key, count in owners.items() if count > 1]
    return list(dict.fromkeys(bad + [name for name in tied if wanted is None or name in wanted]))


def is_norm_layer(module: nn.Module) -> bool:
    """Whether the module is a normalisation layer whose weight the rules cover."""
    return isinstance(module, _NORMS) and _is_ruled(module)


def _chunks(samples: int, floats_each: int, memory_mb: float) -> int:
    return max(1, min(samples, int(memory_mb * 2**20 / (4 * max(1, floats_each)))))


def outer_sq_norms(a: Tensor, d: Tensor, memory_mb: float = 256.0) -> Tensor:
    """Squared Frobenius norm of ``d_i' a_i`` for each sample; ``a`` is ``[b, T, p]``, ``d`` is ``[b, T, q]``."""
    b, positions, p = a.shape
    q = d.shape[2]
    if positions == 1:
        return a.square().sum((1, 2)) * d.square().sum((1, 2))
    gram = 2 * positions * positions < p * q
    step = _chunks(b, 2 * positions * positions if gram else p * q, memory_mb)
    parts = []
    for i in range(0, b, step):
        ai, di = a[i : i + step], d[i : i + step]
        if gram:
            parts.append(((ai @ ai.mT) * (di @ di.mT)).sum((1, 2)))
        else:
            parts.append((di.mT @ ai).square().sum((1, 2)))
    return torch.cat(parts)


def outer_inner(a: Tensor, d: Tensor, direction: Tensor) -> Tensor:
    """Inner product of ``d_i' a_i`` with ``direction`` ``[q, p]`` for each sample."""
    return ((d @ direction) * a).sum((1, 2))


@dataclass
class _Pair:
    """What one call of one layer left behind, in the form of the rules."""

    kind: str  # "outer", "embedding", "scale" or "bias"
    name: str
    a: Tensor | None
    d: Tensor
    groups: int = 1
    padding: int | None = None

    def sq_norms(self, memory_mb: float) -> Tensor:
        a, d = self.a, self.d
        if self.kind == "bias":
            return d.sum(1).square().sum(1)
        assert a is not None
        if self.kind == "scale":
            return (a * d).sum(1).square().sum(1)
        if self.kind == "outer":
            pairs = zip(a.chunk(self.groups, 2), d.chunk(self.groups, 2), strict=True)
            return torch.stack([outer_sq_norms(ai, di, memory_mb) for ai, di in pairs]).sum(0)
        d = self._without_padding()
        step = _chunks(len(d), 3 * d.shape[1] ** 2, memory_mb)
        parts = []
        for z, di in zip(a.split(step), d.split(step), strict=True):
            parts.append(((di @ di.mT) * (z[:, :, None] == z[:, None, :])).sum((1, 2)))
        return torch.cat(parts)

    def inner(self, direction: Tensor) -> Tensor:
        a, d = self.a, self.d
        direction = direction.to(d.dtype)
        if self.kind == "bias":
            return d.sum(1) @ direction.reshape(-1)
        assert a is not None
        if self.kind == "scale":
            return (a * d).sum(1) @ direction.reshape(-1)
        if self.kind == "outer":
            blocks = direction.reshape(d.shape[2], -1).chunk(self.groups, 0)
            parts = zip(a.chunk(self.groups, 2), d.chunk(self.groups, 2), blocks, strict=True)
            return torch.stack([outer_inner(ai, di, block) for ai, di, block in parts]).sum(0)
        return (self._without_padding() * direction[a]).sum((1, 2))

    def _without_padding(self) -> Tensor:
        if self.padding is None:
            return self.d
        assert self.a is not None
        return self.d * (self.a != self.padding)[:, :, None]


def _positions(x: Tensor, channels_first: bool = False) -> Tensor:
    """``[b, ..., f]`` (or ``[b, f, ...]``) to ``[b, T, f]``."""
    if channels_first:
        x = x.flatten(2) if x.dim() > 2 else x[:, :, None]
        return x.mT
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _unfold(module: nn.Module, x: Tensor) -> Tensor:
    """Input patches of a convolution, ``[b, T, channels * kernel]``, channels (hence groups) outermost."""
    assert isinstance(module, _CONVS)
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    else:
        x = F.pad(x, [side for p in reversed(module.padding) for side in (p, p)])
    spatial = len(module.kernel_size)
    sizes = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    for axis, (kernel, stride, dilation) in enumerate(sizes):
        # one window axis is appended per spatial axis; dilation picks every so many of its entries
        x = x.unfold(2 + axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    order = [0, *range(2, 2 + spatial), 1, *range(2 + spatial, 2 + 2 * spatial)]
    return x.permute(order).flatten(1 + spatial).flatten(1, spatial)


def _normalized(module: nn.Module, x: Tensor) -> Tensor:
    """Normalised input of a norm layer, in the layout of its input."""
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.RMSNorm):
        return F.rms_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, eps=module.eps)
    assert isinstance(module, _BATCH_NORMS)
    if module.training or module.running_mean is None:
        return F.batch_norm(x, None, None, training=True, eps=module.eps)
    return F.batch_norm(x, module.running_mean, module.running_var, training=False, eps=module.eps)


class GhostRecorder:
    """Collect per-sample squared norms (and inner products) during ordinary forward and backward passes.

    Hooks are in place while the recorder exists and return at once while it is not ``active``. With ``keep`` the inputs
    and output gradients stay until :meth:`start` or :meth:`stop`, so that :meth:`inner_products` can be asked once the
    batch gradient is complete; without it only one number per sample and parameter stays.

    Args:
        model: Module whose layers are watched.
        names: Parameters to measure; default all trainable ones.
        keep: Keep inputs and output gradients for inner products.
        memory_mb: Bound on the temporary memory of one rule.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str] | None = None,
        *,
        keep: bool = False,
        memory_mb: float = 256.0,
    ) -> None:
        wanted = {n for n, p in model.named_parameters() if p.requires_grad} if names is None else set(names)
        bad = unsupported(model, wanted)
        if bad:
            kinds = sorted({type(model.get_submodule(name.rpartition(".")[0])).__name__ for name in bad})
            raise UnsupportedLayerError(
                f"no per-sample norm rule for {', '.join(bad[:5])}{' and others' if len(bad) > 5 else ''}"
                f" ({', '.join(kinds)}): only torch's own Linear, ConvNd, Embedding and norm layers with weights"
                " that no other layer shares have one"
            )
        self.active = False
        self._keep, self._memory_mb = keep, memory_mb
        self._handles: list[RemovableHandle] = []
        self._expected: dict[str, nn.Parameter] = {}
        for prefix, module in model.named_modules():
            if not _is_ruled(module):
                continue
            named = {leaf: f"{prefix}.{leaf}" if prefix else leaf for leaf, _ in module.named_parameters(recurse=False)}
            named = {leaf: name for leaf, name in named.items() if name in wanted}
            if named:
                self._expected.update({name: getattr(module, leaf) for leaf, name in named.items()})
                self._handles.append(module.register_forward_hook(self._hook(named)))
        self.start(0)
        self.active = False

    def start(self, batch_size: int) -> None:
        """Forget everything and record the coming pass over ``batch_size`` samples."""
        self.active, self._batch_size = True, batch_size
        self._sq_norms: dict[str, Tensor] = {}
        self._pairs: list[_Pair] = []
        self._seen: set[str] = set()
        self._trouble: str | None = None

    def stop(self) -> None:
        """Stop recording and free what was kept."""
        self.start(0)
        self.active = False

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def sq_norms(self) -> dict[str, Tensor]:
        """Squared norm of each sample's contribution, ``[batch_size]`` per parameter.

        Raises:
            UnsupportedLayerError: A layer was used twice, had inputs without a batch axis, or was bypassed.
        """
        self._check()
        return self._sq_norms

    def inner_products(self, direction: Mapping[str, Tensor]) -> Tensor:
        """Inner product of each sample's contribution with ``direction`` (over the names it holds); needs ``keep``."""
        self._check()
        terms = [pair.inner(direction[pair.name]) for pair in self._pairs if pair.name in direction]
        return torch.stack(terms).sum(0) if terms else torch.zeros(self._batch_size)

    def _check(self) -> None:
        bypassed = [n for n, p in self._expected.items() if n not in self._sq_norms and p.grad is not None]
        if self._trouble is None and bypassed:
            self._trouble = f"`{bypassed[0]}` has a gradient that did not come through its layer"
        if self._trouble is not None:
            raise UnsupportedLayerError(f"{self._trouble}; its per-sample norms are unknown")

    def _hook(self, named: dict[str, str]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not self.active or paused() or not torch.is_grad_enabled() or not output.requires_grad:
                return
            first = next(iter(named.values()))
            if first in self._seen:
                # activation checkpointing runs the forward again inside backward: the first record is the right one
                if torch._C._current_graph_task_id() == -1:
                    self._trouble = f"the layer of `{first}` was used twice in one forward pass"
                return
            self._seen.add(first)
            a = args[0].detach() if args else None
            if a is None or output.shape[0] != self._batch_size or a.shape[0] != self._batch_size:
                self._trouble = (
                    f"the layer of `{first}` worked on a tensor whose first axis is not the batch of {self._batch_size}"
                )
                return
            output.register_hook(lambda d: self._record(module, named, a, d))

        return forward

    @torch.no_grad()
    def _record(self, module: nn.Module, named: dict[str, str], a: Tensor, d: Tensor) -> None:
        if not self.active:
            return
        # the backward pass runs under the autocast state of the forward: measure in full precision all the same
        with torch.autocast(d.device.type, enabled=False):
            d = d if d.dtype == torch.float64 else d.float()
            a = a if not a.is_floating_point() else a.to(d.dtype)
            for pair in self._rules(module, named, a, d):
                self._sq_norms[pair.name] = pair.sq_norms(self._memory_mb)
                if self._keep:
                    self._pairs.append(pair)

    def _rules(self, module: nn.Module, named: dict[str, str], a: Tensor, d: Tensor) -> list[_Pair]:
        pairs: list[_Pair] = []
        weight, bias = named.get("weight"), named.get("bias")
        if isinstance(module, nn.Linear):
            positions = _positions(d)
            if weight:
                pairs.append(_Pair("outer", weight, _positions(a), positions))
        elif isinstance(module, _CONVS):
            positions = _positions(d, channels_first=True)
            if weight:
                pairs.append(_Pair("outer", weight, _unfold(module, a), positions, groups=module.groups))
        elif isinstance(module, nn.Embedding):
            positions = _positions(d)
            if weight:
                index = a.reshape(len(a), -1)
                pairs.append(_Pair("embedding", weight, index, positions, padding=module.padding_idx))
        else:
            channels_first = isinstance(module, nn.GroupNorm | nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
            normalized = _normalized(module, a) if weight else None
            if not channels_first:
                width = getattr(module, weight.rpartition(".")[2] if weight else "bias").numel()
                d = d.reshape(len(d), -1, width)
                normalized = normalized.reshape(len(a), -1, width) if normalized is not None else None
            positions = _positions(d, channels_first)
            if weight:
                assert normalized is not None
                pairs.append(_Pair("scale", weight, _positions(normalized, channels_first), positions))
        if bias:
            pairs.append(_Pair("bias", bias, None, positions))
        return pairs
