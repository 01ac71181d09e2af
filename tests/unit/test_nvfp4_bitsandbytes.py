"""bitsandbytes' 8-bit optimizers beside NVFP4: they update weights behind autograd's back.

In a process of its own: after `import bitsandbytes` the bare name AdamW is ambiguous to the command line.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason='bitsandbytes is missing: pip install "lightning-grad[bnb]"',
)
def test_quantized_weights_follow_an_8_bit_optimizer():
    result = subprocess.run(
        [sys.executable, "-m", "tests.nvfp4_bitsandbytes_run"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
