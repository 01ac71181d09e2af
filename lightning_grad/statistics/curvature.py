r"""Hessian-vector products of a loss, the one facility under every curvature method.

:class:`HessianOperator` is a symmetric linear map ``v -> H v`` on flat vectors. Lanczos, traces and norms are functions
of any such map: :mod:`lightning_grad.statistics.curvature_lanczos`, :mod:`lightning_grad.statistics.curvature_trace`.

Two ways to a product:

- ``autograd``: differentiate the gradient. Exact. The graph is built once and kept for all products, so that dropout
  masks stay the same. Attention runs on its mathematical backend, the only one with a second derivative.
- ``finite_difference``: :math:`(g(w + e v) - g(w - e v)) / 2e`, :math:`e = \epsilon^{1/3} (1 + \|w\|) / \|v\|`, both
  gradients from the same random state. Works where a second derivative does not exist. Relative error about 1e-4 in
  float32, 2e-10 in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, Literal, Protocol, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_grad._validate import check_choice

Mode = Literal["autograd", "finite_difference", "auto"]
_T = TypeVar("_T")


class MatVec(Protocol):
    """A symmetric linear map on flat vectors."""

    def __call__(self, vector: Tensor, /) -> Tensor:
        """Return the product with ``vector``."""
        ...


class HessianOperator:
    r"""The Hessian of ``loss()`` with respect to ``params`` as a map ``v -> H v`` on flat vectors of ``size`` entries.

    Used as a context manager: on leaving, the graph is dropped and everything that evaluating the loss changed is as
    before: weights, buffers (running statistics), random states. ``.grad`` is never touched.

    Args:
        loss: Returns the scalar loss; called once (``autograd``) or twice per product (``finite_difference``).
        params: Leaf tensors, real, dense, float32 or float64, all on one device.
        mode: ``"auto"`` takes ``autograd`` and falls back where a second derivative is not implemented.
        module: Its buffers are restored.
        reduce: Applied to every flat gradient and product, e.g. the mean over processes.
        scale: Diagonal :math:`D` as a flat vector: the operator is then :math:`D H D`.

    Attributes:
        size: Number of entries.
        mode: What is in use; ``"auto"`` until the first product.
        num_products: Products computed.

    Raises:
        ValueError: No parameters, or one that is complex, sparse, of low precision or without gradient.
    """

    def __init__(
        self,
        loss: Callable[[], Tensor],
        params: Sequence[Tensor],
        mode: Mode = "auto",
        *,
        module: nn.Module | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
        scale: Tensor | None = None,
    ) -> None:
        self.mode: str = check_choice("mode", mode, get_args(Mode))
        self.params = _checked(params)
        self.size = sum(p.numel() for p in self.params)
        self.device, self.dtype = self.params[0].device, self.params[0].dtype
        self.num_products = 0
        self._loss, self._module, self._reduce, self._scale = loss, module, reduce, scale
        self._grads: list[Tensor] | None = None
        self._stack = ExitStack()
        self._rng: list[Tensor] = []

    def __enter__(self) -> HessianOperator:
        devices = [self.device] if self.device.type == "cuda" else []
        self._stack.enter_context(torch.random.fork_rng(devices))
        self._stack.enter_context(restored_buffers(self._module))
        self._rng = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._grads = None
        self._stack.close()

    def __call__(self, vector: Tensor, /) -> Tensor:
        """Return ``H v``."""
        self.num_products += 1
        v = vector.to(self.dtype)
        if self._scale is not None:
            v = v * self._scale
        product = self._reduced(self._product(v))
        return product if self._scale is None else product * self._scale

    def gradient(self) -> Tensor:
        """Return the gradient of the loss, flat, without the scale."""
        if self.mode != "finite_difference" and self._grads is None:
            self._or_differences(self._build)
        return self._reduced(_flat(self._grads or self._evaluate(create_graph=False)).detach().clone())

    def _reduced(self, value: Tensor) -> Tensor:
        return value if self._reduce is None else self._reduce(value)

    def _product(self, v: Tensor) -> Tensor:
        if self.mode != "finite_difference":
            product = self._or_differences(lambda: self._second_derivative(v))
            if product is not None:
                self.mode = "autograd"
                return product
        return self._difference(v)

    def _or_differences(self, compute: Callable[[], _T]) -> _T | None:
        """Return what ``compute`` does, or ``None`` after a change to finite differences if ``auto`` allows that."""
        try:
            return compute()
        except (RuntimeError, NotImplementedError) as error:
            if self.mode != "auto" or not _no_second_derivative(error):
                raise
            self.mode, self._grads = "finite_difference", None
            return None

    def _second_derivative(self, v: Tensor) -> Tensor:
        if self._grads is None:
            self._build()
        assert self._grads is not None
        parts = [p.view_as(q) for p, q in zip(v.split([p.numel() for p in self.params]), self.params, strict=True)]
        pairs = [(g, u) for g, u in zip(self._grads, parts, strict=True) if g.requires_grad]
        if not pairs:  # the loss is linear
            return torch.zeros_like(v)
        outputs, weights = zip(*pairs, strict=True)
        with torch.enable_grad():
            products = torch.autograd.grad(
                outputs, self.params, grad_outputs=weights, retain_graph=True, materialize_grads=True
            )
        return _flat(products)

    def _build(self) -> None:
        self._grads = self._evaluate(create_graph=True)

    def _evaluate(self, *, create_graph: bool) -> list[Tensor]:
        """Gradients of the loss, always from the random state of the beginning."""
        if not self._rng:
            raise RuntimeError("HessianOperator is a context manager: `with HessianOperator(...) as hessian:`.")
        torch.set_rng_state(self._rng[0])
        for state in self._rng[1:]:
            torch.cuda.set_rng_state(state, self.device)
        with (
            ExitStack() as stack,
            torch.enable_grad(),
            torch.autocast(self.device.type, enabled=False),
        ):
            if create_graph:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            loss = self._loss()
            if loss.ndim != 0:
                raise ValueError(f"The loss must be a scalar, got the shape {tuple(loss.shape)}.")
            if not loss.requires_grad:
                return [torch.zeros_like(p) for p in self.params]
            if create_graph:
                _refuse_dead_ends(loss)
            grads = torch.autograd.grad(loss, self.params, create_graph=create_graph, materialize_grads=True)
        if any(g.layout != torch.strided for g in grads):
            raise ValueError("Curvature needs dense gradients; build the embedding with sparse=False.")
        return list(grads)

    @torch.no_grad()
    def _difference(self, v: Tensor) -> Tensor:
        saved = [p.detach().clone() for p in self.params]
        norm = float(torch.linalg.vector_norm(v))
        if norm == 0.0:
            return torch.zeros_like(v)
        size = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p) for p in saved])))
        step = torch.finfo(self.dtype).eps ** (1 / 3) * (1.0 + size) / norm
        parts = [p.view_as(q) for p, q in zip(v.split([p.numel() for p in saved]), saved, strict=True)]
        sides = []
        try:
            for sign in (1.0, -1.0):
                for param, old, part in zip(self.params, saved, parts, strict=True):
                    param.copy_(old).add_(part, alpha=sign * step)
                sides.append(_flat(self._evaluate(create_graph=False)))
        finally:
            for param, old in zip(self.params, saved, strict=True):
                param.copy_(old)  # the very bits: (w + e) - e is not w
        return sides[0].sub_(sides[1]).div_(2.0 * step)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def _refuse_dead_ends(loss: Tensor) -> None:
    """Raise if a custom function of the loss says that it can be differentiated only once.

    torch raises only if such a gradient depends on one that requires a gradient; else the function's part of the
    Hessian would be missing without a word.
    """
    seen: set[Any] = set()
    todo: list[Any] = [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        backward: Any = getattr(getattr(node, "_forward_cls", None), "backward", None)
        if hasattr(backward, "__wrapped__") and backward.__globals__["__name__"] == "torch.autograd.function":
            raise NotImplementedError(
                f"The double backward of {node._forward_cls.__name__} is not implemented; use finite differences."
            )
        todo += [child for child, _ in node.next_functions]


def _no_second_derivative(error: BaseException) -> bool:
    text = str(error).lower()
    return "not implemented" in text or "double backward" in text or "twice differentiable" in text


def _checked(params: Sequence[Tensor]) -> list[Tensor]:
    found = list(params)
    if not found:
        raise ValueError("Curvature needs at least one parameter that requires a gradient; there is none.")
    for index, p in enumerate(found):
        if p.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"Curvature needs float32 or float64 parameters; number {index} is"
                f" {str(p.dtype).removeprefix('torch.')}. Keep the weights in float32 and use mixed precision."
            )
        if p.layout != torch.strided or not (p.requires_grad and p.is_leaf):
            raise ValueError(f"Curvature needs dense leaf parameters with requires_grad=True; number {index} is not.")
        if p.device != found[0].device or p.dtype != found[0].dtype:
            raise ValueError(
                f"Curvature needs parameters of one device and dtype; number 0 is {found[0].dtype} on"
                f" {found[0].device}, number {index} is {p.dtype} on {p.device}."
            )
    return found


@contextmanager
def restored_buffers(module: nn.Module | None) -> Iterator[None]:
    """Give all buffers of ``module`` their present values back on leaving."""
    saved = []
    for owner in module.modules() if module is not None else ():
        # by name too: a forward pass may put a new tensor in a buffer's place
        saved += [(owner, name, b, b.detach().clone()) for name, b in owner.named_buffers(recurse=False)]
    try:
        yield
    finally:
        with torch.no_grad():
            for owner, name, buffer, old in saved:
                owner._buffers[name] = buffer.copy_(old)


def rademacher(size: int, seed: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """Return ``size`` independent signs; the same for a ``seed`` on every device."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8).mul_(2).sub_(1)
    return signs.to(device=device, dtype=dtype)


@torch.no_grad()
def adam_scale(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> Tensor:
    r"""Return :math:`D = (\sqrt{\hat v} + \epsilon)^{-1/2}` of Adam's state for ``params``, flat.

    :math:`D H D` has the eigenvalues that decide whether Adam's step is stable.

    0 for a parameter that had no gradient yet: there is no step along it.

    Raises:
        ValueError: The optimizer is not of Adam's family or took no step yet.
    """
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    if not any("exp_avg_sq" in optimizer.state.get(p, {}) for p in params):
        raise ValueError(
            f"The preconditioned Hessian needs Adam's second moments; {type(optimizer).__name__} has none (or took no"
            " step yet)."
        )
    parts = []
    for p in params:
        state, group = optimizer.state.get(p, {}), groups.get(p, {})
        if "exp_avg_sq" not in state:
            parts.append(torch.zeros_like(p).reshape(-1))
            continue
        v_hat = state["exp_avg_sq"].to(p.dtype) / (1.0 - group["betas"][1] ** float(state["step"]))
        parts.append((v_hat.sqrt() + group["eps"]).rsqrt().reshape(-1))
    return torch.cat(parts)
