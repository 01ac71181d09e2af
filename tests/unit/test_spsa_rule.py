"""From codes to coefficients: unbiasedness, the exact second moment, the scale, momentum (oracles 4, 5, 8, 11)."""

import math
import random
import warnings
from itertools import product

import pytest
import torch

from lightning_grad.spsa import Header, JournalError, Record, ScaleTracker, UpdateRule, quantize
from lightning_grad.spsa.engine import changes
from lightning_grad.spsa.rule import Quantized


def header(**values):
    base = {
        "run_id": "0" * 16, "seed": 0, "eps_log2": -10, "codec": "e4m3", "directions": 1, "reduction": "mean",
        "normalize": False, "rho": 0.9, "scale_log2": 0, "clip": None, "momentum": 0.0, "momentum_horizon": 32,
        "params": (("w", (3,), "float32"),), "base": "00",
    }  # fmt: skip
    return Header(**{**base, **values})


def advance(rule, values, lr=0.5, workers=None):
    """One step in which worker ``i`` measured ``values[i]``."""
    codes = b"".join(rule.encode(v) for v in values)
    return rule.advance(Record(codes, lr, tuple(range(len(values))) if workers is None else workers))


def test_estimate_is_unbiased_and_its_variance_is_d():
    """Linear function, all 2**12 sign vectors (oracle 4)."""
    gradient = torch.linspace(-1.3, 2.1, 12, dtype=torch.float64)
    z = torch.tensor(list(product([-1.0, 1.0], repeat=12)), dtype=torch.float64)
    estimates = (z @ gradient)[:, None] * z
    assert (estimates.mean(0) - gradient).abs().max() < 1e-14
    assert math.isclose(float(estimates.square().sum(1).mean()), 12 * float(gradient.square().sum()), rel_tol=1e-13)


def test_central_difference_bias_on_a_cubic_is_exactly_the_third_order_term():
    c = torch.linspace(-2, 2, 12, dtype=torch.float64)
    x = torch.linspace(0.5, 1.5, 12, dtype=torch.float64)
    eps = 2.0**-3
    z = torch.tensor(list(product([-1.0, 1.0], repeat=12)), dtype=torch.float64)

    def f(y):
        return (c * y**3 / 6).sum(-1)

    g = (f(x + eps * z) - f(x - eps * z)) / (2 * eps)
    mean = (g[:, None] * z).mean(0)
    assert (mean - c * x**2 / 2 - eps**2 / 6 * c).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("n", "lr", "codec"), [(1, 0.06, "f32"), (1, 0.06, "e4m3"), (4, 0.18, "e4m3"), (16, 0.5, "e4m3")]
)
def test_quadratic_follows_the_exact_second_moment(n, lr, codec):
    """E f of a quadratic with spectrum 1/i (oracle 5); 100 seeds, 4.5 standard errors (false alarm 4e-5 in all)."""
    d, seeds = 200, 100
    curvature = 1.0 / torch.arange(1, d + 1, dtype=torch.float64)
    s = torch.ones(d, dtype=torch.float64)
    expected = {}
    for t in range(1, 101):
        noise = (1 - 1 / n) * curvature**2 * s + (curvature**2 * s).sum() / n
        s = (1 - 2 * lr * curvature) * s + lr**2 * noise
        if t % 20 == 0:
            expected[t] = float((curvature * s).sum() / 2)
    published = {1: [2.0631, 1.7446, 1.5537, 1.4161, 1.3086], 4: [1.511, 1.1793, 0.986, 0.8513, 0.749]}
    published[16] = [0.9885, 0.6742, 0.5043, 0.394, 0.3158]
    assert list(expected.values()) == pytest.approx(published[n], abs=6e-5)
    x = torch.ones(seeds, d, dtype=torch.float64)
    rules = [UpdateRule(header(codec=codec, scale_log2=-2)) for _ in range(seeds)]
    generator = torch.Generator().manual_seed(n)
    for t in range(1, 101):
        z = torch.randint(0, 2, (seeds, n, d), generator=generator).double() * 2 - 1
        g = torch.einsum("snd,sd->sn", z, curvature * x)  # a central difference is exact on a quadratic
        updates = [advance(rule, row, lr) for rule, row in zip(rules, g.tolist(), strict=True)]
        c = torch.tensor([[term[2] for term in full(update, n)] for update in updates])
        x = x - torch.einsum("sn,snd->sd", c.double(), z)
        if t in expected:
            values = (curvature * x * x).sum(1) / 2
            error = values.std() / math.sqrt(seeds)
            assert abs(values.mean() - expected[t]) < 4.5 * error, (t, values.mean(), expected[t], error)


