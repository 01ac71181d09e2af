#!/usr/bin/env python3
"""Before a release: build sdist and wheel, install each with each extra in an empty environment, use what it brings.

    python3 release.py                # everything, about a minute an extra
    python3 release.py base hf        # these only

One environment at a time, deleted afterwards. Nothing of this checkout is importable while a package is used: commands
run in a temporary folder, and those of the extras for developers in the unpacked sdist.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent

FIT = (
    "lightning-grad fit --model lightning_grad.demos.TinyGPT --data lightning_grad.demos.SourceText"
    " --trainer.accelerator cpu --trainer.max_steps 3 --trainer.limit_val_batches 1"
)
BASE = """
import importlib.metadata, lightning_grad
assert lightning_grad.__version__ == importlib.metadata.version("lightning-grad")
missing = [name for name in lightning_grad.__all__ if not hasattr(lightning_grad, name)]
assert not missing, missing
"""
TRITON = """
import os; os.environ["TRITON_INTERPRET"] = "1"
import torch
from lightning_grad.nvfp4 import quantize
x = torch.randn(32, 64)
a, b = (quantize(x, backend=name) for name in ("torch", "triton"))
assert torch.equal(a.codes, b.codes) and torch.equal(a.scales.view(torch.uint8), b.scales.view(torch.uint8))
"""
HF = """
import safetensors, transformers
from lightning_grad.sampling import CausalLMSamplingModule, MathAnswerReward
rewards = MathAnswerReward()(["", ""], ["so it is $\\\\frac{1}{2}$", "so it is 2"], ["0.5", "0.5"])
assert rewards.tolist() == [1.0, 0.0], rewards
"""
MINILM = """
from lightning_grad.demos import MiniLMSentences
MiniLMSentences()
"""
DEMO = (
    "lightning-grad fit --model lightning_grad.demos.DigitsCNN --data lightning_grad.demos.DigitsData"
    " --optimizer DiffGrad --optimizer.lr 1e-3 --trainer.accelerator cpu --trainer.max_steps 3"
)
# extra -> (archive, in the unpacked sdist?, commands; one that starts with a new line is Python)
USES = {
    "": ("wheel", False, [BASE, "lightning-grad --version", f"{FIT} --optimizer DiffGrad --optimizer.lr 1e-3"]),
    "triton": ("wheel", False, [BASE, TRITON]),
    "completion": ("wheel", False, [BASE, "lightning-grad --print_completion shtab-bash"]),
    "bnb": ("wheel", False, [BASE, f"{FIT} --optimizer bitsandbytes.optim.AdamW8bit --optimizer.lr 1e-3"]),
    "hf": ("wheel", False, [BASE, HF]),
    "minilm": ("wheel", False, [BASE, MINILM]),
    "demo": ("wheel", False, [BASE, DEMO]),
    "docs": ("sdist", True, ["mkdocs build --strict --site-dir site"]),
    "test": ("sdist", True, ["ruff --version", "pytest -q tests/unit/test_random.py tests/unit/test_diffgrad.py"]),
    "te": ("wheel", False, [BASE, "\nimport transformer_engine.pytorch"]),
}


class CommandError(Exception):
    """A command ended with an error; the text is the end of what it said."""


def run(command, folder):
    """Run a command that must succeed, without what the caller's shell would let it import."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        raise CommandError(
            "$ {}\n{}".format(" ".join(map(str, command))[:300], "\n".join(done.stdout.splitlines()[-25:]))
        )


def environment(folder):
    """Make an empty environment; return the folder of its programs."""
    run([sys.executable, "-m", "venv", folder], ROOT)
    return folder / ("Scripts" if os.name == "nt" else "bin")


def build(folder):
    """Build sdist, and the wheel from it; return both paths."""
    programs = environment(folder / "build-environment")
    run([programs / "python", "-m", "pip", "install", "--quiet", "build"], ROOT)
    run([programs / "python", "-m", "build", "--outdir", folder / "dist"], ROOT)
    return next((folder / "dist").glob("*.tar.gz")), next((folder / "dist").glob("*.whl"))


def use(extra, archives, folder, constraint):
    """Install one extra in an empty environment and run the commands that need it."""
    kind, unpacked, commands = USES[extra]
    archive = archives[kind]
    programs = environment(folder / "environment")
    wanted = f"lightning-grad[{extra}] @ {archive.as_uri()}" if extra else str(archive)
    run([programs / "python", "-m", "pip", "install", "--quiet", "--no-compile", "-c", constraint, wanted], folder)
    place = folder / "use"
    place.mkdir()
    if unpacked:
        with tarfile.open(archives["sdist"]) as file:
            file.extractall(place, filter="data")
        (place,) = place.iterdir()
        shutil.rmtree(place / "lightning_grad")  # only the installed package may be imported
    for command in commands:
        if command.startswith("\n"):
            run([programs / "python", "-c", command], place)
        else:
            program, *arguments = command.split()
            run([programs / program, *arguments], place)


def main(arguments):
    """Build, then one extra after the other; return 1 if any failed."""
    names = [extra or "base" for extra in USES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help="of " + ", ".join(names))
    parser.add_argument("--constraint", default=str(ROOT / "constraints.txt"), help="pip's constraints file")
    options = parser.parse_args(arguments)
    if unknown := set(options.extras) - set(names):
        parser.error(f"there is no extra {sorted(unknown)}; there are {', '.join(names)}")
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        sdist, wheel = build(folder)
        for path in (sdist, wheel):
            print(f"{path.name:<45}{path.stat().st_size / 1e6:8.2f} MB", flush=True)
        for name in options.extras or names:
            start = time.time()
            try:
                with tempfile.TemporaryDirectory() as own:
                    use("" if name == "base" else name, {"sdist": sdist, "wheel": wheel}, Path(own), options.constraint)
                result = "passed"
            except CommandError as error:
                result = f"FAILED\n{error}"
                failed.append(name)
            print(f"{name:<10}{time.time() - start:6.0f} s  {result}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
