"""Which backends can run here, and the choice between them."""

from __future__ import annotations

import importlib
import os
from typing import Any, Literal, cast, get_args

import torch

from lightning_grad._validate import check_choice
from lightning_grad.nvfp4.compiled import CompiledBackend
from lightning_grad.nvfp4.recipe import Backend
from lightning_grad.nvfp4.torch_backend import TorchBackend

BackendName = Literal["auto", "transformer_engine", "triton", "torch"]
BACKENDS: tuple[str, ...] = get_args(BackendName)
_NEEDS = {
    "transformer_engine": (
        "It needs a GPU of compute capability 10.x, CUDA >= 12.8 and transformer-engine[pytorch] >= 2.9."
    ),
    "triton": "It needs an NVIDIA GPU of compute capability >= 8.0 and triton >= 3.2 (CPU tests: TRITON_INTERPRET=1).",
}
_LOADED: dict[str, Backend] = {"torch": TorchBackend(), "torch+compile": CompiledBackend()}


def describe(device: torch.device) -> str:
    """Device name and compute capability in words."""
    if device.type != "cuda":
        return f"{device.type.upper()} device"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "") not in ("", "0")


def check_triton(device: torch.device) -> str:
    """Reason why the Triton backend cannot run, or an empty string."""
    try:
        triton: Any = importlib.import_module("triton")
    except Exception as error:  # a broken installation raises more than ImportError
        return f"triton cannot be imported ({type(error).__name__}: {error})"
    if device.type != "cuda":
        return "" if interpreting() else f"{describe(device)} (triton {triton.__version__})"
    if torch.version.hip is not None or _capability(device) < (8, 0):
        return f"{describe(device)} is below compute capability 8.0"
    if "out_dtype" not in (torch.mm.__doc__ or ""):
        return f"torch {torch.__version__} has no torch.mm(..., out_dtype=...), which newer versions have"
    return ""


def check_transformer_engine(device: torch.device, stochastic_rounding: bool = True) -> str:
    """Reason why Transformer Engine cannot run, or an empty string."""
    major, minor = _capability(device)
    if device.type != "cuda":
        return f"{describe(device)}: needs compute capability 10.x"
    if major not in (10, 12):
        return f"{describe(device)}: needs compute capability 10.x"
    try:
        te: Any = importlib.import_module("transformer_engine.pytorch")
        version = _version(importlib.import_module("transformer_engine").__version__)
        if version < (2, 9):
            return f"transformer-engine {version[0]}.{version[1]} is older than 2.9"
        available, reason = te.is_nvfp4_available(return_reason=True)
    except Exception as error:  # the plain wheel raises RuntimeError; missing libraries OSError or AssertionError
        return f"transformer_engine cannot be used ({type(error).__name__}: {error})"
    if not available:
        return str(reason)
    if major == 12 and stochastic_rounding and version < (2, 19):
        # the stochastic-rounding instruction exists on 10.x only; older releases trained on zero gradients
        return f"compute capability {major}.{minor} needs transformer-engine >= 2.19 or stochastic_rounding=False"
    return ""


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def backend_info(device: torch.device | str = "cpu") -> dict[str, tuple[bool, str]]:
    """For each backend whether it can run on ``device``, and why not."""
    where = torch.device(device)
    reasons = {"transformer_engine": check_transformer_engine(where), "triton": check_triton(where), "torch": ""}
    return {name: (not reason, reason or "ok") for name, reason in reasons.items()}


def resolve(
    name: str, device: torch.device, stochastic_rounding: bool = True, owner: str = "NVFP4Precision"
) -> tuple[str, str]:
    """Choose a backend for ``device``.

    Returns:
        Its name and one sentence that says what was picked and why.

    Raises:
        RuntimeError: The backend was named and cannot run.
    """
    check_choice("backend", name, BACKENDS)
    te = check_transformer_engine(device, stochastic_rounding) if name != "torch" else ""
    if name == "transformer_engine" or (name == "auto" and not te and _capability(device)[0] == 10):
        if te:
            raise RuntimeError(
                f"{owner}(backend='{name}') cannot run: {te}. {_NEEDS[name]} Use backend='auto' to fall back."
            )
        return "transformer_engine", f"NVFP4: backend 'transformer_engine' ({describe(device)}): native FP4 GEMMs."
    triton = check_triton(device) if name != "torch" else ""
    if name == "triton" or (name == "auto" and device.type == "cuda" and not triton):
        if triton:
            raise RuntimeError(
                f"{owner}(backend='{name}') cannot run: {triton}. {_NEEDS[name]} Use backend='auto' to fall back."
            )
        chosen = "triton"
    else:
        chosen = "torch"
    why = describe(device)
    if name == "auto":
        why += f"; transformer_engine not used: {te or 'stochastic rounding needs compute capability 10.x'}"
        if chosen == "torch" and device.type == "cuda":
            why += f"; triton not used: {triton}"
    precision = "BF16" if chosen == "triton" else "FP32"
    return chosen, (
        f"NVFP4: backend '{chosen}' ({why}). FP4 GEMMs are emulated in {precision}: same numerics, no speed-up."
    )


def load(name: str) -> Backend:
    """The backend object of a resolved name ("torch+compile" is the torch backend with compiled quantizers)."""
    if name not in _LOADED:
        if name != "triton":
            raise ValueError(f"`backend` {name!r} has no functional form here; use one of 'torch', 'triton'.")
        module: Any = importlib.import_module("lightning_grad.nvfp4.triton_backend")
        _LOADED[name] = cast(Backend, module.TritonBackend())
    return _LOADED[name]
