"""The quantized linear layer: all three GEMMs on four-bit operands, one packed activation copy kept for backward."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_grad.nvfp4.backends import load, resolve
from lightning_grad.nvfp4.format import BLOCK
from lightning_grad.nvfp4.heap import keep_freed_memory
from lightning_grad.nvfp4.probe import Probe
from lightning_grad.nvfp4.recipe import Draw, Mode, NVFP4Recipe, Packed
from lightning_grad.nvfp4.stream import check_stream
from lightning_grad.nvfp4.te_backend import te_forward


class _Once(torch.autograd.Function):
    """Identity on gradients whose own derivative raises."""

    @staticmethod
    def forward(
        ctx: Any, text: str, grad_y: Tensor, weight: Tensor, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        ctx.text = text
        return tuple(None if g is None else g.view_as(g) for g in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(ctx.text)


@dataclass(frozen=True)
class Call:
    """What one call of the layer needs besides tensors.

    Attributes:
        recipe: What is quantized, and how.
        backend: Name of a loaded backend.
        seed: Key of the rounding stream.
        layer_id: Index of the layer in conversion order.
        rank: Global rank.
        out_dtype: Dtype of the result.
        probe: Receives tensors on sampled steps.
        name: Layer name for the probe.
    """

    recipe: NVFP4Recipe
    backend: str
    seed: int
    layer_id: int
    rank: int
    out_dtype: torch.dtype
    probe: Probe | None = None
    name: str = ""

    def draw(self, step: Tensor | int) -> Draw | None:
        """Place in the stream of a gradient tensor; ``None`` if gradients are rounded to nearest."""
        if not self.recipe.stochastic_rounding:
            return None
        return Draw(self.seed, (step, self.layer_id << 1, self.rank))


PackedWeights = tuple[Packed | None, Packed | None]


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, call: Call, packed: PackedWeights, keep: bool
) -> tuple[Tensor, Packed | None]:
    """``x @ weight.T + bias`` of 2-D ``x``, and the packed activation if it is to be kept."""
    kernels = load(call.backend)
    if call.probe is not None:
        call.probe.record(call.name, "x", x, call.recipe)
        call.probe.record(call.name, "w", weight, call.recipe)
        if keep:
            call.probe.record(call.name, "x_col", x, call.recipe)
    if call.recipe.mode == "bf16_forward":
        dtype = torch.float32 if x.device.type == "cpu" else torch.bfloat16
        out = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        return out.to(call.out_dtype), kernels.activation(x, call.recipe, row=False, column=keep)[1]
    return kernels.forward(x, packed[0] or weight, bias, call.recipe, call.out_dtype, keep)


class _NVFP4Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        step: Tensor | int,
        call: Call,
        packed: PackedWeights,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            out, kept = _forward(x, weight, bias, call, packed, keep=ctx.needs_input_grad[1])
        column = () if kept is None else tuple(kept)
        if isinstance(step, Tensor) and torch.compiler.is_compiling():
            step = step.clone()  # the plugin counts in place, which autograd must not see
            ctx.save_for_backward(weight, step, *column)
        else:
            ctx.save_for_backward(weight, *column)
            ctx.step = step
        ctx.compiled = torch.compiler.is_compiling() and isinstance(step, Tensor)
        ctx.call, ctx.packed = call, packed
        ctx.shape, ctx.x_dtype = x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        weight, *rest = ctx.saved_tensors
        step, kept = (rest[0], rest[1:]) if ctx.compiled else (ctx.step, rest)
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        with torch.no_grad(), torch.autocast(grad_y.device.type, enabled=False):
            call: Call = ctx.call
            kernels = load(call.backend)
            draw = call.draw(step)
            if call.probe is not None:
                call.probe.record(call.name, "dy", grad_y, call.recipe, draw)
                call.probe.record(call.name, "dy_col", grad_y, call.recipe, draw)
            packed = ctx.packed[0 if call.recipe.weight_2d else 1] or weight
            grad_x, grad_w = kernels.backward(
                grad_y,
                packed if need_x else None,
                Packed(*kept) if need_w else None,
                call.recipe,
                draw,
                (ctx.x_dtype, weight.dtype),
            )
            if call.probe is not None and grad_w is not None:
                call.probe.weight_gradient(call.name, grad_y, grad_w)
            grad_b = grad_y.float().sum(0).to(ctx.bias_dtype) if need_b else None
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            text = "NVFP4Linear is differentiable once."
            grad_x, grad_w, grad_b = _Once.apply(text, grad_y, weight, grad_x, grad_w, grad_b)  # type: ignore[no-untyped-call]
        return grad_x, grad_w, grad_b, None, None, None


def apply_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    step: Tensor | int,
    call: Call,
    packed: PackedWeights = (None, None),
) -> Tensor:
    """The layer on any leading dimensions; keeps nothing when no gradient is needed."""
    flat = x.reshape(-1, x.shape[-1])
    if flat.shape[0] == 0:
        out = F.linear(flat.to(weight.dtype), weight, bias).to(call.out_dtype)
    elif torch.is_grad_enabled():
        out = _NVFP4Function.apply(flat, weight, bias, step, call, packed)  # type: ignore[no-untyped-call]
    else:
        with torch.autocast(x.device.type, enabled=False):
            out, _ = _forward(flat, weight, bias, call, packed, keep=False)
    return out.view(*x.shape[:-1], weight.shape[0])


def output_dtype(x: Tensor) -> torch.dtype:
    """The autocast dtype where autocast is on, else the dtype of ``x``."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    config: NVFP4Recipe | None = None,
    backend: str = "auto",
    seed: int = 0,
    step: Tensor | int = 0,
    layer_id: int = 0,
    rank: int = 0,
) -> Tensor:
    r"""Linear layer with NVFP4 operands in forward and backward.

    .. math::
        Y &= Q(X) Q_{2d}(W)^T + b, \\
        dX &= Q_{sr}(dY) Q_{2d}(W), \\
        dW &= Q_{sr}(H dY)^T Q(H X)

    where :math:`Q` quantizes in 1x16 blocks along the contraction, :math:`Q_{2d}` in 16x16 blocks, ``sr`` rounds
    stochastically and :math:`H` is the block-diagonal Hadamard transform over tokens.

    Args:
        x: ``[..., K]``, K a multiple of 16, any number of tokens; rounded to bf16.
        weight: ``[N, K]``, N a multiple of 16; quantized from its own dtype.
        bias: ``[N]``.
        config: Recipe switches; ``None`` is the full recipe.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.
        seed: Key of the stochastic-rounding stream, in [0, 2**64).
        step: Counter word 1: number of the backward pass, in [0, 2**32).
        layer_id: Number of the layer, in [0, 2**31): the high bits of counter word 2.
        rank: Counter word 3: number of the process, in [0, 2**32).

    Returns:
        ``[..., N]`` in the autocast dtype where autocast is on, else in the dtype of ``x``.

    Raises:
        TypeError: ``x`` is complex or an integer tensor.
        ValueError: Shapes do not fit together, a dimension is not a multiple of 16, or a counter is out of range.
        RuntimeError: The named backend cannot run here.

    Source: arXiv:2509.25149, section 4. Differs from Transformer Engine: the weight gradient is not rounded to bf16.
    """
    recipe = config or NVFP4Recipe()
    check_input(x)
    if weight.ndim != 2 or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"`x` {tuple(x.shape)} must end in the K of `weight` [N, K], got {tuple(weight.shape)}.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"`bias` must have shape ({weight.shape[0]},), got {tuple(bias.shape)}.")
    if weight.shape[0] % BLOCK or weight.shape[1] % BLOCK:
        raise ValueError(f"`weight` of shape {tuple(weight.shape)} must have both dimensions a multiple of 16.")
    check_stream(seed, (step, layer_id << 1, rank))
    if recipe.mode == "bf16":
        return F.linear(x, weight, bias)
    if backend == "auto":
        resolved = resolve(backend, x.device)[0]
        backend = "triton" if resolved == "transformer_engine" else resolved
    elif backend not in ("torch", "torch+compile"):
        backend = resolve(backend, x.device, owner="linear")[0]
    return apply_linear(x, weight, bias, step, Call(recipe, backend, seed, layer_id, rank, output_dtype(x)))


