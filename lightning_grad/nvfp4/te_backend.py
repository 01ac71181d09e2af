"""Native FP4 GEMMs through Transformer Engine: a thin adapter around ``te.Linear``.

Never run on hardware by this project: Transformer Engine's NVFP4 kernels need compute capability 10.x. The tests drive
this file with a stand-in module.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_grad.nvfp4.recipe import NVFP4Recipe

if TYPE_CHECKING:
    from lightning_grad.nvfp4.linear import LayerState, NVFP4Linear

#: Contraction lengths of the FP4 GEMM must be a multiple of this.
ALIGNMENT = 32
_TOKENS_TRAIN, _TOKENS_EVAL = 64, 32


def te_recipe(recipe: NVFP4Recipe) -> Any:
    """Our switches as Transformer Engine's recipe. Passed explicitly: its defaults come from environment variables."""
    module: Any = importlib.import_module("transformer_engine.common.recipe")
    return module.NVFP4BlockScaling(
        disable_rht=not recipe.rht,
        disable_stochastic_rounding=not recipe.stochastic_rounding,
        disable_2d_quantization=not recipe.weight_2d,
    )


def te_autocast(recipe: NVFP4Recipe) -> Any:
    """Context in which Transformer Engine's modules run in NVFP4."""
    te: Any = importlib.import_module("transformer_engine.pytorch")
    return te.autocast(enabled=True, recipe=te_recipe(recipe))


def _shadow(layer: NVFP4Linear, state: LayerState) -> tuple[Any, Any]:
    """A ``te.Linear`` on the layer's own tensors, and its recipe.

    Kept outside the module tree, so the state dict never shows it. The tensors are set anew for every call, because
    FSDP swaps parameters.
    """
    te: Any = importlib.import_module("transformer_engine.pytorch")
    if state.shadow is None:
        linear = te.Linear(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            params_dtype=layer.weight.dtype,
            device="meta",
        )
        state.shadow = (linear, te_recipe(state.recipe))
    linear, recipe = state.shadow
    linear._parameters["weight"] = layer.weight
    if layer.bias is not None:
        linear._parameters["bias"] = layer.bias
    linear.train(layer.training)
    return linear, recipe


def te_forward(layer: NVFP4Linear, x: Tensor, state: LayerState, out_dtype: torch.dtype) -> Tensor:
    """Run the layer natively: cast to bf16, pad the tokens, slice the result."""
    te: Any = importlib.import_module("transformer_engine.pytorch")
    linear, recipe = _shadow(layer, state)
    flat = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)  # under autocast LayerNorm hands over fp32, which RHT refuses
    tokens = flat.shape[0]
    missing = -tokens % (_TOKENS_TRAIN if layer.training else _TOKENS_EVAL)
    if missing:
        flat = F.pad(flat, (0, 0, 0, missing))
    # an autocast of its own: an outer one is gone when activation checkpointing recomputes in the backward pass
    with te.autocast(enabled=True, recipe=recipe):
        out: Tensor = linear(flat, is_first_microbatch=state.first_microbatch(layer.weight, layer.training))
    return out[:tokens].view(*x.shape[:-1], layer.out_features).to(out_dtype)
