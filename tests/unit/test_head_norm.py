"""Head gradient norms against autograd."""

import pytest
import torch

from lightning_grad.statistics import head_norm
from lightning_grad.statistics.head_norm import head_grad_norm, head_grad_sketch


def problem(n=5, length=7, width=6, vocabulary=11, dtype=torch.float64):
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, length, width, generator=gen, dtype=dtype)
    weight = torch.randn(vocabulary, width, generator=gen, dtype=dtype).requires_grad_()
    bias = torch.randn(vocabulary, generator=gen, dtype=dtype).requires_grad_()
    targets = torch.randint(vocabulary, (n, length), generator=gen)
    mask = (torch.arange(length) < torch.randint(1, length + 1, (n, 1), generator=gen)).to(dtype)
    return hidden, weight, bias, targets, mask


def by_autograd(hidden, weight, bias, targets, mask, with_bias):
    norms = []
    for h, y, keep in zip(hidden, targets, mask, strict=True):
        logp = torch.log_softmax(h @ weight.T + bias, -1).gather(1, y[:, None])[:, 0]
        grads = torch.autograd.grad((logp * keep).sum(), [weight, bias])
        norms.append(sum(g.square().sum() for g in grads[: 2 if with_bias else 1]).sqrt())
    return torch.stack(norms)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", ["direct", "gram", "auto"])
def test_exact_methods_equal_autograd(method, bias):
    hidden, weight, b, targets, mask = problem()
    logits = (hidden @ weight.T + b).detach()
    got = head_grad_norm(hidden, logits, targets, mask, bias=bias, method=method)
    torch.testing.assert_close(got, by_autograd(hidden, weight, b, targets, mask, bias), rtol=1e-10, atol=0)