def check_input(x: Tensor) -> None:
    """Refuse dtypes that have no NVFP4 form."""
    if x.is_complex() or not x.is_floating_point():
        raise TypeError(f"NVFP4Linear needs a real floating-point input, got {x.dtype}.")


@dataclass
class Session:
    """What the layers of one converted model share. Plain data: it pickles and deep-copies with the layers.

    Attributes:
        recipe: Recipe switches but for the mode.
        backend: Resolved backend name.
        mode: Current mode.
        seed: Key of the rounding stream.
        rank: Global rank.
        eval_precision: ``"high"`` runs plain layers in eval mode.
        step: int64 ``[]`` on the device: number of the next backward pass, from 1. A tensor, because a Python integer
            would be frozen by ``torch.compile`` and CUDA graphs.
        epoch: Weight-cache epoch; ``None`` switches the cache off.
        probe: Diagnostics of the current step.
    """

    recipe: NVFP4Recipe = field(default_factory=NVFP4Recipe)
    backend: str = "torch"
    mode: Mode = "nvfp4"
    seed: int = 0
    rank: int = 0
    eval_precision: str = "nvfp4"
    step: Tensor = field(default_factory=lambda: torch.ones((), dtype=torch.int64))
    epoch: int | None = None
    probe: Probe | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"probe": None}


