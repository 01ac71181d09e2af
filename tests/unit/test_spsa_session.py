"""One worker without Lightning: estimates, dropout, batch norm, exceptions (oracles 7, 15, 16, 17)."""

import copy
import math
import os
import warnings
from pathlib import Path

import pytest
import torch

from lightning_grad.spsa import JournalError, NoFiniteLossError, SPSAConfigError, SPSAEngine, rademacher, replay
from tests.spsa_helpers import batches, flat, loss_of, make_session, run_alone, tiny_model


def signs_of(session, direction, step=0):
    out, start = [], 0
    for p in session.engine.params:
        out.append(rademacher(session.options.seed, step, direction, p.numel(), start=start))
        start += -(-p.numel() // 256) * 256
    return torch.cat(out)


def autograd_projection(session, batch, z):
    grads = torch.autograd.grad(loss_of(session.module, batch), list(session.module.parameters()))
    return float(torch.cat([g.reshape(-1) for g in grads]) @ z)


@pytest.mark.parametrize("sides", [1, 2])
def test_projected_gradient_approximates_autograd(sides):
    session = make_session(tiny_model().double(), slots=20, directions=20, sides=sides, eps=2.0**-14)
    batch = [t.double() for t in batches(1)[0]]
    session.measure(0, lambda: loss_of(session.module, batch))
    got = list(session.pending)
    session.engine.restore()
    want = [autograd_projection(session, batch, signs_of(session, d).double()) for d in range(20)]
    # the second derivative of this loss along a sign vector is of order 10
    assert got == pytest.approx(want, abs=1e-2 if sides == 1 else 1e-5)


@pytest.mark.parametrize(("sides", "forwards"), [(1, 5), (2, 8)])
def test_number_of_forwards(sides, forwards):
    session = make_session(slots=4, directions=4, sides=sides)
    batch, calls = batches(1)[0], []

    def forward():
        calls.append(flat(session.module))
        return loss_of(session.module, batch)

    session.measure(0, forward)
    # one side needs the centre once for a micro-batch
    assert len(calls) == forwards


def test_mean_of_both_losses_is_returned_with_the_other_keys():
    session = make_session(slots=2)
    batch = batches(1)[0]
    seen = []

    def forward():
        loss = loss_of(session.module, batch)
        seen.append(float(loss))
        return {"loss": loss, "extra": 7}

    output = session.measure(0, forward)
    assert output["extra"] == 7
    assert float(output["loss"]) == pytest.approx(sum(seen) / 2, rel=1e-6)
    assert not output["loss"].requires_grad
    session.measure(0, lambda: torch.tensor(1))
    assert session.pending[1] == 0.0


def dropout_correlation(forward_mode, same_masks=True):
    torch.manual_seed(1)
    net = torch.nn.Sequential(
        torch.nn.Linear(10, 64), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(64, 3)
    )  # fmt: skip
    x, y = torch.randn(32, 10), torch.randint(0, 3, (32,))
    session = make_session(net, slots=150, directions=150, forward_mode=forward_mode)
    if not same_masks:
        numbers = iter(range(10**6))
        session._forwards._seed = lambda word: torch.manual_seed(next(numbers))  # the twin that must fail

    def forward():
        return torch.nn.functional.cross_entropy(net(x), y)

    session.measure(0, forward)
    got = torch.tensor(session.pending)
    session.engine.restore()
    net.eval()
    grads = torch.cat([g.reshape(-1) for g in torch.autograd.grad(forward(), list(net.parameters()))])
    want = torch.stack([signs_of(session, d) @ grads for d in range(150)])
    return float(torch.corrcoef(torch.stack([got, want]))[0, 1])


def test_dropout_needs_equal_masks():
    assert dropout_correlation("eval") > 0.99
    assert dropout_correlation("train") > 0.9
    assert dropout_correlation("train", same_masks=False) < 0.5


@pytest.mark.parametrize("forward_mode", ["eval", "train"])
def test_modes_buffers_and_random_state_are_as_before(forward_mode):
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Dropout(), torch.nn.Linear(6, 2))
    net[2].eval()
    session = make_session(net, slots=1, forward_mode=forward_mode)
    modes = [m.training for m in net.modules()]
    buffers = [b.clone() for b in net.buffers()]
    inside = []
    state = torch.get_rng_state()
    for batch in batches(10):
        session.measure(0, lambda b=batch: (inside.append([m.training for m in net.modules()]), loss_of(net, b))[1])
        session.commit(session.record(session.payload(), 0.01, (0,)))
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), buffers, strict=True))
    assert torch.equal(torch.get_rng_state(), state)  # eval draws nothing here, train puts the state back
    assert inside[0] == (modes if forward_mode == "train" else [False] * len(modes))


