"""NVFP4 layers whose weights are sharded over two CPU processes: the bits of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parents[2]


@pytest.mark.reliability_full
@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo")
def test_sharded_weights_give_the_bits_of_one_process(tmp_path):
    launched = ("MASTER_", "LOCAL_", "NODE_", "RANK", "WORLD_", "PL_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(launched)}
    result = subprocess.run(
        [sys.executable, "-m", "tests.nvfp4_fsdp_run", str(tmp_path / "fsdp2.ckpt")],
        cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert "FSDP2 equal" in result.stdout
    assert "FSDP1 equal" in result.stdout
