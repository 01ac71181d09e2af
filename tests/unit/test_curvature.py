"""Hessian-vector products, Lanczos, traces: against known spectra and the full Hessian."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_grad.statistics.curvature import HessianOperator, adam_scale, rademacher
from lightning_grad.statistics.curvature_lanczos import _orthogonalize, lanczos, spectrum
from lightning_grad.statistics.curvature_trace import hutchinson, hutchpp
from lightning_grad.statistics.stability import curvature_lr, heavy_ball, stability_limits

EIGENVALUES = [0.7030495649, 0.5982688796, 0.5279825452, 0.4101677145, 0.3949962586]


def symmetric(size, seed=0):
    a = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (a + a.T) / 2


def golden_mlp(dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(64, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (64,), generator=generator)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5)
    net, x = net.to(dtype), x.to(dtype)
    return net, lambda: F.cross_entropy(net(x), y)


def full_hessian(net, loss, mode="autograd"):
    with HessianOperator(loss, list(net.parameters()), mode) as hessian:
        eye = torch.eye(hessian.size, dtype=hessian.dtype)
        return torch.stack([hessian(v) for v in eye])


def test_products_are_those_of_the_full_hessian():
    net, _ = golden_mlp()
    generator = torch.Generator().manual_seed(7)
    x, y = (
        torch.randn(64, 6, generator=generator, dtype=torch.float64),
        torch.randint(0, 3, (64,), generator=generator),
    )
    names, params = zip(*net.named_parameters(), strict=True)
    flat = torch.cat([p.detach().reshape(-1) for p in params])

    def loss_of(w):
        parts = w.split([p.numel() for p in params])
        weights = {n: part.view_as(p) for n, part, p in zip(names, parts, params, strict=True)}
        return F.cross_entropy(torch.func.functional_call(net, weights, (x,)), y)

    expected = torch.func.hessian(loss_of)(flat)
    loss = lambda: F.cross_entropy(net(x), y)  # noqa: E731
    assert (full_hessian(net, loss) - expected).abs().max() < 1e-12
    assert (full_hessian(net, loss, "finite_difference") - expected).abs().max() < 1e-8


def test_golden_spectrum():
    net, loss = golden_mlp()
    with HessianOperator(loss, list(net.parameters())) as hessian:
        assert hessian.size == 83
        start = (torch.randint(0, 2, (83,), generator=torch.Generator().manual_seed(3)) * 2 - 1).double()
        for k, largest in ((5, 0.6823715160), (10, 0.7030168644), (20, EIGENVALUES[0])):
            assert float(lanczos(hessian, start, k).ritz()[0].max()) == pytest.approx(largest, abs=1e-9)
        assert hessian.num_products == 35
    h = full_hessian(net, loss)
    values = torch.linalg.eigvalsh(h)
    assert values.flip(0)[:5].tolist() == pytest.approx(EIGENVALUES, abs=1e-9)
    assert float(values[0]) == pytest.approx(-0.3814248580, abs=1e-9)
    assert float(h.trace()) == pytest.approx(3.1568133760, abs=1e-8)
    assert float((h**2).sum()) == pytest.approx(2.6769732969, abs=1e-8)


def test_float32_and_finite_differences_are_close():
    net, loss = golden_mlp(torch.float32)
    exact, difference = full_hessian(net, loss), full_hessian(net, loss, "finite_difference")
    assert float((difference - exact).norm() / exact.norm()) < 1e-3
    assert float(torch.linalg.eigvalsh(exact.double()).max()) == pytest.approx(EIGENVALUES[0], rel=1e-5)


@pytest.mark.parametrize("mode", ["autograd", "finite_difference"])
def test_nothing_changes_and_dropout_is_frozen(mode):
    net = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(0.5), nn.Linear(7, 1)).double()
    x = torch.randn(9, 5, dtype=torch.float64)
    net(x).sum().backward()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    grads = [p.grad.clone() for p in net.parameters()]
    state = torch.get_rng_state()
    with HessianOperator(lambda: net(x).square().mean(), list(net.parameters()), mode, module=net) as hessian:
        v, w = torch.randn(2, hessian.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        a, b = hessian(v), hessian(w)
        assert torch.equal(hessian(v), a), "the dropout mask moved"
        assert torch.allclose(v @ b, w @ a, rtol=1e-6), "not symmetric"
        assert torch.allclose(hessian(v + w), a + b, rtol=1e-4, atol=1e-7)
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, net.parameters(), strict=True))
    assert all(p.requires_grad for p in net.parameters())


def test_attention_has_curvature_by_either_mode():
    torch.manual_seed(0)
    qkv = nn.Linear(8, 24).double()
    x = torch.randn(2, 6, 8, dtype=torch.float64)

    def loss():
        q, k, v = qkv(x).view(2, 6, 3, 2, 4).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).square().mean()

    with HessianOperator(loss, list(qkv.parameters())) as hessian:
        v = rademacher(hessian.size, 0, dtype=torch.float64)
        exact = hessian(v)
        assert hessian.mode == "autograd"
    with HessianOperator(loss, list(qkv.parameters()), "finite_difference") as hessian:
        assert torch.allclose(hessian(v), exact, rtol=1e-5, atol=1e-8)


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x**4).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * 4 * ctx.saved_tensors[0] ** 3


def test_falls_back_only_in_auto_mode():
    w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    with HessianOperator(lambda: OnceDifferentiable.apply(w), [w]) as hessian:
        assert hessian(torch.ones(2)).tolist() == pytest.approx([12.0, 48.0], rel=1e-8)
        assert hessian.mode == "finite_difference"
    with HessianOperator(lambda: OnceDifferentiable.apply(w), [w], "autograd") as hessian, pytest.raises(RuntimeError):
        hessian(torch.ones(2))


def test_the_gradient_falls_back_too():
    w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    with HessianOperator(lambda: OnceDifferentiable.apply(w), [w]) as hessian:
        assert hessian.gradient().tolist() == [4.0, 32.0]
        assert hessian.mode == "finite_difference"


def test_a_buffer_that_is_replaced_is_put_back():
    class Counts(nn.Linear):
        def __init__(self):
            super().__init__(2, 1)
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("none", None)

        def forward(self, x):
            self.calls = self.calls + 1
            return super().forward(x)

    net = Counts()
    kept = net.calls
    with HessianOperator(lambda: net(torch.ones(3, 2)).square().sum(), list(net.parameters()), module=net) as hessian:
        hessian(torch.ones(3))
        assert float(net.calls) == 1
    assert net.calls is kept
    assert float(kept) == 0


def test_a_linear_loss_has_no_curvature():
    w = torch.ones(3, requires_grad=True)
    unused = torch.ones(2, requires_grad=True)
    with HessianOperator(lambda: (2 * w).sum(), [w, unused]) as hessian:
        assert hessian(torch.ones(5)).tolist() == [0.0] * 5
        assert hessian.gradient().tolist() == [2.0, 2.0, 2.0, 0.0, 0.0]
        found = lanczos(hessian, torch.ones(5), 4)
        assert found.ritz()[0].tolist() == [0.0]


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ([], "at least one parameter"),
        ([torch.ones(2, dtype=torch.bfloat16, requires_grad=True)], "bfloat16"),
        ([torch.ones(2, dtype=torch.complex64, requires_grad=True)], "complex64"),
        ([torch.ones(2)], "requires_grad"),
        ([torch.ones(1, requires_grad=True), torch.ones(1, dtype=torch.float64, requires_grad=True)], "one device and"),
    ],
)
def test_refused_by_name(params, text):
    with pytest.raises(ValueError, match=text):
        HessianOperator(lambda: torch.zeros(()), params)


def test_sparse_gradients_are_refused():
    table = nn.Embedding(5, 3, sparse=True)
    with (
        HessianOperator(lambda: table(torch.tensor([1, 2])).square().sum(), list(table.parameters())) as hessian,
        pytest.raises(ValueError, match="sparse=False"),
    ):
        hessian(torch.ones(15))


def test_adams_preconditioner():
    net, loss = golden_mlp()
    params = list(net.parameters())
    optimizer = torch.optim.Adam(params, lr=1e-2, betas=(0.8, 0.9), eps=1e-3)
    with pytest.raises(ValueError, match="second moments"):
        adam_scale(optimizer, params)
    for _ in range(3):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    v = torch.cat([optimizer.state[p]["exp_avg_sq"].reshape(-1) for p in params]) / (1 - 0.9**3)
    scale = adam_scale(optimizer, params)
    assert torch.allclose(scale, 1 / (v.sqrt() + 1e-3).sqrt(), rtol=1e-12)
    h = full_hessian(net, loss)
    with HessianOperator(loss, params, scale=scale) as hessian:
        x = rademacher(83, 5, dtype=torch.float64)
        assert torch.allclose(hessian(x), scale * (h @ (scale * x)), rtol=1e-9, atol=1e-12)


def test_adams_preconditioner_leaves_out_what_never_had_a_gradient():
    used, unused = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = torch.optim.Adam([used, unused], lr=1e-2)
    used.sum().backward()
    optimizer.step()
    assert adam_scale(optimizer, [unused, used]).tolist() == pytest.approx([0, 0, 0, 1, 1], abs=1e-6)


# Lanczos


def test_full_lanczos_finds_the_whole_spectrum():
    a = symmetric(40)
    found = lanczos(lambda v: a @ v, rademacher(40, 1, dtype=torch.float64), 40)
    assert torch.allclose(found.ritz()[0], torch.linalg.eigvalsh(a), atol=1e-10)
    assert torch.allclose(found.basis @ found.basis.T, torch.eye(40, dtype=torch.float64), atol=1e-12)


def test_orthogonal_where_once_is_not_enough():
    """Nearly all of the vector lies in the span; and the basis of twenty products stays orthogonal in float32."""
    basis = torch.linalg.qr(symmetric(60))[0][:10]
    w = 1e9 * basis.sum(0) + torch.ones(60, dtype=torch.float64)
    assert _orthogonalize(w, basis) == pytest.approx(float(w.norm()))
    assert (basis @ w).abs().max() < 1e-12
    values = torch.logspace(-9, 0, 5000)
    found = lanczos(lambda v: values * v, rademacher(5000, 0), 20)
    assert (found.basis @ found.basis.T - torch.eye(20)).abs().max() < 1e-5


def test_extremes_of_a_known_spectrum():
    values = torch.cat([torch.logspace(-6, 0, 197, dtype=torch.float64), torch.tensor([-3.0, 7.0, 50.0])])
    q = torch.linalg.qr(symmetric(200))[0]
    a = q @ torch.diag(values) @ q.T
    found = lanczos(lambda v: a @ v, rademacher(200, 0, dtype=torch.float64), 20)
    ritz = found.ritz()[0]
    assert float(ritz[-1]) == pytest.approx(50.0, abs=1e-8)
    assert float(ritz[0]) == pytest.approx(-3.0, abs=1e-8)
    vector = found.vector(-1)
    assert float((a @ vector - 50.0 * vector).norm()) < 1e-6
    assert float(found.error_bounds()[-1]) < 1e-6


def test_twenty_products_give_the_extreme_of_a_million_parameters_to_a_percent():
    """The network of benchmarks/bench_curvature.py at the start, where convergence is slowest; float32."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 992), nn.ReLU(), nn.Linear(992, 992), nn.ReLU(), nn.Linear(992, 10))
    x, y = torch.rand(64, 64), torch.randint(0, 10, (64,))
    with HessianOperator(lambda: F.cross_entropy(net(x), y), list(net.parameters())) as hessian:
        assert hessian.size > 1_000_000
        few = float(lanczos(hessian, rademacher(hessian.size, 1), 20).ritz()[0][-1])
        assert hessian.num_products == 20
        run = lanczos(hessian, rademacher(hessian.size, 2), 45)
    many = float(run.ritz()[0][-1])
    assert float(run.error_bounds()[-1]) < 1e-4 * many  # so near to an eigenvalue
    assert few == pytest.approx(many, rel=0.01)


