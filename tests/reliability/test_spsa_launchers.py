"""The same run under the launchers that start a script again: Lightning's own and torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_grad.spsa import Journal
from tests.spsa_lightning import Toy, digests, fit

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from lightning_grad import SharedSeedSPSAStrategy
from tests.spsa_lightning import Toy, trainer

strategy = SharedSeedSPSAStrategy(check_interval=1, seed=3, journal_path=sys.argv[1])
trainer(strategy, devices=2, accumulate_grad_batches=2).fit(Toy(steps=6))
"""


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]], ids=str)
def test_two_processes_of_a_script_are_one_worker_with_two_directions(tmp_path, words):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words, str(script), str(tmp_path / "run.spsa")]
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=150, check=True)
    journal = Journal.load(tmp_path / "run.spsa")
    assert digests(journal) == digests(fit(tmp_path / "alone", model=Toy(steps=6)))
    assert next(iter(journal)).roster == (0, 1)
