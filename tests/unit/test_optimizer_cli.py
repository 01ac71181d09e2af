"""Every optimizer by name: on the command line, from YAML, with parameters left out of the weight decay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.cli import LightningCLI

from lightning_grad import SGLD, BindDataSize
from lightning_grad.cli import LightningGradCLI
from tests.conformance.cases import CASES, Case

every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.cls.__name__)
MODEL = ["--model=tests.cli_models.Tiny", "--data=tests.cli_models.TinyData"]
QUIET = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false",
         "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]  # fmt: skip


def configured(*words: str) -> LightningCLI:
    """The command up to, and without, the training."""
    return LightningGradCLI(args=[*MODEL, *QUIET, *words], run=False)


@every
def test_on_the_command_line(case: Case) -> None:
    cli = configured(f"--optimizer={case.cls.__name__}", "--optimizer.lr=0.0625", "--optimizer.maximize=true")
    optimizer = cli.model.configure_optimizers()
    assert type(optimizer) is case.cls
    group = optimizer.param_groups[0]
    assert group["lr"] == 0.0625
    assert group["maximize"] is True
    assert group["params"] == list(cli.model.parameters())


@every
def test_from_yaml_with_weight_decay_by_name(case: Case, tmp_path: Path) -> None:
    decays = "weight_decay" in case.cls([next(iter(_tiny()))], **case.kwargs[0]).defaults
    decay = "    weight_decay: 0.25\n" if decays else ""
    (tmp_path / "config.yaml").write_text(
        f"optimizer:\n  class_path: {case.cls.__name__}\n  init_args:\n    lr: 0.0625\n{decay}"
        + ("no_decay: [bias, norm]\n" if decays else "")
        + "optimizer_groups:\n- {params: [head.weight], overrides: {lr: 0.5}}\n"
    )
    cli = configured(f"--config={tmp_path / 'config.yaml'}")
    optimizer = cli.model.configure_optimizers()
    assert type(optimizer) is case.cls
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    groups = {name: found[id(p)] for name, p in cli.model.named_parameters()}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "net.0.weight": 0.0625, "net.0.bias": 0.0625, "net.1.weight": 0.0625, "net.1.bias": 0.0625,
        "head.weight": 0.5, "head.bias": 0.0625,
    }  # fmt: skip
    if decays:
        assert [name for name, group in groups.items() if group["weight_decay"]] == ["net.0.weight", "head.weight"]


def _tiny() -> list[Any]:
    from tests.cli_models import Tiny

    return list(Tiny().parameters())


@pytest.mark.parametrize("given", [[], ["--trainer.callbacks+=BindDataSize"]], ids=["added", "given"])
@pytest.mark.parametrize("name", ["SGLD", "PSGLD", "SGHMC"])
def test_samplers_learn_the_size_of_the_data(name: str, given: list[str]) -> None:
    seed_everything(0, verbose=False)
    cli = configured(f"--optimizer={name}", "--optimizer.lr=1e-3", "--trainer.max_steps=1", *given)
    assert sum(isinstance(callback, BindDataSize) for callback in cli.trainer.callbacks) == 1
    cli.trainer.fit(cli.model, cli.datamodule)
    assert cli.trainer.optimizers[0].param_groups[0]["n_data"] == 16


def test_without_the_command_the_error_names_the_callback() -> None:
    cli = configured("--optimizer=SGLD")
    trainer = Trainer(
        max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
    )
    assert isinstance(cli.model.configure_optimizers(), SGLD)
    with pytest.raises(ValueError, match="add the callback BindDataSize"):
        trainer.fit(cli.model, cli.datamodule)
