"""NVFP4 training as a precision plugin: converts layers, counts backward passes, keeps the checkpoint plain."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import FSDPPrecision, Precision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_grad._lightning import refuse_twin
from lightning_grad._validate import check_choice, check_int
from lightning_grad.nvfp4.backends import BACKENDS, BackendName, load, resolve
from lightning_grad.nvfp4.conversion import Selection, check_keep, check_patterns, convert, select
from lightning_grad.nvfp4.format import BLOCK, ScaleRounding
from lightning_grad.nvfp4.hadamard import SIGNS, check_signs
from lightning_grad.nvfp4.linear import NVFP4Linear, Session
from lightning_grad.nvfp4.recipe import MODES, Mode, NVFP4Recipe
from lightning_grad.nvfp4.te_backend import ALIGNMENT, te_autocast

_UNSUPPORTED = ("DeepSpeed", "XLA")


class _NVFP4Plugin(Precision):
    """What both plugins share; ``Precision`` or ``FSDPPrecision`` comes behind it in the method resolution order."""

    precision = "bf16-mixed"
    _base_arguments: dict[str, Any] = {}  # noqa: RUF012
    _may_cache = True

    def __init__(
        self,
        backend: BackendName = "auto",
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        blocks: str | None = None,
        keep_first: int | float = 0,
        keep_last: int | float = 0.15,
        rht: bool = True,
        stochastic_rounding: bool = True,
        weight_2d: bool = True,
        hadamard_signs: list[int] | None = None,
        sr_scale: ScaleRounding = "nearest",
        eval_precision: Literal["nvfp4", "high"] = "nvfp4",
        autocast: Literal["auto", "bf16", "none"] = "auto",
        cache_weights: bool = True,
        compile_kernels: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(**self._base_arguments)
        self._requested = check_choice("backend", backend, BACKENDS)
        self._selection = {
            "include": check_patterns("include", include),
            "exclude": check_patterns("exclude", exclude),
            "blocks": blocks,
            "keep_first": check_keep("keep_first", keep_first),
            "keep_last": check_keep("keep_last", keep_last),
        }
        recipe = NVFP4Recipe(rht, stochastic_rounding, weight_2d, check_signs(hadamard_signs), sr_scale)
        check_choice("eval_precision", eval_precision, ("nvfp4", "high"))
        self.autocast = check_choice("autocast", autocast, ("auto", "bf16", "none"))
        self.cache_weights, self.compile_kernels = cache_weights, compile_kernels
        self._seed = seed if seed is None else check_int("seed", seed, 0, 2**64 - 1)
        self.session = Session(recipe, seed=self._seed or 0, eval_precision=eval_precision)
        self.backend: str | None = None
        self.report: dict[str, str] = {}
        self.layers: list[NVFP4Linear] = []
        self._device = torch.device("cpu")
        self._loaded = self._said = self._has_te_modules = False

    def __repr__(self) -> str:
        """For Lightning's messages about plugins that exclude each other."""
        return f"{type(self).__name__}(backend={self._requested!r})"

    @property
    def mode(self) -> Mode:
        """The current mode."""
        return self.session.mode

    def set_mode(self, mode: Mode) -> None:
        """Switch all converted layers; takes effect with the next forward pass.

        Args:
            mode: ``"nvfp4"``, ``"bf16_forward"`` (quantize in the backward pass only) or ``"bf16"``.
        """
        check_choice("mode", mode, MODES)
        if mode == "bf16_forward" and self.backend == "transformer_engine":
            rank_zero_warn("Transformer Engine has no BF16 forward with an FP4 backward pass; using mode 'bf16'.")
            mode = "bf16"
        self.session.mode = mode
        self.invalidate_weight_cache()
        for layer in self.layers:
            layer._nvfp4.drop_packed_weight()  # "bf16" never asks for it again

    def invalidate_weight_cache(self) -> None:
        """Quantize all weights anew. Needed only after writing weights in a way that autograd does not see."""
        if self.session.epoch is not None:
            self.session.epoch += 1

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Choose the backend and convert the selected layers in place."""
        trainer = _trainer_of(module)
        refuse_twin(trainer)
        strategy = None if trainer is None else trainer.strategy
        if strategy is not None and any(word in type(strategy).__name__ for word in _UNSUPPORTED):
            raise NotImplementedError(
                f"{type(self).__name__} does not work with {type(strategy).__name__}; use a single device, DDP, FSDP or"
                " ModelParallelStrategy."
            )
        self._device = next(module.parameters()).device if strategy is None else strategy.root_device
        recipe = self.session.recipe
        name, why = resolve(self._requested, self._device, recipe.stochastic_rounding, type(self).__name__)
        self._check_recipe(name, recipe)
        multiple = ALIGNMENT if name == "transformer_engine" else BLOCK
        selection = select(module, multiple=multiple, **self._selection)  # type: ignore[arg-type]
        if not selection.layers:
            reasons = "; ".join(f"{layer}: {reason}" for layer, reason in list(selection.report.items())[:3])
            raise ValueError(
                f"{type(self).__name__} converted no layer ({len(selection.report)} Linear layers found; first reasons:"
                f" {reasons or 'none'})."
            )
        sharded = isinstance(strategy, FSDPStrategy | ModelParallelStrategy)
        self._start_session(name, 0 if trainer is None else trainer.global_rank, sharded)
        self.layers = convert(selection, self.session)
        self.report = selection.report
        self._has_te_modules = name == "transformer_engine" and bool(_te_modules(module))
        self._say(module, selection, why)
        return module

    def _check_recipe(self, backend: str, recipe: NVFP4Recipe) -> None:
        if backend == "transformer_engine" and (recipe.hadamard_signs != SIGNS or recipe.sr_scale != "nearest"):
            raise RuntimeError(
                f"{type(self).__name__}(backend='transformer_engine') has a fixed sign vector and rounds scales to"
                " nearest; leave `hadamard_signs` and `sr_scale` at their defaults or use backend='triton'."
            )

    def _start_session(self, backend: str, rank: int, sharded: bool) -> None:
        session = self.session
        self.backend = backend
        session.backend = "torch+compile" if backend == "torch" and self.compile_kernels else backend
        if backend != "transformer_engine":
            load(session.backend)
        session.rank = rank
        session.step = session.step.to(self._device)
        if self._seed is None and not self._loaded:
            session.seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        # sharding strategies gather weights into new memory for every pass
        cache = self.cache_weights and self._may_cache and not sharded
        session.epoch = (session.epoch or 0) + 1 if cache else None

    def _say(self, module: nn.Module, selection: Selection, why: str) -> None:
        """One line for the user, and warnings for what they may want to change; once until teardown."""
        if self._said:
            return
        self._said = True
        linears = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}
        total = sum(m.weight.numel() for m in linears.values())
        share = sum(m.weight.numel() for m in self.layers) / max(total, 1)
        kept = f"; kept in high precision: {', '.join(selection.kept)}" if selection.kept else ""
        rank_zero_info(
            f"{why} Converted {len(self.layers)} of {len(linears)} Linear layers, {share:.0%} of their weights{kept}."
        )
        for pattern in selection.unmatched:
            rank_zero_warn(f"`include` pattern {pattern!r} matches no Linear layer.")
        odd = [name for name, reason in selection.report.items() if "not a multiple" in reason]
        if odd:
            first = ", ".join(odd[:3])
            rank_zero_warn(
                f"{len(odd)} Linear layers stay in high precision because `in_features` or `out_features` is not a"
                f" multiple of {ALIGNMENT if self.backend == 'transformer_engine' else BLOCK}: {first}."
            )
        if any(layer.weight.dtype != torch.float32 for layer in self.layers):
            rank_zero_warn("Converted layers have weights that are not FP32, so there are no FP32 master weights.")
        foreign = _te_modules(module)
        if foreign and self.backend != "transformer_engine":
            rank_zero_warn(f"Transformer Engine modules ({foreign[0]}, …) stay in high precision on this backend.")

    def forward_context(self) -> AbstractContextManager[Any]:
        """Autocast for everything that is not converted, and the recipe for a model's own ``te`` modules."""
        if self._has_te_modules and self.session.mode == "nvfp4":
            return _within(te_autocast(self.session.recipe), self._autocast_context())
        return self._autocast_context()

    def _autocast_context(self) -> AbstractContextManager[Any]:
        if self.autocast == "bf16" or (self.autocast == "auto" and self._device.type == "cuda"):
            return torch.autocast(self._device.type, dtype=torch.bfloat16, cache_enabled=False)
        return nullcontext()

    def post_backward(self, tensor: Tensor, module: pl.LightningModule) -> Tensor:  # type: ignore[override]
        """Count the backward pass. Afterwards, so that recomputed forward passes and compiled ones see its number."""
        out = super().post_backward(tensor, module)
        self.session.step.add_(1)
        return out

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: pl.LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Step, then quantize the weights anew: bitsandbytes' optimizers change them behind autograd's back."""
        out = super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)
        self.invalidate_weight_cache()
        return out

    def state_dict(self) -> dict[str, Any]:
        """Seed, number of backward passes, mode; ``backend`` is for the reader."""
        session = self.session
        return {
            "version": 1,
            "seed": session.seed,
            "step": int(session.step) - 1,
            "mode": session.mode,
            "backend": self.backend or self._requested,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the stream and the mode of a checkpoint; unknown keys are ignored."""
        self.session.step.fill_(state_dict.get("step", 0) + 1)
        self.session.seed = state_dict.get("seed", self.session.seed)
        self._loaded = True
        self.set_mode(state_dict.get("mode", "nvfp4"))

    def teardown(self) -> None:
        """Turn the layers back into ``nn.Linear``."""
        for layer in self.layers:
            if isinstance(layer, NVFP4Linear):
                layer.revert()
        self.layers = []
        self.session.probe = None
        self._said = False
        super().teardown()