def test_quadrature_is_exact_for_low_moments():
    a = symmetric(60) / 10
    v = rademacher(60, 2, dtype=torch.float64)
    k = 6
    theta, weights = lanczos(lambda x: a @ x, v, k).ritz()
    power = v / v.norm()
    for j in range(2 * k):
        assert float(weights @ theta**j) == pytest.approx(float(v @ power / v.norm()), rel=1e-10, abs=1e-12)
        power = a @ power


def test_breakdown_gives_a_shorter_exact_answer():
    a = torch.diag(torch.tensor([2.0, 2.0, 2.0, 5.0], dtype=torch.float64))
    one = lanczos(lambda v: a @ v, torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64), 4)
    assert one.ritz()[0].tolist() == [2.0]
    assert one.residual == 0.0
    two = lanczos(lambda v: a @ v, torch.ones(4, dtype=torch.float64), 4)
    assert two.ritz()[0].tolist() == pytest.approx([2.0, 5.0], abs=1e-12)
    assert two.ritz()[1].tolist() == pytest.approx([0.75, 0.25], abs=1e-12)


def test_bad_input_of_lanczos():
    with pytest.raises(ValueError, match="not zero"):
        lanczos(lambda v: v, torch.zeros(3), 2)
    with pytest.raises(FloatingPointError, match="Product 1"):
        lanczos(lambda v: v * math.nan, torch.ones(3), 2)
    with pytest.raises(ValueError, match="full"):
        lanczos(lambda v: v, torch.ones(3), 2, "none").vector(0)


