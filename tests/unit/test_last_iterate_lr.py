"""Schedules with last-iterate guarantees: closed forms, the theory's lower-bound function, resume, the command line."""

from __future__ import annotations

import math
import sys
import warnings

import pytest
import torch

from lightning_grad import CooldownLR, InverseSqrtLR, LinearDecayLR, SamplesLR, StronglyConvexLR
from lightning_grad.cli import LightningGradCLI, main

HERE = "tests.cli_models."


def optimizer_of(*rates):
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in rates or (1.0,)])


def rates(cls, steps, lr=1.0, **kwargs):
    """Learning rate of each step."""
    optimizer = optimizer_of(lr)
    schedule = cls(optimizer, **kwargs)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


@pytest.mark.parametrize(
    ("cls", "kwargs", "expected"),
    [
        (LinearDecayLR, {"total": 4}, [1, 3 / 4, 2 / 4, 1 / 4, 0]),
        (LinearDecayLR, {"total": 4, "offset": 1}, [4 / 5, 3 / 5, 2 / 5, 1 / 5, 0]),
        (LinearDecayLR, {"total": 5, "warmup": 1, "final": 0.2}, [1 / 2, 1, 0.8, 0.6, 0.4, 0.2]),
        (InverseSqrtLR, {}, [1, 2**-0.5, 3**-0.5, 0.5]),
        (InverseSqrtLR, {"warmup": 2}, [1 / 3, 2 / 3, 1, (3 / 4) ** 0.5, (3 / 5) ** 0.5]),
        (StronglyConvexLR, {"mu": 4.0}, [1 / 4, 1 / 6, 1 / 8]),
        (StronglyConvexLR, {"mu": 0.5, "shift": 8}, [1 / 2, 4 / 9, 4 / 10]),
        (CooldownLR, {"total": 8, "cooldown_fraction": 0.5}, [1] * 5 + [0.75, 0.5, 0.25, 0]),
        (CooldownLR, {"total": 4, "shape": "1-sqrt", "final": 0.1, "cooldown_fraction": 1.0},
         [1, 0.1 + 0.9 * 0.5, 0.1 + 0.9 * (1 - 0.5**0.5), 0.1 + 0.9 * (1 - 0.75**0.5), 0.1]),
        (CooldownLR, {}, [1] * 6),
    ],
)  # fmt: skip
def test_closed_forms(cls, kwargs, expected):
    assert rates(cls, len(expected), **kwargs) == pytest.approx(expected, abs=1e-15)
    if cls is not StronglyConvexLR:
        assert rates(cls, len(expected), lr=0.3, **kwargs) == pytest.approx([0.3 * f for f in expected], abs=1e-15)


def lower_bound_run(cls, horizon, base, **kwargs):
    """``sqrt(T) f(x_T)`` on the function whose last iterate is as bad as can be for constant steps."""
    # rows h_i: 1/(8(T-j+1)) before the diagonal, -1/2 on it, 0 after; f = max_i h_i.x on the unit ball
    j = torch.arange(1, horizon + 1, dtype=torch.float64)
    rows = torch.tril((1 / (8 * (horizon - j + 1))).expand(horizon + 1, -1), -1)
    rows[torch.arange(horizon), torch.arange(horizon)] = -0.5
    x = torch.nn.Parameter(torch.zeros(horizon, dtype=torch.float64))
    optimizer = torch.optim.SGD([x], lr=base)
    schedule = cls(optimizer, **kwargs)
    for _ in range(horizon):
        values = rows @ x.detach()
        x.grad = rows[int((values >= values.max() - 1e-12).nonzero()[0])]  # the first of equals
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            x /= max(1.0, float(x.norm()))
    return math.sqrt(horizon) * float((rows @ x.detach()).max())


def test_the_last_iterate_of_the_lower_bound_function():
    """Reference values by an independent run; those without decay grow with log T, those of linear decay do not."""
    for horizon, constant, inverse, linear in ((100, 0.269, 0.337, 0.0551), (400, 0.334, 0.399, 0.0548)):
        base = 1 / math.sqrt(horizon)
        assert lower_bound_run(CooldownLR, horizon, base) == pytest.approx(constant, abs=1e-3)
        assert lower_bound_run(InverseSqrtLR, horizon, 1.0) == pytest.approx(inverse, abs=1e-3)
        assert lower_bound_run(LinearDecayLR, horizon, base, total=horizon) == pytest.approx(linear, abs=1e-3)


