"""The canary: fails when Lightning renames what `lightning_grad._lightning` relies on."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_grad import _lightning


def test_private_attributes_exist_on_a_live_trainer():
    steps = []

    class Watch(BoringModel):
        def on_train_batch_end(self, *args):
            steps.append(_lightning.logging_step(self.trainer))

    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_steps=3,
        limit_val_batches=0,
    )
    trainer.fit(Watch())
    assert steps == [0, 1, 2]  # `self.log` in this hook writes at the count before the step


def test_every_private_attribute_of_the_file_is_listed_with_its_reason():
    tree = ast.parse(Path(_lightning.__file__).read_text(encoding="utf-8"))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
    }
    assert used <= {private.name for private in _lightning.PRIVATE}
    assert all(private.lacks for private in _lightning.PRIVATE)


@pytest.mark.parametrize("version", ["2.6.4", "2.6.6", "2.7.0", "2.6.6.dev0", "2.6.4+local"])
def test_supported_versions(version: str):
    _lightning.check_version(version)


@pytest.mark.parametrize(
    ("version", "text"),
    [
        ("2.6.1", r"supports lightning >= 2\.6\.4, < 3; 2\.6\.1 is installed"),
        ("3.0.0", r"supports lightning >= 2\.6\.4, < 3; 3\.0\.0 is installed"),
        ("2.6.2", r"malicious release"),
        ("2.6.3", r"malicious release"),
    ],
)
def test_refused_versions(version: str, text: str):
    with pytest.raises(ImportError, match=text):
        _lightning.check_version(version)


def test_the_other_twin_is_refused():
    twin = type("Trainer", (SimpleNamespace,), {"__module__": "pytorch_lightning.trainer.trainer"})()
    with pytest.raises(TypeError, match="comes from `pytorch_lightning`"):
        _lightning.refuse_twin(twin)
    _lightning.refuse_twin(Trainer(accelerator="cpu", logger=False))
