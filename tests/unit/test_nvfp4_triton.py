"""Triton kernels in Triton's interpreter, bit for bit against the torch backend.

The interpreter is chosen by an environment variable that Triton reads at import, so the comparison runs in one
subprocess, which prints what differs.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install triton")
def test_kernels_equal_the_torch_backend_bit_for_bit():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-m", "tests.nvfp4_triton_cases"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    count = int(result.stdout.split()[-1])
    assert count > 200, result.stdout
