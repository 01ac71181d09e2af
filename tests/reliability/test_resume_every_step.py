"""A run resumed at any of its steps ends with the very weights of the run that was never interrupted."""

import pytest

from tests.reliability.runs import CASES, STEPS_PER_EPOCH, Case, differing, fit

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@every_case
def test_resume_at_every_step(case: Case, tmp_path):
    steps = 2 * STEPS_PER_EPOCH + 2 if case.name != "accumulate" else STEPS_PER_EPOCH + 2
    straight = fit(case, tmp_path / "straight", steps=steps, keep=True)
    for step in range(1, steps):
        resumed = fit(case, tmp_path / "resumed", steps=steps, ckpt_path=tmp_path / "straight" / f"step={step}.ckpt")
        assert not differing(straight, resumed), f"resumed after step {step}"


@every_case
def test_resume_with_workers(case: Case, tmp_path):
    steps = STEPS_PER_EPOCH + 2
    straight = fit(case, tmp_path / "straight", steps=steps, keep=True)
    for step in (STEPS_PER_EPOCH - 3, STEPS_PER_EPOCH):
        path = tmp_path / "straight" / f"step={step}.ckpt"
        resumed = fit(case, tmp_path / "resumed", steps=steps, ckpt_path=path, num_workers=2)
        assert not differing(straight, resumed), f"resumed after step {step}"


@pytest.mark.parametrize(
    "case", [c for c in CASES if c is CASES[0] or c.name.startswith("adaptive")], ids=lambda case: case.name
)
def test_resume_of_a_resumed_run(case: Case, tmp_path):
    """Both at the end of an epoch: there Lightning's own counters go wrong, which only the second resume shows."""
    steps, first = 2 * STEPS_PER_EPOCH + 3, STEPS_PER_EPOCH
    straight = fit(case, tmp_path / "straight", steps=steps, keep=True)
    path = tmp_path / "straight" / f"step={first}.ckpt"
    fit(case, tmp_path / "once", steps=steps, keep=True, ckpt_path=path)
    for step in (first + 1, 2 * STEPS_PER_EPOCH - 1, 2 * STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH + 1):
        path = tmp_path / "once" / f"step={step}.ckpt"
        resumed = fit(case, tmp_path / "twice", steps=steps, ckpt_path=path)
        assert not differing(straight, resumed), f"resumed after step {step}"
