"""Transformer Engine's own PyTorch reference of NVFP4, loaded from the plain wheel without its compiled parts."""

from __future__ import annotations

import enum
import importlib.metadata
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch

PACKAGE = "transformer_engine.pytorch.custom_recipes"


def _stand_ins(recipes: Path) -> dict[str, types.ModuleType]:
    tensor = types.ModuleType("transformer_engine.pytorch.quantized_tensor")
    tensor.QuantizedTensorStorage = type("QuantizedTensorStorage", (), {})

    class Quantizer:
        def __init__(self, *, rowwise, columnwise):
            self.rowwise_usage, self.columnwise_usage = rowwise, columnwise

    tensor.Quantizer = Quantizer
    gemm = types.ModuleType(f"{PACKAGE}.gemm")
    gemm.GEMMType = enum.Enum("GEMMType", "FPROP DGRAD WGRAD")
    gemm.MMParams = type("MMParams", (), {})
    package = types.ModuleType(PACKAGE)
    package.gemm = gemm
    names = ("transformer_engine", "transformer_engine.pytorch")
    return {name: types.ModuleType(name) for name in names} | {
        PACKAGE: package,
        f"{PACKAGE}.gemm": gemm,
        "transformer_engine.pytorch.quantized_tensor": tensor,
    }


def _load(name: str, path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"{PACKAGE}.{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def load_reference():
    """The module ``reference_nvfp4`` and its formats, or a skip that names the wheel."""
    try:
        root = importlib.metadata.distribution("transformer_engine")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the plain wheel is not installed: pip install transformer-engine")
    recipes = Path(root.locate_file("transformer_engine")) / "pytorch" / "custom_recipes"
    if not (recipes / "reference_nvfp4.py").exists():
        pytest.skip(f"transformer-engine {root.version} has no NVFP4 reference; it needs 2.14 or newer")
    before = {name: module for name, module in sys.modules.items() if name.startswith("transformer_engine")}
    try:
        sys.modules.update(_stand_ins(recipes))
        utils = _load("reference_utils", recipes / "reference_utils.py")
        sys.modules[PACKAGE].reference_utils = utils
        return _load("reference_nvfp4", recipes / "reference_nvfp4.py"), utils
    finally:  # what other tests see as "transformer_engine" is the installed package
        for name in [n for n in sys.modules if n.startswith("transformer_engine")]:
            del sys.modules[name]
        sys.modules.update(before)


def positive_zeros(codes: torch.Tensor) -> torch.Tensor:
    """Map the nibble 8 to 0: the reference drops the sign of an exact -0.0."""
    low, high = codes & 15, codes >> 4
    return torch.where(low == 8, 0, low) | (torch.where(high == 8, 0, high) << 4)


def inputs(rows: int = 64, columns: int = 128) -> dict[str, torch.Tensor]:
    """Families of matrices that have broken NVFP4 quantizers."""
    g = torch.Generator().manual_seed(7)
    normal = torch.randn(rows, columns, generator=g)
    outlier = normal.clone()
    outlier[torch.rand(rows, columns, generator=g) < 0.01] *= 30
    # every midpoint of the grid, times a power of two, in a block whose largest element is 6
    ties = torch.tensor([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5, -6])
    ties = ties.repeat(rows, columns // 16) * 2.0 ** torch.randint(-3, 4, (rows, 1), generator=g)
    spread = torch.exp(4 * torch.randn(rows, columns, generator=g)) * normal.sign()
    blocks = normal.clone()
    blocks.view(rows, -1, 16)[:, ::3] = 0
    tiny_block = normal.clone()
    tiny_block[: rows // 2] *= 1e-7
    return {
        "normal": normal,
        "outlier": outlier,
        "zero": torch.zeros(rows, columns),
        "tiny": normal * 1e-30,
        "huge": normal * 1e37,
        "ties": ties,
        "denormal": normal * 2.0**-130,
        "clamped_scale": normal * 4e-37,
        "spread": spread,
        "zero_blocks": blocks,
        "tiny_blocks": tiny_block,
        "laplace": torch.distributions.Laplace(0.0, 1.0).icdf(
            torch.rand(rows, columns, generator=g).clamp(1e-6, 0.999999)
        ),
        "negative_zero": torch.full((rows, columns), -0.0),
        "relu": normal.relu(),
    }