def test_without_reorthogonalization_the_extremes_stay_right():
    a = torch.diag(torch.cat([torch.linspace(0, 1, 99), torch.tensor([10.0])]).double())
    found = lanczos(lambda v: a @ v, rademacher(100, 0, dtype=torch.float64), 60, "none")
    assert float(found.ritz()[0].max()) == pytest.approx(10.0, abs=1e-8)
    assert int((found.ritz()[0] > 9).sum()) > 1, "no copies: this spectrum does not test the mode"


def test_density_integrates_to_one_and_to_the_trace():
    a = symmetric(50)
    found = spectrum(lambda v: a @ v, 50, k=50, num_probes=2, dtype=torch.float64)
    t = torch.linspace(-20, 20, 20001, dtype=torch.float64)
    density = found.density(t, 0.2)
    assert float(torch.trapezoid(density, t)) == pytest.approx(1.0, abs=1e-6)
    assert float(torch.trapezoid(density * t, t)) * 50 == pytest.approx(found.trace, rel=1e-6, abs=1e-6)
    assert found.largest == pytest.approx(float(torch.linalg.eigvalsh(a)[-1]), abs=1e-9)


# Traces. z-scores of 200 independent estimates: the mean of a right estimator fails the 4-sigma bound in 1 of 16,000
# seeds, and the seeds here are fixed.


