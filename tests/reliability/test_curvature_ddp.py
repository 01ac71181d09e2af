"""Two processes with half of every batch do what one does with all of it; both decide alike; bit-exact resume."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability.curvature_ddp import CASES, run

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_processes(tmp_path):
    script = Path(__file__).with_name("curvature_ddp.py")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], env=env, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    for name in CASES:
        first, second = result[name]
        assert first["weights"] == second["weights"]
        assert first["logged"] == second["logged"]
        assert len(first["resumed"]) == 3
        assert all(first["resumed"].values()), (name, first["resumed"])
        assert all(second["resumed"].values()), (name, second["resumed"])
        weights, logged = run(name, tmp_path / f"{name}-alone", 1)
        assert first["weights"] == pytest.approx(weights.tolist(), rel=1e-3, abs=1e-5)
        assert first["logged"].keys() == logged.keys()
        for tag, rows in logged.items():
            steps, values = zip(*rows, strict=True)
            assert tuple(step for step, _ in first["logged"][tag]) == steps
            found = [value for _, value in first["logged"][tag]]
            assert found == pytest.approx(list(values), rel=1e-3, abs=1e-4), (name, tag)
    expected = {
        "stability/lambda_max",
        "stability/lr_over_sgd_limit",
        "stability/batch_sharpness",
        "stability/oscillation",
    }
    assert expected <= result["monitor"][0]["logged"].keys()
