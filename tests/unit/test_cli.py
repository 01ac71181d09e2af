"""The command in process: runs, lazy optimizers, resume defaults, tools."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import lightning
import pytest
import torch
import yaml
from jsonargparse import set_parsing_settings
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.cli import LightningCLI

from lightning_grad import ChecksumCheckpointIO, RandomStateCheckpoint
from lightning_grad import _command as command
from lightning_grad._command import Tool
from lightning_grad.cli import LightningGradCLI, main

ROOT = Path(command.__file__).parents[1]
HERE = "tests.cli_models."
QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.max_epochs=1",
    "--seed_everything=1",
]
DATA = [f"--data={HERE}TinyData"]


@pytest.fixture(autouse=True)
def _plain_process(monkeypatch, tmp_path):
    """The words pytest was called with are not the command's, and runs write into a folder of their own."""
    monkeypatch.setattr(sys, "argv", ["lightning-grad"])
    monkeypatch.chdir(tmp_path)


def run(model: str, *words: str, cli: type[LightningCLI] = LightningGradCLI, **kwargs) -> LightningCLI:
    return cli(args=["fit", f"--model={HERE}{model}", *DATA, *QUIET, *words], **kwargs)


def moved(cli: LightningCLI, before: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, value in cli.model.state_dict().items() if not torch.equal(value, before[name])]


def initial(model: str) -> dict[str, torch.Tensor]:
    """Weights of the same run before its first step."""
    own = run(model, "--optimizer=SGD", "--optimizer.lr=0")
    return {name: value.clone() for name, value in own.model.state_dict().items()}


SGD = ["--optimizer=SGD", "--optimizer.lr=0.1"]


def test_a_model_made_in_configure_model_trains():
    names = moved(run("LateTiny", *SGD), initial("LateTiny"))
    assert sorted(names) == sorted(initial("LateTiny"))


def test_the_stock_command_cannot_train_a_model_made_in_configure_model():
    with pytest.raises(ValueError, match="empty parameter list"):
        run("LateTiny", *SGD, cli=LightningCLI, save_config_callback=None)


def test_layers_a_plugin_replaces_train():
    plugin = f"--trainer.plugins={HERE}ReplaceLayers"
    assert {"net.0.weight", "head.weight"} <= set(moved(run("Tiny", *SGD, plugin), initial("Tiny")))


def test_the_stock_command_trains_nothing_in_replaced_layers():
    """The reason for lazy optimizers. If this fails, Lightning has mended it: ours may become thinner."""
    plugin = f"--trainer.plugins={HERE}ReplaceLayers"
    stock = run("Tiny", *SGD, plugin, cli=LightningCLI, save_config_callback=None)
    assert not {"net.0.weight", "head.weight"} & set(moved(stock, initial("Tiny")))


def test_optimizer_and_scheduler_equal_a_hand_written_configure_optimizers():
    ours = run("Tiny", "--optimizer=SGD", "--optimizer.lr=0.125")
    hand = run("OwnOptimizer")
    assert type(hand.trainer.optimizers[0]) is torch.optim.SGD
    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), hand.model.parameters(), strict=True))


@pytest.mark.parametrize(("interval", "lr"), [("epoch", 0.05), ("step", 0.1 / 2**4)])
def test_scheduler_interval(interval: str, lr: float):
    cli = run(
        "Tiny",
        *SGD,
        "--lr_scheduler=StepLR",
        "--lr_scheduler.step_size=1",
        "--lr_scheduler.gamma=0.5",
        f"--lr_scheduler_interval={interval}",
    )
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(lr)  # 4 batches, 1 epoch


def test_plateau_scheduler_keeps_its_monitor():
    cli = run("Tiny", *SGD, "--lr_scheduler=ReduceLROnPlateau", "--lr_scheduler.monitor=val_loss")
    assert cli.trainer.lr_scheduler_configs[0].monitor == "val_loss"


def test_models_with_several_optimizers_keep_them():
    cli = run("TwoOptimizers")
    assert [type(o).__name__ for o in cli.trainer.optimizers] == ["SGD", "Adam"]
    assert len(moved(cli, initial("Tiny"))) == 6