def z_score(samples, truth):
    x = torch.tensor(samples, dtype=torch.float64)
    return float((x.mean() - truth) / (x.std() / len(samples) ** 0.5))


def test_trace_estimates_are_unbiased():
    a = symmetric(30) + torch.diag(torch.linspace(0, 3, 30).double())
    matvec = lambda v: a @ v  # noqa: E731
    pairs = [hutchinson(matvec, 30, 2, seed=1000 * i, dtype=torch.float64) for i in range(200)]
    assert abs(z_score([t.value for t, _ in pairs], float(a.trace()))) < 4
    assert abs(z_score([f.value for _, f in pairs], float((a**2).sum()))) < 4
    plus = [hutchpp(matvec, 30, 9, seed=1000 * i, dtype=torch.float64).value for i in range(200)]
    assert abs(z_score(plus, float(a.trace()))) < 4
    lanczos_based = [spectrum(matvec, 30, 3, seed=1000 * i, dtype=torch.float64) for i in range(200)]
    assert abs(z_score([s.trace for s in lanczos_based], float(a.trace()))) < 4
    assert abs(z_score([s.frobenius_sq for s in lanczos_based], float((a**2).sum()))) < 4


def test_standard_errors_cover():
    """A 2-standard-error interval of 30 probes should hold the truth in about 95 % of cases; 200 cases."""
    a = symmetric(30)
    hits = 0
    for i in range(200):
        trace, _ = hutchinson(lambda v: a @ v, 30, 30, seed=1000 * i, dtype=torch.float64)
        hits += abs(trace.value - float(a.trace())) < 2 * trace.error
    assert 180 <= hits <= 199  # binomial(200, 0.945): outside in fewer than 1 of 500 draws


def test_hutchpp_is_exact_for_low_rank_and_better_for_decay():
    u = symmetric(50)[:, :3]
    low = u @ u.T
    assert hutchpp(lambda v: low @ v, 50, 12, dtype=torch.float64).value == pytest.approx(float(low.trace()), rel=1e-10)
    q = torch.linalg.qr(symmetric(100))[0]
    a = q @ torch.diag(torch.arange(1, 101).double() ** -2.0) @ q.T
    truth = float(a.trace())
    errors = [
        (
            hutchpp(lambda v: a @ v, 100, 30, seed=s, dtype=torch.float64).value - truth,
            hutchinson(lambda v: a @ v, 100, 30, seed=s, dtype=torch.float64)[0].value - truth,
        )
        for s in range(0, 4000, 100)
    ]
    plus, plain = (sum(e[i] ** 2 for e in errors) ** 0.5 for i in (0, 1))
    assert plus < plain / 5