def test_minimax_variant_keeps_its_promise():
    """f(x_T) <= GR/sqrt(T+1) for f = |x| from distance 1, where plain decay does not."""
    for horizon in (5, 6, 31):
        x = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
        optimizer = torch.optim.SGD([x], lr=1 / math.sqrt(horizon + 1))
        schedule = LinearDecayLR(optimizer, total=horizon, offset=1)
        for _ in range(horizon):
            x.grad = torch.sign(x.detach())
            optimizer.step()
            schedule.step()
        assert abs(float(x.detach())) <= 1 / math.sqrt(horizon + 1) + 1e-12


def test_groups_keep_their_ratio_and_zero_stays_zero():
    optimizer = optimizer_of(0.4, 0.1, 0.0)
    StronglyConvexLR(optimizer, mu=1.0)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([1.0, 0.25, 0.0])
    optimizer = optimizer_of(0.4, 0.0)
    LinearDecayLR(optimizer, total=4, offset=1)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.32, 0.0])
    optimizer = optimizer_of(0.0)
    StronglyConvexLR(optimizer, mu=1.0)
    assert optimizer.param_groups[0]["lr"] == 0.0


def test_a_cooldown_begins_when_the_end_is_decided_and_survives_a_checkpoint():
    def stepped(n, state=None):
        optimizer = optimizer_of(2.0)
        schedule = CooldownLR(optimizer)
        if state is not None:
            optimizer.load_state_dict(state[0])
            schedule.load_state_dict(state[1])
        seen = []
        for _ in range(n):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return optimizer, schedule, seen

    optimizer, schedule, _ = stepped(3)
    schedule.start_cooldown(4)
    assert schedule.cooldown == (3, 7)
    state = optimizer.state_dict(), schedule.state_dict()
    assert stepped(6, state)[2] == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0, 0.0])


@pytest.mark.parametrize("shape", ["linear", "1-sqrt"])
def test_a_second_cooldown_goes_on_from_the_present_rate(shape):
    optimizer = optimizer_of()
    schedule = CooldownLR(optimizer, total=8, cooldown_fraction=0.5, shape=shape, final=0.2)
    seen = []
    for step in range(10):
        if step in (6, 8):
            schedule.start_cooldown(4 if step == 6 else 2)
            assert schedule.factor(step) == pytest.approx(optimizer.param_groups[0]["lr"])
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert seen[:4] == [1.0] * 4
    assert seen == sorted(seen, reverse=True)
    assert seen[6] == pytest.approx(0.6 if shape == "linear" else 0.2 + 0.8 * (1 - 0.5**0.5))
    left = (0.5, 0.5**0.5)[shape != "linear"]
    assert seen[8] - 0.2 == pytest.approx((seen[6] - 0.2) * (left if shape == "linear" else 1 - left))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)


@pytest.mark.parametrize("cls", [LinearDecayLR, CooldownLR])
def test_a_resumed_run_may_be_longer(cls):
    kwargs = {"cooldown_fraction": 1.0} if cls is CooldownLR else {}
    schedule = cls(optimizer_of(), total=4, **kwargs)
    for _ in range(5):  # past the end, with its warning
        schedule.optimizer.step()
        with warnings.catch_warnings(record=True):
            schedule.step()
    longer = cls(optimizer_of(), total=8, **kwargs)
    longer.optimizer.load_state_dict(schedule.optimizer.state_dict())
    longer.load_state_dict(schedule.state_dict())
    assert longer.optimizer.param_groups[0]["lr"] == pytest.approx(3 / 8)  # of the coming step already
    longer.optimizer.step()
    longer.step()
    assert longer.get_last_lr() == pytest.approx([2 / 8])
    longer.step()
    longer.step()
    with pytest.warns(UserWarning, match=r"more steps than `total` \(8\)"):
        longer.step()


@pytest.mark.parametrize(
    ("cls", "first", "second"),
    [
        (LinearDecayLR, {"total": 9}, {"total": 9, "warmup": 4, "final": 0.5, "offset": 1}),
        (CooldownLR, {"total": 9}, {"total": 9, "cooldown_fraction": 1.0, "final": 0.5, "shape": "1-sqrt"}),
        (InverseSqrtLR, {}, {"warmup": 7}),
        (StronglyConvexLR, {"mu": 1.0}, {"mu": 2.0, "shift": 5.0}),
    ],
)
def test_a_checkpoint_brings_the_step_and_no_setting(cls, first, second):
    saved, resumed = cls(optimizer_of(), **first), cls(optimizer_of(), **second)
    saved.optimizer.step()
    saved.step()
    resumed.load_state_dict(saved.state_dict())
    resumed.optimizer.step()
    resumed.step()
    assert resumed.last_epoch == 2
    assert resumed.get_last_lr() == rates(cls, 3, **second)[2:]