def full(update, n):
    found = {d: c for _, d, c in update.terms}
    return [(0, d, found.get(d, 0.0)) for d in range(n)]


def test_scale_keeps_the_rms_between_four_and_eight_units():
    for value in (1e-30, 3.9e-5, 1.0, 7.99, 8.0, 12345.6):
        tracker = ScaleTracker()
        tracker.observe([value, -value])
        assert 4.0 <= value / 2.0**tracker.scale_log2 < 8.0
    tracker.observe([])
    assert tracker.m2 == 12345.6**2
    frozen = ScaleTracker(adapt=False)
    frozen.observe([100.0])
    assert frozen.scale_log2 == 0


def test_zero_everywhere_keeps_scale_and_changes_nothing():
    rule = UpdateRule(header(normalize=True))
    update = advance(rule, [0.0, -0.0])
    assert update.terms == []
    assert (rule.tracker.m2, rule.tracker.scale_log2, rule.bad_steps) == (0.0, 0, 0)


def test_all_abstain_counts_as_a_step_and_changes_nothing_else():
    rule = UpdateRule(header(momentum=0.5))
    advance(rule, [1.0, 2.0])
    before = (rule.tracker.m2, rule.tracker.scale_log2)
    update = advance(rule, [math.nan, math.inf])
    assert update.terms == []
    assert update.abstained == 2
    assert (rule.tracker.m2, rule.tracker.scale_log2) == before
    assert (rule.step, rule.bad_steps) == (2, 1)


@pytest.mark.parametrize(("reduction", "want"), [("mean", 0.25), ("rsqrt", 0.5), ("sum", 1.0)])
def test_reduction_counts_only_those_who_answered(reduction, want):
    update = advance(UpdateRule(header(reduction=reduction)), [1.0, 1.0, math.nan, 1.0, 1.0], lr=1.0)
    assert [(d, c) for _, d, c in update.terms] == [(d, want) for d in (0, 1, 3, 4)]


def test_direction_ids_follow_worker_ids_not_positions():
    rule = UpdateRule(header(directions=2))
    update = rule.advance(Record(b"\x38\x38\x38\x38", 1.0, (3, 9)))
    assert [d for _, d, _ in update.terms] == [6, 7, 18, 19]


def test_clip_acts_on_both_sides_and_needs_history():
    rule = UpdateRule(header(clip=2.0, codec="f32", rho=0.0))
    first = advance(rule, [100.0], lr=1.0)
    assert first.values == [100.0]  # nothing to compare with yet
    assert rule.clip(1e6) == 200.0
    receiver = UpdateRule(header(clip=2.0, codec="f32", rho=0.0))
    advance(receiver, [100.0])
    raw = receiver.codec.encode(1e6, 0)  # a sender that does not clip
    assert receiver.advance(Record(raw, 1.0)).values == [200.0]


def test_normalized_update_does_not_depend_on_the_scale_of_the_loss():
    """Bitwise, for powers of two, from an adapted scale on (oracle 11)."""
    values = [[3.0 + math.sin(t), -2.0 * math.cos(3 * t)] for t in range(20)]
    updates = []
    for scale_log2, factor in ((-2, 1), (7, 512)):
        rule = UpdateRule(header(normalize=True, scale_log2=scale_log2))
        updates.append([advance(rule, [v * factor for v in row]).terms for row in values])
    assert updates[0] == updates[1]


def test_the_running_rms_divides_after_it_has_seen_the_step():
    rule = UpdateRule(header(normalize=True, codec="f32"))
    assert advance(rule, [-3.0], lr=0.5).terms == [(0, 0, -0.5)]
    (term,) = advance(rule, [1.0], lr=0.5).terms
    assert term[2] == 0.5 / math.sqrt(0.9 * 9.0 + (1.0 - 0.9) * 1.0)