def test_both_forwards_draw_the_same_numbers_and_the_stream_moves_on():
    session = make_session(slots=2)
    drawn = []

    def forward():
        drawn.append(float(torch.rand(())))
        return loss_of(session.module, batches(1)[0])

    session.measure(0, forward)
    session.measure(0, forward)
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3]


@pytest.mark.parametrize("fail_at", [1, 2, 3, 4])
def test_exception_in_a_forward_restores_every_bit(fail_at):
    session = make_session(slots=2, directions=2)
    before = flat(session.module).clone()
    calls = []

    def forward():
        calls.append(0)
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        return loss_of(session.module, batches(1)[0])

    with pytest.raises(KeyboardInterrupt):
        session.measure(0, forward)
    assert torch.equal(flat(session.module), before)
    assert session.engine.state == {}


def measure_losses(session, *losses):
    """One micro-batch with these losses, at +eps and -eps by turns."""
    values = iter(losses)
    session.measure(0, lambda: torch.tensor(next(values)))


@pytest.mark.filterwarnings("ignore:SPSA. the loss is not finite")
def test_nan_abstains_and_too_many_stop_the_run():
    session = make_session(slots=2, max_bad_steps=3)
    before = flat(session.module).clone()
    measure_losses(session, math.nan, 1.0)
    measure_losses(session, 1.0, math.inf)
    payload = session.payload()
    assert payload == b"\x7f\x7f"
    session.commit(session.record(payload, 0.1, (0,)))
    assert torch.equal(flat(session.module), before)
    session.commit(session.record(session.payload(), 0.1, (0,)))
    measure_losses(session, math.nan, math.nan)
    record = session.record(session.payload(), 0.1, (0,))
    with pytest.raises(
        NoFiniteLossError, match=r"SPSA: no finite loss from any worker for 3 steps \(up to step 2\); here it"
    ):
        session.commit(record)


@pytest.mark.parametrize(
    ("losses", "side"),
    [((math.nan, math.inf), "both sides"), ((1.0, math.nan), "one side"), ((math.inf, 1.0), "one side")],
)
def test_the_first_loss_that_is_not_finite_is_named_and_so_is_what_to_do(losses, side):
    session = make_session(slots=2, max_bad_steps=2)
    where = rf"not finite at step 1 along direction 7, on {side}; .* 2 steps in a row .* Lower the learning rate"
    values = iter([1.0, 0.9, *losses, *losses])
    session.measure(3, lambda: torch.tensor(next(values)))
    session.commit(session.record(session.payload(), 0.1, (3,)))
    session.pending = [0.5]  # the first slot of the step
    with pytest.warns(UserWarning, match=where):
        session.measure(3, lambda: torch.tensor(next(values)))
    session.commit(session.record(session.payload(), 0.1, (3,)))
    session.commit(session.record(b"\x7f\x7f", 0.1, (3,)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        session.measure(3, lambda: torch.tensor(next(values)))
    record = session.record(session.payload(), 0.1, (3,))
    with pytest.raises(
        NoFiniteLossError, match=rf"up to step 3\); here it was lost at step 1 along .* 7, on {side}\. Lower"
    ):
        session.commit(record)


def test_a_loss_that_is_finite_again_was_not_the_beginning():
    session = make_session(max_bad_steps=1)
    with pytest.warns(UserWarning, match="not finite at step 0"):
        measure_losses(session, math.nan, 1.0)
    session.pending = []
    measure_losses(session, 0.9, 1.0)
    session.commit(session.record(session.payload(), 0.1, (0,)))
    measure_losses(session, math.nan, 1.0)
    record = session.record(session.payload(), 0.1, (0,))
    with pytest.raises(NoFiniteLossError, match="here it was lost at step 1 along"):
        session.commit(record)


def test_a_step_without_a_loss_abstains_in_silence():
    session = make_session(max_bad_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.measure(0, lambda: None)
    record = session.record(session.payload(), 0.1, (0,))
    assert record.codes == b"\x7f"
    with pytest.raises(NoFiniteLossError, match=r"\(up to step 0\)\. Lower"):
        session.commit(record)


def test_short_window_abstains_in_the_missing_slots():
    session = make_session(slots=3)
    session.measure(0, lambda: loss_of(session.module, batches(1)[0]))
    payload = session.payload()
    assert len(payload) == 3
    assert payload[0] != 0x7F
    assert payload[1:] == b"\x7f\x7f"


def test_window_longer_than_the_roster_allows_is_refused():
    session = make_session(slots=1)
    session.measure(0, lambda: torch.tensor(1.0))
    with pytest.raises(SPSAConfigError, match="K must stay constant"):
        session.measure(0, lambda: torch.tensor(1.0))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(3), r"got shape \(3,\)"),
        (torch.zeros((), dtype=torch.complex64), "complex64"),
        ("x", "got a str"),
    ],
)
def test_what_is_no_scalar_loss_is_refused(value, text):
    session = make_session(slots=1)
    with pytest.raises(
        SPSAConfigError, match=f"training_step must return one scalar loss, {text}" if "got" in text else text
    ):
        session.measure(0, lambda: value)


