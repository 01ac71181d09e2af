"""Run by test_nvfp4_triton in a process with TRITON_INTERPRET=1; prints the number of comparisons that were equal."""

from __future__ import annotations

import warnings

import torch

from lightning_grad.nvfp4 import NVFP4Recipe, linear, quantize
from lightning_grad.nvfp4.backends import load
from lightning_grad.nvfp4.recipe import Draw
from tests.nvfp4_oracle import inputs

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
checks = 0


def same(name, ours, theirs):
    global checks
    for a, b in zip(ours, theirs, strict=True):
        if a is None and b is None:
            continue
        a, b = (t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for t in (a, b))
        if a.dtype == torch.float32:  # the sign of a zero in an operand is free, NaN payloads too
            a, b = ((t + 0.0).nan_to_num(nan=-1.0) for t in (a, b))
        assert (a.shape, a.dtype) == (b.shape, b.dtype), (name, a.shape, b.shape, a.dtype, b.dtype)
        assert torch.equal(a, b), (name, int((a != b).sum()), a.numel())
        checks += 1


def public(name, x):
    for block in ((1, 16), (16, 16)):
        args = [quantize(x, block, backend=backend) for backend in ("torch", "triton")]
        same(f"{name} {block}", *((q.codes, q.scales, q.amax) for q in args))
    for up in ("nearest", "up"):
        args = [
            quantize(x, rounding="stochastic", seed=2**63 + 5, counters=(3, 6, 1), sr_scale=up, backend=backend)
            for backend in ("torch", "triton")
        ]
        same(f"{name} stochastic {up}", *((q.codes, q.scales, q.amax) for q in args))


def flat(*parts):
    return [t for part in parts for t in (part if part is not None else (None,))]


def forms(name, x, recipe):
    torch_, triton_ = load("torch"), load("triton")
    same(f"{name} activation", *(flat(*k.activation(x, recipe, True, True)) for k in (torch_, triton_)))
    draw = Draw(12345, (torch.tensor(7), 10, 2)) if recipe.stochastic_rounding else None
    same(f"{name} gradient", *(flat(*k.gradient(x, recipe, True, True, draw)) for k in (torch_, triton_)))
    packed = torch_.activation(x, recipe, False, True)[1]
    same(f"{name} unpack", *(k.unpack(packed) for k in (torch_, triton_)))
    if x.shape[0] % 16 == 0:
        pair = [k.pack_weight(x, recipe, False) for k in (torch_, triton_)]
        same(f"{name} weight", *pair)
        same(f"{name} weight operand", *(k.weight(x, recipe, False) for k in (torch_, triton_)))
        same(f"{name} unpack weight", *(k.unpack_weight(pair[0], recipe, False) for k in (torch_, triton_)))


def whole_layer():
    g = torch.Generator().manual_seed(5)
    x, w, b, dy = (torch.randn(s, generator=g) for s in ((40, 64), (32, 64), (32,), (40, 32)))
    out = []
    for backend in ("torch", "triton"):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        y = linear(*leaves, backend=backend, seed=9, step=torch.tensor(4), layer_id=3)
        y.backward(dy)
        out.append((y.detach(), *(t.grad for t in leaves)))
    same("layer", *out)


def main():
    families = inputs(16, 64)
    special = families["normal"].clone()
    for name, value in (("nan", torch.nan), ("inf", torch.inf), ("-inf", -torch.inf)):
        special = families["normal"].clone()
        special[3, 5] = value
        families[name] = special
    for name, x in families.items():
        public(name, x)
        forms(name, x, NVFP4Recipe())
    public("bf16", families["normal"].bfloat16())
    public("two tiles", inputs(80, 144)["outlier"])
    big = inputs(80, 144)["outlier"]
    for rows in (80, 37):
        forms(f"{rows} rows", big[:rows], NVFP4Recipe())
        forms(f"{rows} rows up", big[:rows], NVFP4Recipe(sr_scale="up"))
        forms(f"{rows} rows plain", big[:rows], NVFP4Recipe(rht=False, stochastic_rounding=False))
    forms("1-D weights", big, NVFP4Recipe(weight_2d=False, hadamard_signs=(1, -1) * 8))
    whole_layer()
    print("equal:", checks)


if __name__ == "__main__":
    main()
