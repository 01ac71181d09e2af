"""What users may rely on is written down: names, YAML keys with defaults, state keys, TensorBoard tags.

After a change made on purpose: `python -m tests.unit.test_public_surface --update`, then review the difference. A
renamed or removed line breaks somebody's configuration or checkpoint; see CONTRIBUTING for what a rename owes them.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import re
import sys
from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch.optim import Optimizer

import lightning_grad

RECORD = Path(__file__).parents[1] / "golden" / "public_surface.txt"
PACKAGE = Path(lightning_grad.__file__).parent
UPDATE = "python -m tests.unit.test_public_surface --update"
TAG = re.compile(r"[a-z][a-z0-9_]*/[a-z][a-z0-9_]*")


def yaml_keys(cls: type) -> list[str]:
    """Constructor arguments as the command line knows them, with their defaults."""
    parser = ArgumentParser(exit_on_error=False)
    skip = {"params"} if issubclass(cls, Optimizer) else set()
    parser.add_class_arguments(cls, "x", skip=skip, fail_untyped=False, sub_configs=True)
    keys = [action.dest.partition(".")[2] for action in parser._actions if action.dest.startswith("x.")]
    defaults = parser.get_defaults().get("x") or {}
    # keys of an unpacked TypedDict are optional: the command knows them and leaves them out unless given
    return [f"{key} = {defaults[key]!r}" if key in defaults else f"{key}: optional" for key in keys]


def state_keys(cls: type) -> list[str]:
    """What a checkpoint holds for an object made with defaults."""
    with contextlib.suppress(TypeError):  # some argument has no default
        if issubclass(cls, Optimizer):
            weight = torch.nn.Parameter(torch.ones(4, 3))
            needed = {"n_data": 1} if "n_data" in inspect.signature(cls).parameters else {}
            optimizer = cls([weight], **needed)
            weight.grad = torch.ones_like(weight)
            optimizer.step()
            return sorted({str(key) for state in optimizer.state_dict()["state"].values() for key in state})
        if issubclass(cls, Callback):
            return sorted(map(str, cls().state_dict()))
    return []


def tags() -> set[str]:
    """String constants of the Lightning layer that look like `<plugin>/<quantity>`."""
    found = set()
    for folder in ("callbacks", "precision", "strategies"):
        for path in (PACKAGE / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and TAG.fullmatch(node.value):
                    found.add(node.value)
    return found


def surface() -> set[str]:
    lines = {f"tag {tag}" for tag in tags()}
    for name in lightning_grad.__all__:
        value = getattr(lightning_grad, name)
        if not isinstance(value, type):
            lines.add(f"{name}: value" if name != "__version__" else name)
            continue
        kinds = [k for k in (Optimizer, Callback, LightningModule, LightningDataModule) if issubclass(value, k)]
        lines.add(f"{name}: {kinds[0].__name__ if kinds else 'class'}")
        lines |= {f"{name}.{key}" for key in yaml_keys(value)}
        lines |= {f"{name} state {key}" for key in state_keys(value)}
    return lines


def test_public_surface_is_the_recorded_one():
    recorded, now = set(RECORD.read_text(encoding="utf-8").splitlines()), surface()
    gone, new = sorted(recorded - now), sorted(now - recorded)
    assert not gone, f"users rely on these: {gone}. If it is on purpose: {UPDATE}"
    assert not new, f"not recorded yet: {new}. Record them: {UPDATE}"


def test_every_public_name_exists_and_is_documented():
    assert len(set(lightning_grad.__all__)) == len(lightning_grad.__all__)
    undocumented = [n for n in lightning_grad.__all__ if n != "__version__" and not getattr(lightning_grad, n).__doc__]
    assert not undocumented


def test_no_name_of_torch_optim_is_taken():
    assert not [name for name in lightning_grad.__all__ if hasattr(torch.optim, name)]


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        raise SystemExit(f"usage: {UPDATE}")
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text("\n".join(sorted(surface())) + "\n", encoding="utf-8")
    print(f"{RECORD}: {len(surface())} lines")