def test_replacing_the_models_own_optimizer_is_said(caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        cli = run("OwnOptimizer", "--optimizer=Adam")
    assert "replaces OwnOptimizer.configure_optimizers" in caplog.text
    assert type(cli.trainer.optimizers[0]) is torch.optim.Adam


def test_a_subclass_may_fix_the_optimizer_class():
    class Fixed(LightningGradCLI):
        def add_arguments_to_parser(self, parser):
            parser.add_optimizer_args(torch.optim.Adam, "optimizer")

    cli = run("Tiny", "--optimizer.lr=0.25", cli=Fixed)
    assert type(cli.trainer.optimizers[0]) is torch.optim.Adam
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 0.25


def test_groups_by_name_from_yaml(tmp_path: Path):
    config = {
        "model": HERE + "LateTiny",
        "data": HERE + "TinyData",
        "optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.01, "weight_decay": 0.1}},
        "no_decay": ["bias", "norm"],
        "optimizer_groups": [{"params": ["head.*"], "overrides": {"lr": 0.5}}],
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    cli = LightningGradCLI(args=["fit", "-c", "c.yaml", *QUIET])
    groups = [(g["param_names"], g["lr"], g["weight_decay"]) for g in cli.trainer.optimizers[0].param_groups]
    assert groups == [
        (["net.0.weight"], 0.01, 0.1),
        (["net.0.bias", "net.1.weight", "net.1.bias"], 0.01, 0.0),
        (["head.weight"], 0.5, 0.1),
        (["head.bias"], 0.5, 0.0),
    ]


def test_later_configs_win_and_plus_appends(tmp_path: Path):
    first = {
        "model": HERE + "Tiny",
        "data": HERE + "TinyData",
        "optimizer": "SGD",
        "trainer": {"max_steps": 7, "callbacks": [{"class_path": HERE + "Picky"}]},
    }
    second = {"trainer": {"max_steps": 2, "callbacks+": [{"class_path": "LearningRateFinder"}]}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(first))
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(second))
    cli = LightningGradCLI(args=["fit", "-c", "a.yaml", "-c", "b.yaml", *QUIET, "--trainer.fast_dev_run=1"])
    config = cli.config["fit"]["trainer"]
    assert config["max_steps"] == 2
    assert [c["class_path"].rpartition(".")[2] for c in config["callbacks"]] == ["Picky", "LearningRateFinder"]


def test_print_config_can_be_run(tmp_path: Path, capsys):
    words = ["fit", f"--model={HERE}Tiny", *DATA, *QUIET, *SGD, "--no_decay=[norm]"]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--print_config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    assert yaml.safe_load(printed)["no_decay"] == ["norm"]
    assert main(["fit", "-c", "printed.yaml"]) == 0


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_other_subcommands(subcommand: str):
    assert main([subcommand, f"--model={HERE}Tiny", *DATA, *QUIET]) == 0


def test_a_second_run_and_a_resume_in_the_same_folder(tmp_path: Path):
    words = [w for w in QUIET if "checkpointing" not in w and "max_epochs" not in w]
    words = ["fit", f"--model={HERE}Tiny", *DATA, *words, *SGD, "--trainer.default_root_dir=run"]
    assert main([*words, "--trainer.max_epochs=1"]) == 0
    assert main([*words, "--trainer.max_epochs=1"]) == 0  # same config: one file
    assert [p.name for p in Path("run").glob("*.yaml")] == ["config.yaml"]
    checkpoint = next(Path("run").rglob("*.ckpt"))
    assert main([*words, "--trainer.max_epochs=2", f"--ckpt_path={checkpoint}"]) == 0
    assert sorted(p.name for p in Path("run").glob("*.yaml")) == ["config-1.yaml", "config.yaml"]
    assert yaml.safe_load(Path("run/config.yaml").read_text())["trainer"]["max_epochs"] == 1
    assert yaml.safe_load(Path("run/config-1.yaml").read_text())["trainer"]["max_epochs"] == 2


def test_a_checkpoint_that_cannot_be_resumed(capsys):
    words = [w for w in QUIET if "checkpointing" not in w and "max_epochs" not in w]
    words = ["fit", f"--model={HERE}Tiny", *DATA, *words, *SGD, "--trainer.default_root_dir=run"]
    assert main([*words, "--trainer.max_epochs=1"]) == 0
    checkpoint = next(Path("run").rglob("*.ckpt"))
    whole = checkpoint.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    for name, content, line in [
        ("flipped.ckpt", bytes(flipped), "flipped.ckpt: the contents do not match the SHA-256"),
        ("short.ckpt", whole[: len(whole) // 2], "short.ckpt: the end of the file is missing"),
        ("empty.ckpt", b"", "empty.ckpt: the file is empty."),
        ("text.ckpt", b"hello", "'text.ckpt' is not a file that torch.save wrote."),
        ("run", None, "'run' is a directory. Name a checkpoint file in it."),
    ]:
        if content is not None:
            Path(name).write_bytes(content)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([*words, f"--ckpt_path={name}"])
        assert stop.value.code == 2
        assert f"lightning-grad: error: `ckpt_path`: {line}" in capsys.readouterr().err


def test_a_run_without_a_folder_does_not_touch_the_users_config(tmp_path: Path):
    text = yaml.safe_dump({"model": HERE + "Tiny", "data": HERE + "TinyData", "optimizer": "SGD"})
    Path("config.yaml").write_text(text)
    assert main(["fit", "-c", "config.yaml", *QUIET]) == 0
    assert [p.name for p in Path(".").iterdir()] == ["config.yaml"]
    assert Path("config.yaml").read_text() == text


def test_a_model_in_the_current_folder_can_be_named(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    Path("my_local_model.py").write_text("from tests.cli_models import Tiny\nclass Mine(Tiny):\n    pass\n")
    assert main(["fit", "--model=my_local_model.Mine", *DATA, *QUIET, *SGD]) == 0


def test_exact_resume_is_on_and_not_doubled():
    cli = run("Tiny", *SGD)
    assert sum(isinstance(c, RandomStateCheckpoint) for c in cli.trainer.callbacks) == 1
    assert type(cli.trainer.strategy.checkpoint_io) is ChecksumCheckpointIO
    cli = run("Tiny", *SGD, "--trainer.callbacks=RandomStateCheckpoint", "--trainer.plugins=TorchCheckpointIO")
    assert sum(isinstance(c, RandomStateCheckpoint) for c in cli.trainer.callbacks) == 1
    assert type(cli.trainer.strategy.checkpoint_io) is TorchCheckpointIO
    cli = run("Tiny", *SGD, "--exact_resume=false")
    assert not any(isinstance(c, RandomStateCheckpoint) for c in cli.trainer.callbacks)
    assert type(cli.trainer.strategy.checkpoint_io) is TorchCheckpointIO


class Configurable(LightningGradCLI):
    def add_arguments_to_parser(self, parser):
        parser.add_lightning_class_args(RandomStateCheckpoint, "random_state")


@pytest.mark.parametrize(
    "own",
    [
        {"trainer_defaults": {"callbacks": RandomStateCheckpoint()}},
        {"trainer_defaults": {"callbacks": [RandomStateCheckpoint()]}},
        {"cli": Configurable},
    ],
    ids=["default", "defaults", "argument"],
)
def test_exact_resume_is_not_doubled_in_a_command_of_ones_own(own):
    cli = run("Tiny", *SGD, **own)
    assert sum(isinstance(c, RandomStateCheckpoint) for c in cli.trainer.callbacks) == 1


def test_version_and_help_name_everything(capsys):
    assert main(["--version"]) == 0
    version = capsys.readouterr().out
    assert f"(lightning {lightning.__version__}, torch {torch.__version__})" in version
    assert set(command.TRAINER_COMMANDS) == set(LightningGradCLI.subcommands())
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in (*command.TRAINER_COMMANDS, *command.TOOLS):
        assert sum(line.startswith(f"  {name} ") for line in lines) == 1


@pytest.mark.parametrize(
    ("words", "unloaded"),
    [
        (["--help"], {"numpy", "torch", "lightning"}),
        (["advise", "--params", "1B", "--tokens", "20B"], {"torch", "lightning"}),
        (["spsa", "--help"], {"lightning"}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
@pytest.mark.parametrize("script", [False, True], ids=["module", "script"])
def test_what_needs_no_lightning_starts_without_it(tmp_path: Path, words: list[str], unloaded: set[str], script: bool):
    (tmp_path / "lightning-grad").write_text("from lightning_grad._command import main\nraise SystemExit(main())\n")
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, sys\natexit.register(lambda: print('loaded', *sys.modules, file=sys.stderr))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    start = ["lightning-grad"] if script else ["-m", "lightning_grad"]
    done = subprocess.run(
        [sys.executable, *start, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stderr.splitlines()[-1].split())
    assert "lightning_grad._command" in loaded
    assert not loaded & unloaded


def test_a_process_that_looks_like_a_question_gets_the_classes_when_it_asks(tmp_path: Path):
    code = (
        "import sys; sys.argv = ['lightning-grad']\n"
        "import lightning_grad; assert 'lightning' not in sys.modules\n"
        "from lightning_grad import DiffGrad, StabilityMonitor\n"
        "assert set(lightning_grad.__all__) <= vars(lightning_grad).keys()\n"
        "assert not hasattr(lightning_grad, 'nothing')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_program_that_only_resembles_the_command_gets_the_classes(monkeypatch):
    monkeypatch.setattr(command, "_classes_wanted", False)
    for argv, orig in ((["advise.py"], []), (["-m", "advise"], ["python", "-m", "train", "advise"])):
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(sys, "orig_argv", orig)
        assert not command.answers_alone()
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "lightning_grad", "advise"])
    assert command.answers_alone()


def test_tools_are_imported_when_called_and_shown_in_help(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setitem(command.TOOLS, "advise", Tool("my_tool:start", "say which learning rate to use"))
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("my_tool.py").write_text("def start(args):\n    print(args)\n    return 3\n")
    main(["--help"])
    assert "say which learning rate to use" in capsys.readouterr().out
    assert "my_tool" not in sys.modules
    assert main(["advise", "--params", "1e9"]) == 3
    assert capsys.readouterr().out == "['--params', '1e9']\n"


@pytest.mark.slow
def test_shell_completion_knows_our_classes(capsys, tmp_path: Path):
    pytest.importorskip("shtab")
    try:
        with pytest.raises(SystemExit) as stop:
            main(["--print_completion", "shtab-bash"])
    finally:
        set_parsing_settings(add_print_completion_argument=False)
    assert stop.value.code == 0
    script = capsys.readouterr().out
    assert "DiffGrad" in script
    (tmp_path / "completion.bash").write_text(script)
    assert subprocess.run(["bash", "-n", "completion.bash"], cwd=tmp_path).returncode == 0


@pytest.mark.slow
def test_the_module_is_the_command_also_with_two_processes(tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    log = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs", "--trainer.logger.version=0"]
    words = ["fit", f"--model={HERE}LateTiny", *DATA, *SGD, *log, "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    assert main(words) == 0
    command_line = [sys.executable, "-m", "lightning_grad", *words, "--trainer.devices=2", "--trainer.strategy=ddp"]
    process = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 200}
    done = subprocess.run(command_line, **process)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.rglob("config*.yaml")) == ["config-1.yaml", "config.yaml"]
    done = subprocess.run([*command_line, "--optimizer.lr=-1"], **process)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "lightning-grad: error: `optimizer` (SGD): Invalid learning rate: -1.0"


def test_completion_without_its_package_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        main(["--print_completion", "shtab-bash"])
    assert stop.value.code == 2
    assert 'pip install "lightning-grad[completion]"' in capsys.readouterr().err


GUIDE = ROOT / "docs" / "guides" / "configure.md"


@pytest.mark.parametrize("number", range(len(re.findall("```yaml", GUIDE.read_text(encoding="utf-8")))))
def test_every_config_of_the_guide_runs(number: int):
    config = re.findall(r"```yaml\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)[number]
    Path("config.yaml").write_text(config)
    words = ["fit", "-c", "config.yaml"]
    words += [] if "model:" in config else ["--model=lightning_grad.demos.DigitsCNN"]
    words += [] if "data:" in config else ["--data=lightning_grad.demos.DigitsData"]
    assert main([*words, *[w for w in QUIET if "max_epochs" not in w], "--trainer.fast_dev_run=2"]) == 0
