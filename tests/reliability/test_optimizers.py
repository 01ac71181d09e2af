"""Every optimizer of the conformance suite through ``ckpt_path``: the weights are those of the uninterrupted run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conformance.cases import CASES
from tests.conformance.cases import Case as OptimizerCase
from tests.conformance.common import heat
from tests.reliability.runs import Case, differing, fit

STEPS, AT = 8, 5  # of 6 steps per epoch
every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.cls.__name__)
# what is compiled is the rule alone: one that has scalars of its own, one entry by entry, one with random numbers
KINDS = ("AdaGradNorm", "DiffGrad", "SGLD")


def resumes(case: OptimizerCase, folder: Path, **switches: Any) -> None:
    kwargs = {**case.kwargs[0], **heat(case), "lr": 1e-2, **switches}
    run = Case(case.cls.__name__, optimizer=lambda params: case.cls(params, **kwargs))
    straight = fit(run, folder / "straight", steps=STEPS, keep=True)
    resumed = fit(run, folder / "resumed", steps=STEPS, ckpt_path=folder / "straight" / f"step={AT}.ckpt")
    assert not differing(straight, resumed)
    # a comparison of two runs in which nothing happens would pass as well
    other = fit(run, folder / "other", steps=AT)
    assert differing(straight, other)


@every
def test_resume(case: OptimizerCase, tmp_path: Path) -> None:
    resumes(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES if c.cls.__name__ in KINDS], ids=lambda case: case.cls.__name__)
def test_resume_compiled(case: OptimizerCase, tmp_path: Path) -> None:
    resumes(case, tmp_path, compile=True)