def test_many_directions_are_warned_of_once():
    rule = UpdateRule(header(directions=4097, codec="sign"))
    with pytest.warns(UserWarning, match="4097 directions in one update; their coefficients keep fewer than 12 bits"):
        rule.advance(Record(b"\x38" * 4097, 1.0, (0,)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rule.advance(Record(b"\x38" * 4097))


@pytest.mark.parametrize(
    ("record", "error", "text"),
    [
        (Record(b"\x44\x38", 1e30), OverflowError, "update overflow at step 5"),
        (Record(b"\x38", 0.1), JournalError, "record 5 has 1 bytes of codes; 2 workers with 1 directions send 2"),
        (Record(b"\x38" * 2, 0.1, (0, 3, 7)), JournalError, "2 bytes of codes; 3 workers with 1 directions send 3"),
    ],
)
def test_a_record_that_cannot_be_taken_in_changes_nothing(record, error, text):
    rule, twin = (UpdateRule(header(momentum=0.5, momentum_horizon=2, normalize=True)) for _ in range(2))
    for t in range(5):  # the horizon is full: one more step pushes the oldest terms out
        advance(rule, [1.0 + t, 2.0])
        advance(twin, [1.0 + t, 2.0])
    with pytest.raises(error, match=text):
        rule.advance(record)
    assert (rule.step, rule.lr, rule.roster) == (5, 0.5, (0, 1))
    assert advance(rule, [3.0, -1.0]) == advance(twin, [3.0, -1.0])
    assert vars(rule.tracker) == vars(twin.tracker)


def test_a_copy_goes_its_own_way():
    rule = UpdateRule(header(momentum=0.5, momentum_horizon=2))
    advance(rule, [1.0])
    other = rule.copy()
    advance(rule, [2.0])
    assert (other.step, other.tracker.m2) == (1, 1.0)
    assert [t for t, _, _ in advance(other, [3.0]).terms] == [1, 0]


def test_momentum_equals_torch_sgd_up_to_the_cut_off_tail():
    """Heavy ball in coefficients against torch.optim.SGD on the same gradients (m3: no buffer)."""
    beta, horizon, lr = 0.8, 40, 0.05
    rule = UpdateRule(header(codec="f32", momentum=beta, momentum_horizon=horizon))
    generator = torch.Generator().manual_seed(0)
    z = torch.randint(0, 2, (30, 6), generator=generator).double() * 2 - 1
    g = torch.randn(30, generator=generator).float().double()
    p = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))
    sgd = torch.optim.SGD([p], lr=lr, momentum=beta)
    mine = torch.zeros(6, dtype=torch.float64)
    for t in range(30):
        p.grad = g[t] * z[t]
        sgd.step()
        for step, _, c in advance(rule, [float(g[t])], lr).terms:
            mine -= c * z[step]
        assert torch.allclose(mine, p.detach(), atol=1e-12)
    short = UpdateRule(header(codec="f32", momentum=beta, momentum_horizon=3))
    assert [len(advance(short, [1.0], lr).terms) for _ in range(6)] == [1, 2, 3, 4, 4, 4]


def test_coefficients_are_rounded_within_the_bound_and_sums_stay_exact():
    generator = random.Random(1)
    for count in (1, 2, 255, 511, 512, 1023, 4096):
        terms = [(t, 0, generator.gauss(0, 1) * 10.0 ** generator.randint(-3, 3)) for t in range(count)]
        q = quantize(terms)
        largest = max(abs(c) for _, _, c in terms)
        assert sum(map(abs, q.integers)) < 1 << 24
        bound = largest * 2.0 ** -(15 if count <= 511 else 14 if count <= 1023 else 11)
        assert all(abs(i * 2.0**q.exponent - c) <= bound for i, (_, _, c) in zip(q.integers, terms, strict=True))
        assert all(w == float(torch.tensor(w, dtype=torch.float32)) for _, _, w in changes(q))


def test_coefficients_at_the_ends_of_the_range():
    assert quantize([]) is None
    assert quantize([(0, 0, 0.0)]) is None
    assert quantize([(0, 0, 2.0**-120)]) is None  # below float32's normal range after quantizing
    assert quantize([(0, 0, 1.0)]) == Quantized(((0, 0),), (1 << 14,), -14)
    for bad in (2.0**40, math.inf, math.nan):
        with pytest.raises(OverflowError):
            quantize([(0, 0, 1.0), (0, 1, bad)])
    with pytest.raises(OverflowError, match=r"SPSA update overflow at step 0: lr 1e\+30, scale 2\*\*-2"):
        advance(UpdateRule(header()), [1.0], lr=1e30)
