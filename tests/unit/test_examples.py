"""Every example, a few steps of it, through the command its README names."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = sorted(EXAMPLES.glob("*/config.yaml"))
COMPARISONS = sorted(EXAMPLES.glob("*/compare.py"))
COMMAND = re.compile(r"^lightning-grad (\w+) -c examples/(\S+?)/config\.yaml", re.MULTILINE)


def need_packages(folder: Path) -> None:
    """Skip an example whose `requires.txt` names a module that is not installed."""
    listed = folder / "requires.txt"
    for module in listed.read_text(encoding="utf-8").split() if listed.exists() else []:
        pytest.importorskip(module)


def named(path: Path) -> str:
    return path.parent.name


def command_of(readme: str) -> tuple[str, str] | None:
    match = COMMAND.search(readme)
    return (match[1], match[2]) if match else None


def test_the_examples_are_found():
    assert CONFIGS


def test_the_index_names_every_example():
    index = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for readme in EXAMPLES.glob("*/README.md"):
        assert f"({named(readme)}/README.md)" in index
        assert "(../README.md)" in readme.read_text(encoding="utf-8"), f"{named(readme)} does not say how to call it"


def test_the_command_is_read_from_a_readme():
    assert command_of("text\n```\nlightning-grad fit -c examples/a/config.yaml --x 1\n```\n") == ("fit", "a")
    assert command_of("lightning-grad fit -c other/config.yaml") is None


@pytest.mark.parametrize("config", CONFIGS, ids=named)
def test_example_runs(config, tmp_path, monkeypatch, capsys):
    need_packages(config.parent)
    from lightning_grad.cli import main

    readme = (config.parent / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 40, "the README of an example has at most 40 lines"
    command = command_of(readme)
    assert command is not None, "the README does not name `lightning-grad fit -c examples/NAME/config.yaml`"
    subcommand, name = command
    assert name == config.parent.name, "the README names another example's config"
    monkeypatch.chdir(tmp_path)
    short = [
        "--trainer.max_steps=3",
        "--trainer.limit_val_batches=1",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    assert main([subcommand, "-c", str(config), *short]) == 0


@pytest.mark.parametrize("script", COMPARISONS, ids=named)
def test_comparison_runs(script, tmp_path, monkeypatch, capfd):
    need_packages(script.parent)
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), "--short", "--out", str(tmp_path)])
    before = {path: path.stat().st_mtime_ns for path in script.parent.iterdir()}
    if 'start_method="fork"' in script.read_text(encoding="utf-8"):
        # a fork of this process could wait for ever for a lock that a thread of an earlier test held
        environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": str(EXAMPLES.parent)}
        subprocess.run([sys.executable, *sys.argv], env=environment, check=True, timeout=200)
    else:
        runpy.run_path(str(script), run_name="__main__")
    assert capfd.readouterr().out.strip(), "a comparison prints its table"
    changed = [path.name for path in script.parent.iterdir() if before.get(path) != path.stat().st_mtime_ns]
    assert not [name for name in changed if name != "__pycache__"], "a short run must not overwrite the example's files"


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        ("0", r"(?s)worker \d ended with status 1:.*`total_steps` must be an integer >= 1"),
        ("9", "ended with status -9"),
    ],
    ids=["refused", "killed"],
)
def test_the_elastic_comparison_ends_when_a_worker_does(monkeypatch, steps, text):
    from multiprocessing.context import ForkServerProcess

    script = EXAMPLES / "spsa_elastic" / "compare.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--steps", steps])
    if steps == "9":
        start = ForkServerProcess.start
        monkeypatch.setattr(ForkServerProcess, "start", lambda self: (start(self), self.kill()))
    with pytest.raises(SystemExit, match=text):
        runpy.run_path(str(script), run_name="__main__")
