"""The torch backend under torch.compile, its own and a user's: the bits of eager mode."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from torch import nn

from lightning_grad.nvfp4 import NVFP4Linear, NVFP4Recipe, compiled
from lightning_grad.nvfp4.compiled import CompiledBackend
from lightning_grad.nvfp4.linear import Session
from lightning_grad.nvfp4.recipe import Draw
from lightning_grad.nvfp4.torch_backend import TorchBackend

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler on this machine"
)
# torch 2.6 hands compiled products to other code of oneDNN than eager ones
OTHER_SUMS = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)


def special(rows, columns, seed, largest=3.0):
    """Random numbers with zeros of both signs, ties and tiny ones; beside a huge one nearly all others are zero."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    x[0], x[1], x[2], x[3, 3] = 0.0, -0.0, 1e-40, largest
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


def compare(recipe, compiled, rows, largest=3.0, late=True):
    """Every method of the backend, on special values; ``late`` is the mode that quantizes in backward only."""
    eager = TorchBackend()
    weight = special(32, 64, 1)
    x, dy = special(rows, 64, rows, largest), special(rows, 32, rows + 1, largest)
    draw = Draw(0x9ABCDEF012345678, (torch.tensor(rows), 6, 1)) if recipe.stochastic_rounding else None
    bias, dtypes = torch.arange(32.0), (torch.float32, torch.float32)
    results = []
    for backend in (compiled, eager):
        forward, backward = (backend.pack_weight(weight, recipe, for_backward) for for_backward in (False, True))
        y, kept = backend.forward(x, forward, bias, recipe, torch.bfloat16, True)
        gradients = backend.backward(dy, backward, kept, recipe, draw, dtypes)
        columns = backend.activation(x, recipe, row=False, column=True)[1] if late else ()
        results.append((forward, backward, kept, columns, (y, *gradients)))
    (*ours, products), (*theirs, wanted) = results
    assert_same(ours, theirs)
    if OTHER_SUMS:
        for a, b in zip(products, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0.0, atol=1e-5 * float(b.abs().nan_to_num(0.0).max()), equal_nan=True)
    else:
        assert_same([products], [wanted])
    assert compiled.trusted


RECIPES = {
    "default": NVFP4Recipe(),
    "other": NVFP4Recipe(rht=False, weight_2d=False, sr_scale="up"),
    "nearest": NVFP4Recipe(stochastic_rounding=False),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("rows", "largest"), [(40, 3.0), (64, 3.0), (40, 1e30), (40, torch.nan)])
def test_the_passes_give_the_bits_of_eager_mode(monkeypatch, recipe, rows, largest):
    """Not compiled: their logic, and what runs where dynamo gives up."""
    monkeypatch.setattr(compiled, "_compiled", lambda function: function)
    compare(RECIPES[recipe], CompiledBackend(), rows, largest)


@pytest.mark.slow
@needs_compiler
def test_compiled_passes_give_the_bits_of_eager_mode():
    for largest in (3.0, 1e30, torch.nan):
        compare(NVFP4Recipe(), CompiledBackend(), 40, largest, late=False)


@pytest.mark.parametrize("wrong", ["packed", "forward", "backward"])
def test_a_compiler_that_is_wrong_is_not_used(monkeypatch, wrong):
    """It is right for one shape and a little wrong for another."""

    def spoiled(function):
        def run(*args):
            first, *rest = function(*args)
            if function.__name__ == wrong and (wrong == "packed" or args[0].shape[0] == 40):
                first = torch.where(first == first.max(), first - 1, first) if wrong == "packed" else first * 1.02
            return first, *rest

        return run

    monkeypatch.setattr(compiled, "_compiled", spoiled)
    backend = CompiledBackend()
    if wrong != "packed":
        compare(NVFP4Recipe(), backend, 64)
    with pytest.raises(AssertionError), pytest.warns(UserWarning, match=f"compiled form of '(pack_weight|{wrong})'"):
        compare(NVFP4Recipe(), backend, 40)
    assert not backend.trusted
    with pytest.raises(AssertionError, match="trusted"):  # equal bits now
        compare(NVFP4Recipe(), backend, 40)


def test_a_kind_of_token_count_is_compared_once(monkeypatch):
    """Batches of ever new lengths would otherwise run in eager mode too, each once."""
    monkeypatch.setattr(compiled, "_compiled", lambda function: function)
    backend, eager, recipe = CompiledBackend(), [], NVFP4Recipe()
    plain = TorchBackend.forward
    monkeypatch.setattr(TorchBackend, "forward", lambda self, x, *rest: eager.append(len(x)) or plain(self, x, *rest))
    weight = backend.pack_weight(special(32, 64, 1), recipe, False)
    for rows in (40, 56, 72, 41, 57, 48, 64, 80, 24):  # 64 is as many as there are columns: other code
        backend.forward(special(rows, 64, 2), weight, None, recipe, torch.float32, False)
    assert eager == [40, 41, 48, 64]
    backend.forward(special(40, 64, 2), weight, torch.zeros(32), recipe, torch.float32, False)
    assert eager[4:] == [40]


@pytest.mark.slow
@needs_compiler
def test_a_compiled_model_gives_the_bits_of_eager_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU())
    NVFP4Linear.convert(model[0], Session(backend="torch"), layer_id=3)
    other = copy.deepcopy(model)
    whole = torch.compile(other, fullgraph=True)
    x = special(40, 32, 3)
    for run in (model, whole):
        run(x).square().sum().backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert a.grad is not None
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-5 * float(a.grad.abs().max()))
