r"""How noisy is the gradient: the three scalars every batch-size rule needs, and the hooks that collect them.

Per-sample gradients :math:`g_i` of a batch of :math:`b` samples have the mean :math:`g` and the total variance
:math:`S = \frac{1}{b-1} \sum_i \|g_i - g\|^2`, an unbiased estimate of :math:`\mathrm{tr}\,\Sigma`. The mean of
:math:`\|g_i\|^2`, the number :math:`\|g\|^2` and the variance of :math:`\langle g_i, g\rangle` are enough for all of
them, and the means of micro-batches or of ranks serve as well as single samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_grad.statistics.pause import paused

Denominator = Literal["biased", "unbiased"]


@dataclass(frozen=True)
class GradStats:
    r"""Gradient statistics of one optimizer step, from ``n_groups`` group gradients of ``group_size`` samples each.

    The identity :math:`S = V_{ip} / \|g\|^2 + V_{or}` holds for every batch, so ``orth_var`` is derived, not measured.

    Args:
        n_groups: Number of groups :math:`n \ge 2`; with groups of one sample, the batch size.
        group_size: Samples per group :math:`q`; the mean if the groups are not equal.
        mean_sq_norm: Mean over the groups of :math:`\|g^{(j)}\|^2`.
        grad_sq_norm: :math:`\|g\|^2` of the batch gradient.
        inner_var: :math:`V_{ip}`, the variance of :math:`\langle g_i, g\rangle` over single samples, if measured.
        tensor_trace_cov: :math:`S_j` of each block (a parameter tensor, or a coordinate), if measured.
        tensor_grad_sq: :math:`\|g_j\|^2` of each block, if measured.
        loss: Mean training loss of the step, if known.
        lr: Learning rate of the first parameter group, if known.
        denominator: Which squared gradient norm :attr:`sq_norm` returns.
        population: Data-set size :math:`N`, if drawing without replacement should count; else None.
    """

    n_groups: int
    group_size: float
    mean_sq_norm: float
    grad_sq_norm: float
    inner_var: float | None = None
    tensor_trace_cov: Tensor | None = None
    tensor_grad_sq: Tensor | None = None
    loss: float | None = None
    lr: float | None = None
    denominator: Denominator = "biased"
    population: int | None = None

    @property
    def batch_size(self) -> float:
        """Samples in the batch."""
        return self.n_groups * self.group_size

    @property
    def trace_cov(self) -> float:
        r"""Total variance :math:`S`, unbiased for :math:`\mathrm{tr}\,\Sigma`; below zero only by rounding.

        One group alone has none: nan.
        """
        if self.n_groups < 2:
            return math.nan
        scale = self.group_size * self.n_groups / (self.n_groups - 1)
        return scale * (self.mean_sq_norm - self.grad_sq_norm)

    @property
    def mean_noise(self) -> float:
        r"""Noise in the batch gradient: :math:`S/b`, times :math:`1 - b/N` if ``population`` is given."""
        return self.trace_cov * self.noise_per_trace

    @property
    def noise_per_trace(self) -> float:
        r"""What :math:`S` is multiplied by to give :attr:`mean_noise`."""
        left = 1.0 if self.population is None else max(0.0, 1.0 - self.batch_size / self.population)
        return left / self.batch_size

    @property
    def orth_var(self) -> float | None:
        r"""Variance :math:`V_{or}` orthogonal to :math:`g`; None without ``inner_var`` or at a zero gradient."""
        if self.inner_var is None or self.grad_sq_norm == 0.0:
            return None
        return self.trace_cov - self.inner_var / self.grad_sq_norm

    @property
    def grad_sq_norm_unbiased(self) -> float:
        r"""Unbiased estimate of :math:`\|G\|^2` of the population gradient; may be zero or less."""
        return self.grad_sq_norm - self.mean_noise

    @property
    def noise_scale(self) -> float:
        r""":math:`B_{simple} = \mathrm{tr}\,\Sigma / \|G\|^2` in samples; infinite when no signal is left."""
        signal = self.grad_sq_norm_unbiased
        return self.trace_cov / signal if signal > 0.0 else math.inf

    @property
    def sq_norm(self) -> float:
        """The squared gradient norm a test divides by, as ``denominator`` says."""
        return self.grad_sq_norm if self.denominator == "biased" else self.grad_sq_norm_unbiased

    @property
    def tensor_sq_norm(self) -> Tensor | None:
        """The squared gradient norm of each block, as ``denominator`` says."""
        if self.denominator == "biased" or self.tensor_grad_sq is None or self.tensor_trace_cov is None:
            return self.tensor_grad_sq
        return self.tensor_grad_sq - self.tensor_trace_cov * self.noise_per_trace

    @property
    def finite(self) -> bool:
        """Whether every number in here is finite."""
        numbers = [self.trace_cov, self.grad_sq_norm]
        numbers += [value for value in (self.inner_var, self.loss, self.lr) if value is not None]
        blocks = [value for value in (self.tensor_trace_cov, self.tensor_grad_sq) if value is not None]
        return all(map(math.isfinite, numbers)) and all(bool(block.isfinite().all()) for block in blocks)

    @staticmethod
    def from_samples(grads: Tensor, blocks: Sequence[int] | None = None, **extra: Any) -> GradStats:
        """Statistics of per-sample gradients.

        Args:
            grads: Tensor ``[b, d]``, one flattened gradient a row, b >= 2.
            blocks: Sizes of the blocks the d coordinates are made of; gives the per-block statistics.
            **extra: Further fields (``loss``, ``lr``, ``denominator``, ``population``).
        """
        return GradStats.from_groups(grads, 1, blocks, **extra)

    @staticmethod
    def from_groups(
        group_grads: Tensor, group_size: float, blocks: Sequence[int] | None = None, **extra: Any
    ) -> GradStats:
        """Statistics of ``[n, d]`` group gradients, each the mean of ``group_size`` samples; see `from_samples`."""
        grads = group_grads.double()
        n = grads.shape[0]
        if n < 2:
            raise ValueError(f"`group_grads` needs at least 2 rows to show a variance, got {n}.")
        mean = grads.mean(0)
        inner = grads @ mean
        per_block: dict[str, Any] = {}
        if blocks is not None:
            spread = group_size / (n - 1) * (grads - mean).square().sum(0)
            per_block["tensor_trace_cov"] = torch.stack([part.sum() for part in spread.split(list(blocks))])
            per_block["tensor_grad_sq"] = torch.stack([part.sum() for part in mean.square().split(list(blocks))])
        return GradStats(
            n_groups=n,
            group_size=group_size,
            mean_sq_norm=float(grads.square().sum(1).mean()),
            grad_sq_norm=float(mean.square().sum()),
            inner_var=float(group_size * inner.var()),
            **per_block,
            **extra,
        )


def squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Squared Euclidean norm of each tensor, as one float64 vector on the CPU (one read of each, one transfer)."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float64)
    wide = [t if t.dtype in (torch.float32, torch.float64) else t.float() for t in tensors]
    return torch.stack([norm.double() for norm in torch._foreach_norm(wide)]).square().cpu()


class LeafGradients:
    """Squared norms of the gradient of each backward pass, by hooks on the leaf tensors.

    A hook on a leaf gets the whole gradient of one backward pass, before it is added to ``.grad`` and before any
    all-reduce: exactly the gradient of one micro-batch on one rank. By default nothing is copied and nothing but one
    scalar per tensor and pass is stored.

    Args:
        params: Named leaf tensors to watch.
    """

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self.params = dict(params)
        self._handles = [p.register_hook(self._hook(i)) for i, p in enumerate(self.params.values()) if p.requires_grad]
        self.start()
        self.active = False

    def start(self, *, elements: bool = False, copies: bool = False) -> None:
        """Forget everything and watch the coming backward passes.

        Args:
            elements: Also keep the sum of squares of each coordinate (one buffer of the size of the parameters).
            copies: Also keep the gradients themselves, for inner products (one copy of the parameters per pass).
        """
        self.active, self._elements, self._copies = True, elements, copies
        self.passes = 0
        self._norms: list[list[Tensor]] = [[] for _ in self.params]
        self._sums: list[Tensor | None] = [None] * len(self.params)
        self._kept: dict[tuple[int, int], Tensor] = {}

    def next_pass(self) -> None:
        """Say that a backward pass is complete."""
        self.passes += 1

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        def read(grad: Tensor) -> None:
            if not self.active or paused():
                return
            wide = grad if grad.dtype in (torch.float32, torch.float64) else grad.float()
            wide = wide.detach()
            # a norm reads any strides in place; flattening would copy, as a Linear's weight gradient comes transposed
            self._norms[index].append(torch.linalg.vector_norm(wide))
            if self._elements:
                total = self._sums[index]
                self._sums[index] = wide.square() if total is None else total.addcmul_(wide, wide)
            if self._copies:
                self._kept[self.passes, index] = wide.reshape(-1).clone()

        return read

    def sq_norms(self) -> Tensor:
        """Sum over the passes of the squared norm of each tensor, float64 on the CPU."""
        zero = torch.zeros((), dtype=torch.float64)
        device = next((n[0].device for n in self._norms if n), zero.device)
        sums = [torch.stack(n).double().square().sum() if n else zero.to(device) for n in self._norms]
        return torch.stack(sums).cpu() if sums else zero.reshape(1)[:0]

    def element_squares(self) -> Tensor:
        """Sum over the passes of the square of each coordinate, concatenated."""
        pairs = zip(self._sums, self.params.values(), strict=True)
        return torch.cat([(s if s is not None else torch.zeros_like(p).float()).reshape(-1) for s, p in pairs])

    def inner_products(self, direction: Sequence[Tensor | None]) -> Tensor:
        """Inner product of each pass's gradient with ``direction`` (one tensor per parameter), float64."""
        out = torch.zeros(self.passes, dtype=torch.float64)
        for (group, index), grad in self._kept.items():
            other = direction[index]
            if other is not None:
                out[group] += float(torch.dot(grad, other.detach().reshape(-1).to(grad.dtype)))
        return out

    def stop(self) -> None:
        """Stop watching and free what was kept."""
        self.start()
        self.active = False

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