def _te_modules(module: nn.Module) -> list[str]:
    """Names of the Transformer Engine modules that a model has of its own."""
    return [n for n, m in module.named_modules() if type(m).__module__.startswith("transformer_engine")]


@contextmanager
def _within(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with outer, inner:
        yield


def _trainer_of(module: nn.Module) -> Any:
    try:
        return module.trainer if isinstance(module, pl.LightningModule) else None
    except RuntimeError:  # not attached
        return None


class NVFP4Precision(_NVFP4Plugin):
    """Train linear layers on four-bit operands; weights, gradients and optimizer state stay FP32.

    All three GEMMs of a converted layer run on NVFP4 operands: natively on data-centre Blackwell GPUs through
    Transformer Engine, elsewhere emulated with the same numerics, which is no faster than BF16. Converted layers keep
    one packed activation copy for the backward pass. Checkpoints are those of the plain model.

    Args:
        backend: ``"auto"`` takes Transformer Engine on compute capability 10.x, Triton on NVIDIA GPUs from 8.0, else
            torch. A named backend that cannot run is an error.
        include: fnmatch patterns on layer names; ``None`` takes all.
        exclude: Patterns of layers that stay; ``None`` leaves out heads, embeddings, routers and gates.
        blocks: Dotted name of the container of transformer blocks; ``None`` finds it.
        keep_first: Blocks at the start in high precision: a count, or a fraction in [0, 1), rounded up.
        keep_last: The same at the end, where the method's authors found them needed.
        rht: Random Hadamard transform of the weight-gradient operands.
        stochastic_rounding: Round gradients stochastically.
        weight_2d: 16x16 blocks for weights.
        hadamard_signs: 16 values +-1; ``None`` is Transformer Engine's vector.
        sr_scale: ``"nearest"`` follows Transformer Engine; ``"up"`` removes a gradient shrinkage of 0.3 %.
        eval_precision: ``"high"`` runs converted layers unquantized in eval mode.
        autocast: Autocast for everything else; ``"auto"`` is bf16 on CUDA and none on a CPU.
        cache_weights: Keep quantized weights between micro-batches (0.5 byte per parameter).
        compile_kernels: Compile the passes of the torch backend, about a minute once on a CPU; same bits.
        seed: Key of the rounding stream in [0, 2**64); ``None`` takes ``seed_everything``'s, else 0.

    Raises:
        ValueError: An argument is out of range, or no layer can be converted.
        RuntimeError: The named backend cannot run here.
        NotImplementedError: DeepSpeed, XLA, or tensor-parallel weights.

    State in checkpoints: seed, number of backward passes, mode.

    Source: NVIDIA, arXiv:2509.25149, and the recipe ``NVFP4BlockScaling`` of Transformer Engine >= 2.14. Differs from
    it: uniforms have no mean bias, weight gradients are not rounded to bf16, the sign vector can be set.
    """


class NVFP4FSDPPrecision(_NVFP4Plugin, FSDPPrecision):
    """:class:`NVFP4Precision` for ``FSDPStrategy``, which accepts FSDP plugins only. Same arguments.

    Weights arrive as gathered bf16 shards and are quantized from bf16; gradients are reduced in bf16, as under
    Lightning's ``bf16-mixed``; the weight cache is off.

    State in checkpoints: seed, number of backward passes, mode.
    """

    _base_arguments = {"precision": "bf16-mixed"}  # noqa: RUF012
    _may_cache = False

    def _autocast_context(self) -> AbstractContextManager[Any]:
        """FSDP's mixed precision casts what is not converted."""
        return FSDPPrecision.forward_context(self)