def test_the_horizon_may_come_after_the_checkpoint():
    saved = LinearDecayLR(optimizer_of(), total=4)
    saved.optimizer.step()
    saved.step()
    resumed = LinearDecayLR(optimizer_of(), offset=1)
    resumed.load_state_dict(saved.state_dict())  # says nothing yet
    resumed.resolve(4)
    resumed.resolve(9)  # known already
    assert resumed.optimizer.param_groups[0]["lr"] == pytest.approx(3 / 5)


def test_where_the_cooldown_lies():
    found = [CooldownLR(optimizer_of(), total=n, cooldown_fraction=f).cooldown for n, f in ((8, 0.2), (3, 0.1), (4, 1))]
    assert found == [(6, 8), (2, 3), (0, 4)]
    assert CooldownLR(optimizer_of()).cooldown is None


def test_a_tensor_learning_rate_stays_the_same_object():
    lr = torch.tensor(0.5)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=lr)
    schedule = LinearDecayLR(optimizer, total=4)
    optimizer.step()
    schedule.step()
    schedule.load_state_dict(schedule.state_dict())
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr == 0.375


def test_no_warning_at_the_end_nor_with_a_cooldown_begun_by_hand(recwarn):
    rates(LinearDecayLR, 4, total=4)
    schedule = CooldownLR(optimizer_of(), total=2)
    schedule.start_cooldown(5)
    for _ in range(6):
        schedule.optimizer.step()
        schedule.step()
    assert not [w for w in recwarn if "`total`" in str(w.message)]


def test_past_the_end_it_stays_and_warns_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert rates(LinearDecayLR, 9, total=4, final=0.1)[-4:] == pytest.approx([0.1] * 4)
    assert sum("`total` (4)" in str(w.message) for w in caught) == 1


@pytest.mark.parametrize(
    ("cls", "kwargs", "expected"),
    [
        (LinearDecayLR, {"total": 4}, [0.5, 1.0]),
        (CooldownLR, {"total": 4, "cooldown_fraction": 1.0}, [0.5, 1.0]),
        (StronglyConvexLR, {"mu": 0.5}, [0.5, 1.0]),  # the largest base rate is now the second's
        (SamplesLR, {"total_samples": 4, "samples_per_step": 1, "base": "linear", "final": 0.0}, [0.25, 0.5]),
    ],
)
def test_a_group_added_later_has_its_rate_as_its_base(cls, kwargs, expected):
    optimizer = optimizer_of()
    schedule = cls(optimizer, **kwargs)
    optimizer.step()
    schedule.step()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 2.0})
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected)
    assert optimizer.param_groups[1]["initial_lr"] == 2.0
    # a checkpoint of before, loaded where there are both groups from the beginning
    saved = cls(optimizer_of(), **kwargs)
    saved.optimizer.step()
    saved.step()
    resumed = cls(optimizer_of(1.0, 2.0), **kwargs)
    resumed.load_state_dict(saved.state_dict())
    resumed.optimizer.step()
    resumed.step()
    assert resumed.get_last_lr() == pytest.approx(expected)
    again = cls(optimizer_of(1.0, 2.0), **kwargs)
    again.load_state_dict(schedule.state_dict())
    assert again.get_last_lr() == pytest.approx(expected)


def test_samples_are_counted_once_in_a_sequence():
    torch_lr = torch.optim.lr_scheduler
    optimizer = optimizer_of()
    kwargs = {"total_samples": 40, "samples_per_step": 10, "base": "linear", "final": 0.0}
    parts = [SamplesLR(optimizer, **kwargs), SamplesLR(optimizer, **kwargs)]
    sequence = torch_lr.SequentialLR(optimizer, parts, milestones=[2])
    seen = []
    for _ in range(5):
        seen.append((optimizer.param_groups[0]["lr"], *(part.samples for part in parts)))
        optimizer.step()
        sequence.step()
    assert seen == [(0.75, 10, 10), (0.5, 20, 10), (0.75, 20, 10), (0.5, 20, 20), (0.25, 20, 30)]
    torch_lr.SequentialLR(optimizer, [SamplesLR(optimizer)], milestones=[])  # nothing to count yet