def test_half_precision_inputs_are_computed_in_float32():
    hidden, weight, b, targets, mask = problem(dtype=torch.float32)
    hidden = hidden.bfloat16()
    logits = (hidden.float() @ weight.T + b).detach()
    got = head_grad_norm(hidden, logits, targets, mask)
    assert got.dtype == torch.float32
    want = by_autograd(hidden.float(), weight, b, targets, mask, False)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def in_float64(hidden, logits, targets, mask, with_bias):
    """Autograd in float64 at exactly these float32 hidden states and logits."""
    norms = []
    for h, z, y, keep in zip(hidden.double(), logits.double(), targets, mask.double(), strict=True):
        weight = torch.zeros(z.shape[1], h.shape[1], dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(z.shape[1], dtype=torch.float64, requires_grad=True)
        logp = torch.log_softmax(z + h @ weight.T + bias, -1).gather(1, y[:, None])[:, 0]
        grads = torch.autograd.grad((logp * keep).sum(), [weight, bias])
        norms.append(sum(g.square().sum() for g in grads[: 2 if with_bias else 1]).sqrt())
    return torch.stack(norms)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", ["direct", "gram"])
@pytest.mark.parametrize("shape", [(7, 6, 11), (40, 24, 300), (130, 16, 40)])
def test_float32_equals_autograd_to_a_millionth(method, bias, shape, monkeypatch):
    """Flat and confident models, with hidden states far apart and nearly parallel, whole vocabularies and parts."""
    length, width, vocabulary = shape
    gen = torch.Generator().manual_seed(0)
    monkeypatch.setitem(head_norm._CHUNK_BYTES, "cpu", 4 * length * 128)
    for scale, common in [(0.1, 0.0), (0.3, 3.0), (1.0, 1.0), (2.0, 0.0)]:
        hidden = torch.randn(3, length, width, generator=gen) + common * torch.randn(3, 1, width, generator=gen)
        logits = hidden @ (scale * torch.randn(vocabulary, width, generator=gen)).T
        pi = torch.softmax(logits, -1)
        targets = torch.multinomial(pi.flatten(0, 1), 1, generator=gen).view(3, length)
        mask = (torch.arange(length) < torch.randint(length // 2, length + 1, (3, 1), generator=gen)).float()
        got = head_grad_norm(hidden, logits, targets, mask, bias=bias, method=method)
        assert got.dtype == torch.float32
        want = in_float64(hidden, logits, targets, mask, bias)
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ["direct", "gram", "token"])
@pytest.mark.parametrize("common", [-200.0, -20.0, 20.0, 200.0])
@pytest.mark.parametrize("peak", [0.0, 50.0, 120.0])
def test_logits_of_any_size(method, common, peak):
    """Exponentials beyond float32, and a peak outside the columns that are looked at first."""
    hidden, _, _, targets, mask = problem(vocabulary=600, dtype=torch.float32)
    logits = torch.randn(5, 7, 600, generator=torch.Generator().manual_seed(1)) + common
    logits[:, ::2, 599] += peak
    got = head_grad_norm(hidden, logits, targets, mask, method=method)
    want = in_float64(hidden, logits, targets, mask, False)
    if method == "token":
        want = head_grad_norm(hidden.double(), logits.double() - logits.amax(-1, True), targets, mask, method=method)
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-6, atol=0)


def test_a_confident_model_keeps_its_digits():
    """1 - softmax would be 0 in float32 here."""
    logits = torch.zeros(1, 1, 5)
    logits[0, 0, 2] = 20.0
    hidden, targets, mask = torch.ones(1, 1, 4), torch.tensor([[2]]), torch.ones(1, 1)
    for method in ("direct", "gram", "token"):
        got = head_grad_norm(hidden, logits, targets, mask, method=method)
        size = 2.0 if method != "token" else 1.0
        p = torch.tensor(-20.0).double().exp()
        assert float(got) == pytest.approx(float(size * (20 * p * p).sqrt() / (1 + 4 * p)), rel=1e-6)


def test_sketch_is_unbiased_for_the_squared_norm():
    """Mean of 400 sketches within 5 standard errors, 5 samples: false alarm 3e-6."""
    hidden, weight, b, targets, mask = problem(vocabulary=60)
    logits = (hidden @ weight.T + b).detach()
    gen = torch.Generator().manual_seed(1)
    kw = {"method": "sketch", "sketch_dim": 16, "generator": gen}
    draws = torch.stack([head_grad_norm(hidden, logits, targets, mask, **kw).square() for _ in range(400)])
    truth = head_grad_norm(hidden, logits, targets, mask, method="gram").square()
    assert bool(((draws.mean(0) - truth).abs() < 5 * draws.std(0) / 20).all())
    assert bool((draws.std(0) / truth < 2 * (2 / 16) ** 0.5).all())


@pytest.mark.parametrize("method", ["gram", "direct", "sketch", "token"])
def test_samples_are_independent_of_the_chunk_they_are_in(method, monkeypatch):
    hidden, weight, b, targets, mask = problem()
    logits = (hidden @ weight.T + b).detach()

    def norms():
        gen = torch.Generator().manual_seed(0)
        kw = {"method": method, "bias": True, "sketch_dim": 4, "generator": gen}
        return head_grad_norm(hidden, logits, targets, mask, **kw)

    whole = norms()
    monkeypatch.setitem(head_norm._CHUNK_BYTES, "cpu", 2 * 8 * 7 * 11)
    torch.testing.assert_close(norms(), whole, rtol=1e-12, atol=0)


def test_token_norms_have_the_closed_form():
    hidden, weight, b, targets, mask = problem()
    logits = (hidden @ weight.T + b).detach()
    pi = torch.softmax(logits, -1)
    chosen = pi.gather(2, targets[..., None])[..., 0]
    want = ((1 - 2 * chosen + pi.square().sum(-1)) * mask).sum(1).sqrt()
    torch.testing.assert_close(head_grad_norm(hidden, logits, targets, mask, method="token"), want)


def test_nothing_in_nothing_out():
    hidden, weight, b, targets, mask = problem(n=3)
    logits = (hidden @ weight.T + b).detach()
    assert head_grad_norm(hidden[:0], logits[:0], targets[:0], mask[:0]).shape == (0,)
    assert torch.equal(head_grad_norm(hidden, logits, targets, mask * 0), torch.zeros(3).double())


def test_vectors_have_the_dot_products_of_the_gradients(monkeypatch):
    """Mean over 400 sketches within 5 standard errors, 15 pairs of samples: false alarm 1e-5."""
    hidden, weight, b, targets, mask = problem(vocabulary=40)
    logits = (hidden @ weight.T + b).detach()
    gradients = []
    for h, y, keep in zip(hidden, targets, mask, strict=True):
        logp = torch.log_softmax(h @ weight.T + b, -1).gather(1, y[:, None])[:, 0]
        grads = torch.autograd.grad((logp * keep).sum(), [weight, b])
        gradients.append(torch.cat([g.flatten() for g in grads]))
    truth = torch.stack(gradients) @ torch.stack(gradients).T
    monkeypatch.setitem(head_norm._CHUNK_BYTES, "cpu", 8 * 7 * 16)  # in parts of the vocabulary
    gen = torch.Generator().manual_seed(1)
    sketches = [head_grad_sketch(hidden, logits, targets, mask, bias=True, dim=16, generator=gen) for _ in range(400)]
    draws = torch.stack([v @ v.T for v in sketches])
    assert bool(((draws.mean(0) - truth).abs() < 5 * draws.std(0) / 20).all())
    size = truth.diagonal()
    spread = draws.std(0) / (size[:, None] * size).sqrt()
    assert bool((spread < 2 * (3 / 16) ** 0.5).all())
    assert head_grad_sketch(hidden[:0], logits[:0], targets[:0], mask[:0], dim=8).shape == (0, 8)