def test_constant_loss_is_reported_once():
    session = make_session(slots=30, directions=30)
    with pytest.warns(UserWarning, match="did not change in 20 directions"):
        session.measure(0, lambda: torch.tensor(1.0))


@pytest.mark.parametrize("options", [{}, {"directions": 2}, {"sides": 1}, {"codec": "sign"}, {"codec": "f32"}], ids=str)
def test_workers_and_slots_are_interchangeable(options):
    """n workers with K slots each, exchanged by hand, against one worker with n K slots (oracle 7)."""
    data = batches(12)
    micro = 4
    per = options.get("directions", 1)
    alone = make_session(slots=micro * per, **options)
    want = run_alone(alone, data)
    group = [make_session(slots=2 * per, **options) for _ in range(2)]
    for step in range(3):
        for w, session in enumerate(group):
            for batch in data[step * 4 + 2 * w : step * 4 + 2 * w + 2]:
                session.measure(w, lambda b=batch, m=session.module: loss_of(m, b))
        codes = b"".join(session.payload() for session in group)
        digests = []
        for session in group:
            session.commit(session.record(codes, 2.0**-6, (0, 1)), digests.append)
        assert digests == [want[step]] * 2


def test_no_gradient_is_ever_built():
    session = make_session(slots=1)
    flags = []

    def forward():
        loss = loss_of(session.module, batches(1)[0])
        flags.append(loss.requires_grad)
        return loss

    with torch.enable_grad():
        session.measure(0, forward)
        session.commit(session.record(session.payload(), 0.1, (0,)))
    assert flags == [False, False]
    assert all(p.grad is None for p in session.module.parameters())


