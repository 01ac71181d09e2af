"""Bytes on a network interface that nobody else uses (oracle 14)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALONE = ["unshare", "-r", "-n"]


def can_unshare():
    try:
        return subprocess.run([*ALONE, "true"], capture_output=True, timeout=10).returncode == 0
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not can_unshare(), reason="needs Linux and the right to make a network namespace")
def test_a_step_takes_less_than_four_kilobytes():
    code = "from benchmarks.bench_spsa import wire; wire((1,))"
    environment = {**os.environ, "SPSA_BENCH_NAMESPACE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*ALONE, sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True,
                          text=True, timeout=120, check=True)  # fmt: skip
    rows = re.findall(r"(\d) workers, +1 bytes each: +(\d+) bytes.*payload (\d+) sent, (\d+) received", done.stdout)
    assert [int(row[0]) for row in rows] == [2, 4]
    for workers, measured, sent, received in (map(int, row) for row in rows):
        assert (sent, received) == (1, workers)
        assert workers < measured < 4096  # packets are not free: a figure of a few bytes would be a wrong one
