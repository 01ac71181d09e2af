"""Collect the gradient statistics of one optimizer step, by whichever estimator fits: one object for all callers.

The caller announces a step (:meth:`NoiseCollector.begin`), each micro-batch before its forward pass and after its
backward pass, and at the end asks for :class:`GradStats`. Backward passes and all-reduces are the caller's own: the
collector only watches. Later facilities that need gradient noise use this class, not hooks of their own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_grad.statistics.ghost import GhostRecorder
from lightning_grad.statistics.gradient_noise import GradStats, LeafGradients, squared_norms
from lightning_grad.statistics.pause import recorders_paused
from lightning_grad.statistics.sample_grads import (
    SampleLoss,
    per_sample_directional,
    per_sample_grads,
    refuse_batchnorm,
)

Estimator = Literal["micro_batch", "ghost", "vmap"]
ReduceSum = Callable[[Tensor], Tensor]


class NoSampleLossError(RuntimeError):
    """The loss cannot be computed and differentiated sample by sample; the text says why."""


class NoiseCollector:
    """Statistics of the gradient of ``module`` during ordinary training steps.

    Args:
        module: The module that is trained.
        names: Parameters to measure.
        needs: What the criterion needs besides the norms: ``"inner"``, ``"tensor"``, ``"element"``.
        loss: ``loss(params, batch)`` of the named parameters, for ``"vmap"`` and for inner products over several
            micro-batches; None if there is none.
        memory_mb: Bound on the temporary memory of the per-sample estimators.
    """

    def __init__(
        self,
        module: nn.Module,
        names: Iterable[str],
        needs: frozenset[str] = frozenset(),
        loss: SampleLoss | None = None,
        memory_mb: float = 256.0,
    ) -> None:
        self.module, self.needs, self.memory_mb = module, needs, memory_mb
        self._loss = loss
        self._leaves: LeafGradients | None = None
        self._ghost: GhostRecorder | None = None
        self.estimator: Estimator | None = None
        self.seconds = 0.0
        self.watch(names)

    def watch(self, names: Iterable[str]) -> None:
        """Measure other parameters from the next step on.

        Raises:
            ValueError: None of ``names`` is trainable.
        """
        wanted = set(names)
        self.params = {n: p for n, p in self.module.named_parameters() if n in wanted and p.requires_grad}
        if not self.params:
            raise ValueError("no trainable parameter is left to measure; check `scope`.")
        self.remove()

    @property
    def collecting(self) -> bool:
        """Whether a step was begun and is not finished."""
        return self.estimator is not None

    def begin(self, estimator: Estimator) -> None:
        """Measure the coming optimizer step.

        Raises:
            UnsupportedLayerError: ``"ghost"`` has no rule for a parameter.
        """
        self.seconds, started = 0.0, time.perf_counter()
        self._sums = torch.zeros(len(self.params), dtype=torch.float64)
        self._elements: Tensor | None = None
        self._batch: Any = None
        self._batches: list[Any] = []
        self._begun = self._samples = self._groups = 0
        self._scale = 1.0
        if estimator == "micro_batch":
            if self._leaves is None:
                self._leaves = LeafGradients(self.params)
            self._leaves.start(elements="element" in self.needs, copies="inner" in self.needs)
        elif estimator == "ghost" and self._ghost is None:
            self._ghost = GhostRecorder(self.module, self.params, keep="inner" in self.needs, memory_mb=self.memory_mb)
        self.estimator = estimator
        self.seconds += time.perf_counter() - started

    def before_forward(self, batch: Any, samples: int) -> None:
        """A micro-batch of ``samples`` samples is about to go forward; it counts once it has gone backward too."""
        self._begun += 1
        self._now, self._batch = samples, batch
        if self.estimator == "ghost":
            assert self._ghost is not None
            self._ghost.start(samples)

    def after_backward(self, scale: float) -> None:
        """A backward pass is done; ``scale`` times its gradient is that of the mean loss of its micro-batch.

        Raises:
            UnsupportedLayerError: ``"ghost"`` found a layer used in a way that no rule covers.
            NoSampleLossError: ``"vmap"`` does not work with this loss.
        """
        started = time.perf_counter()
        self._groups += 1
        self._samples += self._now
        if "inner" in self.needs and self.estimator != "micro_batch":
            self._batches.append(self._batch)
        self._scale = scale
        if self.estimator == "micro_batch":
            assert self._leaves is not None
            self._leaves.next_pass()
        elif self.estimator == "ghost":
            assert self._ghost is not None
            norms = self._ghost.sq_norms()
            sums = [norms[n].double().sum().cpu() if n in norms else self._sums.new_zeros(()) for n in self.params]
            self._sums += torch.stack(sums) * (scale * self._now) ** 2
        elif self.estimator == "vmap":
            self._add_samples(self._batch)
        self.seconds += time.perf_counter() - started

    def _add_samples(self, batch: Any) -> None:
        with self._extra_pass() as loss:
            for grads in per_sample_grads(loss, self.params, batch, memory_mb=self.memory_mb):
                self._sums += torch.stack([g.double().square().sum() for g in grads.values()]).cpu()
                if "element" in self.needs:
                    flat = torch.cat([g.float().square().sum(0).reshape(-1) for g in grads.values()])
                    self._elements = flat if self._elements is None else self._elements + flat

    @contextmanager
    def _extra_pass(self) -> Iterator[SampleLoss]:
        """Compute the loss apart from training: nobody records it, and it draws no random numbers."""
        if self._loss is None:
            raise ValueError("this needs the `loss` as a function of the parameters.")
        devices = sorted({p.device.index or 0 for p in self.params.values() if p.device.type == "cuda"})
        try:
            refuse_batchnorm(self.module, allow=False)
            with recorders_paused(), torch.random.fork_rng(devices=devices):
                yield self._loss
        except Exception as error:  # the user's code under torch.func: it may raise anything
            raise NoSampleLossError(
                f"the loss cannot be differentiated sample by sample ({type(error).__name__}: {error})"
            ) from error

    def finish(
        self,
        world: int = 1,
        reduce_sum: ReduceSum = lambda x: x,
        *,
        grads: Mapping[str, Tensor | None] | None = None,
        loss: float | None = None,
        lr: float | None = None,
    ) -> GradStats | None:
        """Statistics of the step that is complete; call it on every rank, when ``.grad`` is the batch gradient.

        A micro-batch without a backward pass does not count; ``.grad`` is then the sum over the others, divided by the
        number of all. Ranks skip together, as DDP demands.

        Args:
            world: Number of ranks; each has as many micro-batches.
            reduce_sum: Sum over the ranks of a float64 CPU vector (all numbers of a test in one call).
            grads: Batch gradient by name; default each parameter's ``.grad``.
            loss: Mean loss on this rank, averaged over the ranks.
            lr: Passed on.

        Returns:
            None if no micro-batch had a backward pass.

        Raises:
            NoSampleLossError: Inner products need it, and the loss does not allow it.
        """
        started = time.perf_counter()
        assert self.estimator is not None
        grad = self._mean_grads() if grads is None else dict(grads)
        present = [g for g in grad.values() if g is not None]
        per_tensor = torch.zeros(len(self.params), dtype=torch.float64)
        has = torch.tensor([g is not None for g in grad.values()])
        per_tensor[has] = squared_norms(present)
        total_sq = float(per_tensor.sum())
        per_group = self.estimator == "micro_batch"
        if per_group:
            assert self._leaves is not None
            self._sums = self._leaves.sq_norms() * self._scale**2
        count = self._groups if per_group else self._samples
        deviations = [(p - total_sq) for p in self._inner(grad)] if "inner" in self.needs else []
        spread = sum(float(d.square().sum()) for d in deviations)
        tail = torch.tensor([float(count), float(self._samples), spread, loss or 0.0], dtype=torch.float64)
        reduced = reduce_sum(torch.cat([self._sums, tail]))
        n, samples, spread, loss_sum = int(reduced[-4]), float(reduced[-3]), float(reduced[-2]), float(reduced[-1])
        if n == 0:
            self.cancel()
            return None
        mean_sq = reduced[:-4] / n
        q = samples / n
        unbiased = q / (n - 1) if n > 1 else math.nan  # one sample, or one micro-batch, shows no variance
        blocks: tuple[Tensor | None, Tensor | None] = (None, None)
        if "element" in self.needs:
            blocks = self._element_blocks(n, unbiased * n, grad, reduce_sum)
        elif "tensor" in self.needs:
            blocks = ((mean_sq - per_tensor) * unbiased * n, per_tensor)
        stats = GradStats(
            n_groups=n,
            group_size=q,
            mean_sq_norm=float(mean_sq.sum()),
            grad_sq_norm=total_sq,
            inner_var=unbiased * spread if "inner" in self.needs else None,
            tensor_trace_cov=blocks[0],
            tensor_grad_sq=blocks[1],
            loss=None if loss is None else loss_sum / world,
            lr=lr,
        )
        self.cancel()
        self.seconds += time.perf_counter() - started
        return stats

    def _mean_grads(self) -> dict[str, Tensor | None]:
        """Mean gradient of the micro-batches that counted."""
        grads = {n: p.grad for n, p in self.params.items()}
        if self._groups in (0, self._begun):
            return grads
        return {n: None if g is None else g * (self._begun / self._groups) for n, g in grads.items()}

    def _inner(self, grad: Mapping[str, Tensor | None]) -> list[Tensor]:
        """Inner products of the groups (or samples) of this rank with the batch gradient."""
        if self.estimator == "micro_batch":
            assert self._leaves is not None
            return [self._leaves.inner_products(list(grad.values())) * self._scale]
        direction = {n: g for n, g in grad.items() if g is not None}
        if not self._groups:
            return []
        if self.estimator == "ghost" and self._begun == 1:  # the recorder keeps the last micro-batch only
            assert self._ghost is not None
            return [self._ghost.inner_products(direction).double().cpu() * self._scale * self._now]
        with self._extra_pass() as loss:
            parts = [per_sample_directional(loss, self.params, direction, batch) for batch in self._batches]
        return [part.double().cpu() for part in parts]

    def _element_blocks(
        self, n: int, scale: float, grad: Mapping[str, Tensor | None], reduce_sum: ReduceSum
    ) -> tuple[Tensor, Tensor]:
        if self.estimator == "micro_batch":
            assert self._leaves is not None
            squares = self._leaves.element_squares() * self._scale**2
        else:
            assert self._elements is not None
            squares = self._elements
        pairs = zip(grad.values(), self.params.values(), strict=True)
        mean = torch.cat([(g if g is not None else torch.zeros_like(p)).reshape(-1).double().cpu() for g, p in pairs])
        squares = reduce_sum(squares.double().cpu()) / n
        return (squares - mean.square()) * scale, mean.square()

    def cancel(self) -> None:
        """Give up the present step and free what it kept."""
        self.estimator = None
        self._batches, self._batch, self._elements = [], None, None
        if self._leaves is not None:
            self._leaves.stop()
        if self._ghost is not None:
            self._ghost.stop()

    def remove(self) -> None:
        """Take all hooks off."""
        for hooks in (self._leaves, self._ghost):
            if hooks is not None:
                hooks.remove()
        self._leaves = self._ghost = None