@pytest.mark.parametrize(("directions", "steps"), [(64, 20), (1024, 8)])
def test_many_directions_on_a_linear_model_are_sgd(directions, steps):
    """Oracle 11, by a run: the step is the gradient step plus noise of trace (d - 1) |G|^2 / N, which N sends to zero.

    The noise has covariance (|G|^2 I + G G' - 2 diag(G)^2) / N, eigenvalues at most 2 |G|^2 / N; so the sum over the
    steps of |noise|^2 N / |G|^2 has mean steps (d - 1) and a standard deviation of at most twice the mean's root. Five
    of those: false alarm below 1e-5. Along G the variance of a step is at most 2 |G|^2 / N: with 1024 directions steps
    that are wrong by 8 % fail. SGD runs beside it; noise in a contraction does not grow, and four times its mean square
    is never reached by 39 coordinates (below 1e-9).
    """
    torch.manual_seed(0)
    model, twin = (torch.nn.Linear(12, 3).double() for _ in range(2))
    twin.load_state_dict(model.state_dict())
    data = [t.double() for t in batches(1, size=64, inputs=12, outputs=3)[0]]
    session = make_session(model, slots=directions, directions=directions, codec="f32")
    sgd = torch.optim.SGD(twin.parameters(), lr=0.25)
    count, total, along, allowed = 39, 0.0, 0.0, 0.0
    for _ in range(steps):
        before = flat(model).clone()
        gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss_of(model, data), model.parameters())])
        session.measure(0, lambda: loss_of(model, data))
        session.commit(session.record(session.payload(), 0.25, (0,)))
        noise = (before - flat(model)) / 0.25 - gradient
        total += float(noise.square().sum() * directions / gradient.square().sum())
        along += float(noise @ gradient / gradient.square().sum())
        allowed += 0.25**2 * float(gradient.square().sum()) * (count - 1) / directions
        sgd.zero_grad()
        loss_of(twin, data).backward()
        sgd.step()
    mean = steps * (count - 1)
    assert abs(total - mean) < 5 * 2 * mean**0.5, (total, mean)
    assert abs(along) < 5 * (2 * steps / directions) ** 0.5
    assert float((flat(model) - flat(twin)).square().sum()) < 4 * allowed


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak-memory reset")
def test_peak_memory_of_passes_is_a_few_chunks():
    """Oracle 15: over the parameters themselves, 16 MiB and two chunks per direction."""
    p = torch.nn.Parameter(torch.randn(12_000_000))
    engine = SPSAEngine([("p", p)], seed=0, eps_log2=-10)
    engine.perturb([(0, 0, 1)])
    engine.apply([(0, 0, 1e-3)])

    def status(key):
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
        return int(line.split()[1]) / 1024

    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    for t in range(3):
        engine.perturb([(t, 0, 1)])
        engine.perturb([(t, 0, -2)])
        engine.apply([(t, d, 1e-3) for d in range(4)])
    assert status("VmHWM") - before < 16 + 4 * 2 * 0.25


@pytest.mark.parametrize("forward_mode", ["eval", "train"])
def test_an_outer_autocast_cannot_hide_a_changed_weight(forward_mode):
    """Autocast keeps the cast of a weight as long as the outermost context lives."""
    session = make_session(slots=1, eps=2.0**-4, forward_mode=forward_mode)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        session.measure(0, lambda: loss_of(session.module, batches(1)[0]))
    assert session.pending[0] != 0.0


def test_a_parameter_that_grows_too_large_is_found_at_the_next_check():
    session = make_session(slots=1)
    record = session.record(b"\x38", 5000.0, (0,))
    with pytest.raises(SPSAConfigError, match=r"parameter 0.weight holds 5000, .* use eps >= 0.00195 or freeze it"):
        session.commit(record, lambda digest: None)


@pytest.mark.parametrize(
    ("codes", "lr", "error"),
    [(b"\x38", 1e30, OverflowError), (b"\x38\x38", 0.1, JournalError), (b"", 0.1, JournalError)],
)
def test_a_record_that_cannot_be_applied_leaves_a_run_that_resumes(codes, lr, error):
    """What a callback saves on an exception must be good for something."""
    session = make_session(normalize=True, momentum=0.5)
    run_alone(session, batches(3))
    before = flat(session.module).clone()
    session.measure(0, lambda: loss_of(session.module, batches(1)[0]))
    with pytest.raises(error):
        session.commit(session.record(codes, lr, (0,)))
    state = session.state_dict()
    assert torch.equal(flat(session.module), before)
    again = make_session(copy.deepcopy(session.module), normalize=True, momentum=0.5)
    again.resume(state, session.engine.extra_state())
    record = session.record(b"\x38", 0.01, (0,))
    digests = []
    for one in (session, again):
        one.commit(record, digests.append)
    assert digests[0] == digests[1]


def test_a_parameter_that_has_grown_too_large_leaves_weights_and_journal_at_one_step():
    session = make_session(slots=1)
    with pytest.raises(SPSAConfigError, match="too large for eps"):
        session.commit(session.record(b"\x38", 5000.0, (0,)), lambda digest: None)
    assert len(session.journal) == session.step == 1
    assert replay(tiny_model().named_parameters(), session.journal).digest64() == session.engine.digest64()


def test_step_objective_trains_nothing_but_counts():
    """An objective with steps and too small an eps: g is exactly zero, which is a code, not an abstention."""
    session = make_session(slots=1)
    session.measure(0, lambda: (loss_of(session.module, batches(1)[0]) > 0).float())
    update = session.commit(session.record(session.payload(), 0.1, (0,)))
    assert (update.values, update.abstained, update.step_rms) == ([0.0], 0, 0.0)