class LayerState:
    """What one converted layer adds to ``nn.Linear``: its session, its number, and the cached packed weight."""

    def __init__(self, session: Session, layer_id: int, name: str) -> None:
        self.session, self.layer_id, self.name = session, layer_id, name
        self.recipe = session.recipe
        self.switched = replace(session.recipe, mode="bf16_forward")
        self._key: tuple[Any, ...] | None = None
        self._packed: PackedWeights = (None, None)
        self.shadow: Any = None  # the te.Linear that runs this layer, outside the module tree

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_key": None, "_packed": (None, None), "shadow": None}

    def first_microbatch(self, weight: Tensor, training: bool) -> bool | None:
        """Whether Transformer Engine must quantize the weight anew; ``None`` lets it do so on every call."""
        if self.session.epoch is None:
            return None
        key = self._weight_key(weight, training)
        first, self._key = key != self._key, key
        return first

    def _weight_key(self, weight: Tensor, training: bool) -> tuple[Any, ...]:
        """What changes whenever the weight does.

        ``_version`` alone is not a key: bitsandbytes writes through raw pointers and leaves it unchanged. The epoch
        covers optimizers, ``training`` covers callbacks that swap averaged weights in for validation.
        """
        return self.session.epoch, weight._version, weight.data_ptr(), weight.device, training

    def drop_packed_weight(self) -> None:
        """Give the memory of the cached packed weight back."""
        self._key, self._packed = None, (None, None)

    def packed_weight(self, weight: Tensor, training: bool) -> PackedWeights:
        """The packed weight, quantized once per optimizer step; empty when caching is off."""
        if self.session.epoch is None or torch.compiler.is_compiling():
            return (None, None)
        key = self._weight_key(weight, training)
        if key != self._key:
            with torch.no_grad():
                kernels = load(self.session.backend)
                first = kernels.pack_weight(weight.detach(), self.recipe, backward=False)
                second = None if self.recipe.weight_2d else kernels.pack_weight(weight.detach(), self.recipe, True)
            self._key, self._packed = key, (first, second)
        return self._packed


class NVFP4Linear(nn.Linear):
    """``nn.Linear`` whose three GEMMs run on NVFP4 operands.

    Made from an existing layer by :meth:`convert`, which swaps its class and leaves parameters, hooks, name and
    state-dict keys alone. Differentiable once.
    """

    _nvfp4: LayerState

    @classmethod
    def convert(
        cls, module: nn.Linear, session: Session | None = None, layer_id: int = 0, name: str = ""
    ) -> NVFP4Linear:
        """Turn ``module`` into an NVFP4 layer in place and return it.

        Raises:
            ValueError: A dimension is not a multiple of 16.
        """
        if module.in_features % BLOCK or module.out_features % BLOCK:
            raise ValueError(
                f"NVFP4Linear needs dimensions that are multiples of 16, got in_features={module.in_features},"
                f" out_features={module.out_features}."
            )
        if module.weight.device.type == "cpu":
            keep_freed_memory()
        module.__class__ = cls
        module.__dict__["_nvfp4"] = LayerState(session or Session(), layer_id, name)
        assert isinstance(module, cls)
        return module

    def revert(self) -> None:
        """Become ``nn.Linear`` again."""
        self.__dict__.pop("_nvfp4", None)
        self.__class__ = nn.Linear  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        state = self.__dict__.get("_nvfp4")
        if state is None:  # built directly rather than converted
            state = self.__dict__["_nvfp4"] = LayerState(Session(), 0, "")
        session: Session = state.session
        mode = session.mode
        if mode == "bf16" or (not self.training and (session.eval_precision == "high" or mode == "bf16_forward")):
            return super().forward(x)
        check_input(x)
        if x.shape[-1:] != self.weight.shape[1:]:
            raise ValueError(f"the input {tuple(x.shape)} must end in in_features={self.in_features}.")
        if session.backend == "transformer_engine":
            return te_forward(self, x, state, output_dtype(x))
        weight = self.weight
        recipe = state.recipe if mode == "nvfp4" else state.switched
        packed = state.packed_weight(weight, self.training)
        call = Call(
            recipe,
            session.backend,
            session.seed,
            state.layer_id,
            session.rank,
            output_dtype(x),
            None if torch.compiler.is_compiling() else session.probe,
            state.name,
        )
        return apply_linear(x, weight, self.bias, session.step, call, packed)