def test_refused_by_name():
    for cls, kwargs, name in (
        (LinearDecayLR, {"total": 0}, "total"), (LinearDecayLR, {"total": 3, "warmup": 3}, "warmup"),
        (LinearDecayLR, {"total": 3, "offset": 2}, "offset"), (LinearDecayLR, {"total": 3, "final": 2.0}, "final"),
        (LinearDecayLR, {"final": -0.1}, "final"), (LinearDecayLR, {"warmup": -1}, "warmup"),
        (StronglyConvexLR, {"mu": math.inf}, "mu"), (CooldownLR, {"total": 0}, "total"),
        (CooldownLR, {"cooldown_fraction": 1.1}, "cooldown_frac"), (CooldownLR, {"final": 1.1}, "final"),
        (InverseSqrtLR, {"warmup": -1}, "warmup"), (StronglyConvexLR, {"mu": 0.0}, "mu"),
        (StronglyConvexLR, {"mu": 1.0, "shift": 0}, "shift"), (CooldownLR, {"cooldown_fraction": 0.0}, "cooldown_frac"),
        (CooldownLR, {"shape": "sqrt"}, "shape"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"`{name}"):
            cls(optimizer_of(), **kwargs)
    for warmup in (0, 5):  # at the first step, not when the warm-up is over
        with pytest.raises(RuntimeError, match="give `total`"):
            rates(LinearDecayLR, 1, warmup=warmup)
    with pytest.raises(ValueError, match="`length`"):
        CooldownLR(optimizer_of()).start_cooldown(0)


def run(monkeypatch, tmp_path, *words):
    monkeypatch.setattr(sys, "argv", ["lightning-grad"])
    monkeypatch.chdir(tmp_path)
    quiet = [f"--trainer.{k}=false" for k in ("logger", "enable_progress_bar", "enable_model_summary")]
    return ["fit", f"--model={HERE}Tiny", f"--data={HERE}TinyData", "--trainer.accelerator=cpu", *quiet,
            "--optimizer=SGD", "--optimizer.lr=0.1", "--trainer.enable_checkpointing=false", *words]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "total", "lr"),
    [
        (["LinearDecayLR", "--trainer.max_epochs=2"], 8, 0.0),
        (["LinearDecayLR", "--trainer.max_steps=6", "--lr_scheduler.final=0.5"], 6, 0.05),
        (["LinearDecayLR", "--lr_scheduler.total=20", "--trainer.max_epochs=1"], 20, 0.08),
        (["CooldownLR", "--trainer.max_epochs=5", "--trainer.limit_train_batches=2"], 10, 0.0),
        (["InverseSqrtLR", "--trainer.max_epochs=1"], None, 0.1 / 5**0.5),
    ],
)
def test_the_command_steps_them_and_fills_in_the_horizon(monkeypatch, tmp_path, words, total, lr):
    cli = LightningGradCLI(args=run(monkeypatch, tmp_path, f"--lr_scheduler={words[0]}", *words[1:]))
    config = cli.trainer.lr_scheduler_configs[0]
    assert (config.interval, config.scheduler.total) == ("step", total)
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(lr, abs=1e-12)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--lr_scheduler_interval=epoch", "--trainer.max_epochs=1"], "counts optimizer steps"),
        (["--trainer.max_epochs=-1"], "this run has no end"),
        (["--lr_scheduler.warmup=9", "--trainer.max_epochs=1"], "`warmup` must be an integer in [0, 3], got 9."),
    ],
)
def test_the_command_refuses_in_one_line(monkeypatch, tmp_path, capsys, words, text):
    with pytest.raises(SystemExit) as end:
        main(run(monkeypatch, tmp_path, "--lr_scheduler=LinearDecayLR", *words))
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert text in error
    assert error.count("\n") == 1 or "error: " in error.splitlines()[-1]


def test_an_attribute_interval_of_a_foreign_scheduler_means_nothing(monkeypatch, tmp_path):
    words = [f"--lr_scheduler={HERE}OwnIntervalLR", "--trainer.max_epochs=1"]
    cli = LightningGradCLI(args=run(monkeypatch, tmp_path, *words))
    assert cli.trainer.lr_scheduler_configs[0].interval == "epoch"
