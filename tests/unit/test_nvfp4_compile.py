"""The torch backend under torch.compile, its own and a user's: the bits of eager mode."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from torch import nn

from lightning_grad.nvfp4 import NVFP4Linear, NVFP4Recipe
from lightning_grad.nvfp4.linear import Session
from lightning_grad.nvfp4.recipe import Draw
from lightning_grad.nvfp4.torch_backend import TorchBackend

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler on this machine"),
]


def special(rows, columns, seed):
    """Random numbers with zeros of both signs, ties, tiny and huge ones."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    x[0], x[1], x[2], x[3] = 0.0, -0.0, 1e-40, 1e30
    x[16:32, :16] = torch.tensor([0.25, -0.25, 0.75, -1.25, 1.75, 2.5, -3.5, 5.0] * 2)
    x[:, -1] *= 1e-6
    return x


def bits(t):
    if t.dtype == torch.uint8:
        return t
    return torch.where(t.isnan(), torch.full_like(t, 12345.0), t)


def assert_same(got, want):
    for ours, theirs in zip(got, want, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.shape == b.shape
            assert torch.equal(bits(a), bits(b))


def test_compiled_loops_give_the_bits_of_eager_mode():
    eager, compiled = TorchBackend(), TorchBackend(compiled=True)
    weight = special(32, 64, 1)
    for rows, nan in ((40, False), (64, False), (40, True)):
        x, dy = special(rows, 64, rows), special(rows, 32, rows + 1)
        if nan:
            x[5, 5] = dy[6, 6] = torch.nan
        draw = Draw(0x9ABCDEF012345678, (torch.tensor(rows), 6, 1))
        for recipe in (NVFP4Recipe(), NVFP4Recipe(rht=False, weight_2d=False, sr_scale="up")):
            for backend in ("activation", "gradient"):
                arguments = (x, recipe, True, True) if backend == "activation" else (dy, recipe, True, True, draw)
                assert_same(getattr(compiled, backend)(*arguments), getattr(eager, backend)(*arguments))
            kinds = [(b.pack_weight(weight, recipe, False), b.weight(weight, recipe, True)) for b in (compiled, eager)]
            assert_same(*kinds)


def test_a_compiled_model_gives_the_bits_of_eager_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU())
    NVFP4Linear.convert(model[0], Session(backend="torch"), layer_id=3)
    other = copy.deepcopy(model)
    compiled = torch.compile(other, fullgraph=True)
    x = special(40, 32, 3)
    x[3] = 3.0
    for run in (model, compiled):
        run(x).square().sum().backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert a.grad is not None
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-5 * float(a.grad.abs().max()))