# Limits of the learning rate


def linear_problem():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    return rows, rows.T @ rows / 12


@pytest.mark.parametrize("batch", [1, 2, 4, 6, 12])
def test_the_limit_is_necessary(batch):
    """The exact mean-square threshold of SGD on a linear problem, checked on all batches there are, is below it."""
    rows, h = linear_problem()
    n, d = rows.shape
    p = (n - batch) / (batch * (n - 1))
    eye = torch.eye(d, dtype=torch.float64)
    c = (torch.kron(h, eye) + torch.kron(eye, h)) / 2
    each = sum(torch.kron(torch.outer(a, a), torch.outer(a, a)) for a in rows) / n
    second = (1 - p) * torch.kron(h, h) + p * each
    exact = 2 / float(torch.linalg.eigvals(torch.linalg.pinv(c) @ second).real.max())
    hessians = torch.stack([(z := rows[list(b)]).T @ z / batch for b in itertools.combinations(range(n), batch)])
    for lr, stable in ((0.99 * exact, True), (1.01 * exact, False)):  # mean of the square of a step, as a matrix
        moves = eye - lr * hessians
        moment = torch.einsum("bij,bkl->ikjl", moves, moves).reshape(d * d, d * d) / len(moves)
        assert (float(torch.linalg.eigvals(moment).abs().max()) < 1.0) is stable
    limits = stability_limits(
        float(h.trace()), float((h**2).sum()), float(torch.linalg.eigvalsh(h)[-1]), batch, dataset_size=n
    )
    assert exact <= limits["limit"] * (1 + 1e-9)
    assert limits["limit"] == min(limits["gd"], limits["sgd"])
    if batch == 1:
        assert limits["sgd"] == pytest.approx(2 / float(h.trace()), rel=1e-12)
    if batch == n:
        assert exact == pytest.approx(limits["gd"], rel=1e-9)


def test_heavy_ball_contracts_as_polyak_says():
    largest, mu = 0.70305, 0.01
    lr, beta = heavy_ball(largest, mu)
    assert (lr, beta) == pytest.approx((4.5416, 0.61920), rel=1e-4)
    assert curvature_lr(largest, beta) == pytest.approx(lr, rel=1e-12)
    curvatures = torch.linspace(mu, largest, 20, dtype=torch.float64)

    def distance(lr, steps):
        x = torch.ones(20, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([x], lr=lr, momentum=beta)
        for _ in range(steps):
            optimizer.zero_grad()
            (0.5 * curvatures * x**2).sum().backward()
            optimizer.step()
        return float(x.detach().norm())

    rate = (distance(lr, 300) / distance(lr, 100)) ** (1 / 200)
    assert rate == pytest.approx(math.sqrt(beta), rel=0.02)
    edge = curvature_lr(largest, beta, "edge")
    assert distance(0.99 * edge, 2000) < 1e-3
    assert distance(1.01 * edge, 2000) > 1e3


def test_nesterovs_edge():
    for beta in (0.5, 0.9):
        for factor, stable in ((0.99, True), (1.01, False)):
            x = torch.ones(1, dtype=torch.float64, requires_grad=True)
            lr = factor * curvature_lr(3.0, beta, "edge", nesterov=True)
            optimizer = torch.optim.SGD([x], lr=lr, momentum=beta, nesterov=True)
            for _ in range(2000):
                optimizer.zero_grad()
                (1.5 * x**2).sum().backward()
                optimizer.step()
            assert (float(x.detach().abs()) < 1e-3) is stable


def test_no_limit_without_positive_curvature():
    assert stability_limits(-1.0, 1.0, -0.5, 4)["limit"] == math.inf
    assert math.isnan(stability_limits(1.0, 1.0, 0.5, 4, momentum=0.9)["sgd"])
    with pytest.raises(ValueError, match="batch_size"):
        stability_limits(1.0, 1.0, 1.0, 0)
