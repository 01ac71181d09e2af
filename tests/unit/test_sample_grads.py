"""Per-sample norms and inner products, layer by layer, against autograd on one sample at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_grad.statistics.ghost import GhostRecorder, UnsupportedLayerError, outer_sq_norms, unsupported
from lightning_grad.statistics.sample_grads import (
    loss_of_model,
    per_sample_grads,
    per_sample_inner,
    per_sample_sq_norms,
)


def mse(output, y):
    return (output - y).square().flatten(1).mean(1).mean()


def one_by_one(model, loss_fn, x, y):
    """[b, d] gradients from b separate backward passes: the oracle."""
    params = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in range(len(x)):
        grads = torch.autograd.grad(loss_fn(model(x[i : i + 1]), y[i : i + 1]), params)
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows)


class Tokens(nn.Module):
    def __init__(self, padding_idx=None):
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=padding_idx)
        self.norm = nn.LayerNorm(6)
        self.rms = nn.RMSNorm(6)
        self.q, self.k, self.v = (nn.Linear(6, 6, bias=i > 0) for i in range(3))
        self.head = nn.Linear(6, 3)

    def forward(self, z):
        h = self.norm(self.embed(z))
        h = h + F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h), is_causal=True)
        return self.head(self.rms(h))


CASES = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), (9, 5), (9, 3)),
    "sequence, Gram": (lambda: nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)), (4, 3, 16), (4, 3, 16)),
    "sequence, direct": (lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)), (4, 17, 2), (4, 17, 2)),
    "two middle axes": (lambda: nn.Linear(4, 3), (5, 2, 6, 4), (5, 2, 6, 3)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, stride=2), (5, 4, 9), (5, 6, 5)),
    "conv2d grouped, dilated, strided": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), nn.Tanh(), nn.Conv2d(6, 2, 1)
        ),
        (5, 4, 9, 9),
        (5, 2, 5, 5),
    ),
    "conv2d same padding": (lambda: nn.Conv2d(3, 4, (3, 2), padding="same"), (5, 3, 6, 7), (5, 4, 6, 7)),
    "conv2d circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (5, 3, 6, 7), (5, 4, 6, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, groups=2), (3, 2, 4, 4, 4), (3, 4, 3, 3, 3)),
    "group norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.ReLU()),
        (5, 3, 6, 6),
        (5, 6, 4, 4),
    ),
    "layer norm of an image": (
        lambda: nn.Sequential(nn.LayerNorm((3, 4)), nn.Linear(4, 2)),
        (5, 2, 3, 4),
        (5, 2, 3, 2),
    ),
    "batch norm, eval": (lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).eval(), (6, 5), (6, 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_every_rule_equals_separate_backward_passes(name):
    build, x_shape, y_shape = CASES[name]
    model = build().double()
    for p in model.parameters():  # away from the special values of a fresh norm layer
        nn.init.normal_(p, std=0.5)
    x, y = torch.randn(x_shape, dtype=torch.float64), torch.randn(y_shape, dtype=torch.float64)
    check(model, mse, x, y)


def check(model, loss_fn, x, y):
    rows = one_by_one(model, loss_fn, x, y)
    norms = rows.square().sum(1)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    direction = {n: torch.randn_like(dict(model.named_parameters())[n]) for n in names}
    for module_name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            # a gradient is zero there by convention, which a forward-mode derivative does not know
            direction[f"{module_name}.weight"][module.padding_idx] = 0
    inner = rows @ torch.cat([direction[n].reshape(-1) for n in names])
    for method in ("ghost", "vmap"):
        torch.testing.assert_close(per_sample_sq_norms(model, loss_fn, x, y, method), norms, rtol=1e-10, atol=0)
    for method in ("ghost", "jvp"):
        got = per_sample_inner(model, loss_fn, x, y, direction, method)
        torch.testing.assert_close(got, inner, rtol=1e-10, atol=1e-10 * float(norms.max()))


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_transformer_block_with_embedding(padding_idx):
    model = Tokens(padding_idx).double()
    z = torch.randint(0, 11, (6, 8))
    z[:, 2:4] = 3  # repeated tokens, and padding when there is a padding index

    def loss_fn(output, y):
        return F.cross_entropy(output.flatten(0, 1), y.flatten())

    check(model, loss_fn, z, torch.randint(0, 3, (6, 8)))


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    check(model, mse, torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64))


def test_batch_norm_in_training_mode_splits_the_batch_gradient_and_vmap_refuses():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    grads = torch.autograd.grad(mse(model(x), y), list(model.parameters()))
    direction = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    # contributions along the paths through each sample add up to the batch gradient
    total = sum(float((g * d).sum()) for g, d in zip(grads, direction.values(), strict=True))
    assert float(per_sample_inner(model, mse, x, y, direction).mean()) == pytest.approx(total, rel=1e-10)
    for call in (
        lambda: per_sample_sq_norms(model, mse, x, y, "vmap"),
        lambda: per_sample_inner(model, mse, x, y, direction, "jvp"),
    ):
        with pytest.raises(ValueError, match="allow_batchnorm=True"):
            call()


@pytest.mark.parametrize("memory_mb", [1e-9, 256])
def test_chunks_do_not_change_the_result(memory_mb):
    a, d = torch.randn(5, 4, 3, dtype=torch.float64), torch.randn(5, 4, 2, dtype=torch.float64)
    expected = torch.einsum("btq,btp->bqp", d, a).square().sum((1, 2))
    torch.testing.assert_close(outer_sq_norms(a, d, memory_mb), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_per_sample_grads_in_chunks(chunk):
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(5, 5, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    parts = list(per_sample_grads(loss_of_model(model, mse), dict(model.named_parameters()), (x, y), chunk_size=chunk))
    assert [len(part["0.bias"]) for part in parts] == [min(chunk, 5 - i) for i in range(0, 5, chunk)]
    rows = torch.cat([torch.cat([g.flatten(1) for g in part.values()], 1) for part in parts])
    torch.testing.assert_close(rows, one_by_one(model, mse, x, y), rtol=1e-12, atol=1e-14)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, z):
        return self.head(self.embed(z))


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.position = nn.Embedding(5, 4), nn.Embedding(7, 4)

    def forward(self, z):
        return self.embed(z) + self.position(torch.arange(z.shape[1]))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(self.layer(x))


class Bypassed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(x, self.layer.weight, self.layer.bias)


class Odd(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def test_what_the_rules_cannot_do_is_refused_by_name():
    assert unsupported(Tied()) == ["head.weight", "embed.weight"]
    assert unsupported(nn.LSTM(3, 4))
    assert unsupported(nn.MultiheadAttention(4, 2)) == ["in_proj_weight", "in_proj_bias"]
    assert unsupported(Odd(3, 3)) == ["weight", "bias"]
    assert unsupported(nn.Embedding(5, 3, scale_grad_by_freq=True)) == ["weight"]
    with pytest.raises(UnsupportedLayerError, match=r"embed\.weight"):
        GhostRecorder(Tied())
    z = torch.randint(0, 5, (3, 7))
    with pytest.raises(UnsupportedLayerError, match=r"position\.weight.*first axis"):
        per_sample_sq_norms(Positions(), mse, z, torch.randn(3, 7, 4))
    with pytest.raises(UnsupportedLayerError, match="used twice"):
        per_sample_sq_norms(Twice(), mse, torch.randn(3, 4), torch.randn(3, 4))


def test_a_layer_whose_forward_is_bypassed_is_noticed():
    model = Bypassed()
    recorder = GhostRecorder(model)
    recorder.start(3)
    model(torch.randn(3, 4)).sum().backward()
    with pytest.raises(UnsupportedLayerError, match="did not come through its layer"):
        recorder.sq_norms()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    torch.manual_seed(3)
    first, second = nn.Linear(5, 6).double(), nn.Linear(6, 3).double()
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randn(4, 3, dtype=torch.float64)

    class Saved(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x):
            hidden = torch.utils.checkpoint.checkpoint(lambda t: torch.tanh(self.first(t)), x, use_reentrant=reentrant)
            return self.second(hidden)

    model = Saved()
    recorder = GhostRecorder(model)
    recorder.start(4)
    mse(model(x), y).backward()
    got = torch.stack(list(recorder.sq_norms().values())).sum(0) * 16
    plain = nn.Sequential(first, nn.Tanh(), second)
    torch.testing.assert_close(got, one_by_one(plain, mse, x, y).square().sum(1), rtol=1e-10, atol=0)


def test_autocast_activations_are_measured_in_float32():
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(6, 5), torch.randn(6, 3)
    exact = per_sample_sq_norms(model, mse, x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = per_sample_sq_norms(model, mse, x, y)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.1, atol=0)  # a handful of roundings of 2^-8


def test_dropout_gives_different_masks_to_different_samples():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 1))
    x, y = torch.ones(4, 64), torch.zeros(4, 1)
    norms = per_sample_sq_norms(model, mse, x, y, "vmap")
    assert len(norms.unique()) > 1
