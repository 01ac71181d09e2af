"""Head gradient norms against autograd."""

import pytest
import torch

from lightning_grad.statistics import head_norm
from lightning_grad.statistics.head_norm import head_grad_norm


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
