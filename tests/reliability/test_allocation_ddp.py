"""Sample allocation on two real processes: one plan, met to the unit; the gradient of all samples; exact resume."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_processes(tmp_path):
    pytest.importorskip("transformers")
    script = Path(__file__).with_name("allocation_ddp.py")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], env=env, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    budgets = {"em": 77, "history": 35, "baseline": 77, "lm": 42}
    for name, budget in budgets.items():
        case = result[name]
        first, second = case["plans"]
        assert first == second
        assert len(first) == 3
        assert all(sum(plan) == budget for plan in first)
        assert any(len(set(plan)) > 1 for plan in first)
        for plan, *parts in zip(first, *case["drawn"], strict=True):
            assert [a + b for a, b in zip(*parts, strict=True)] == plan
            sizes = [sum(part) for part in parts]
            # pilots and the rest are halved each
            assert abs(sizes[0] - sizes[1]) <= 2
        assert case["same"][0] == case["same"][1]
    for name in ("em", "history", "baseline"):
        for seen in result[name]["resumed"]:
            assert seen
            assert all(seen.values()), (name, seen)
    assert result["em"]["generated"] == 3 * 77
    assert result["baseline"]["generated"] == 3 * (77 + 44)
    assert result["gradient_error"] < 1e-5
    assert result["metric"] == [pytest.approx(0.75)] * 2
