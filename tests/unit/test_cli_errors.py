"""Bad input: one line on stderr that names the key, and exit status 2. A crash keeps its traceback."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from lightning_grad._cli_errors import locate, one_line, raised_by_us
from lightning_grad._validate import check_range
from lightning_grad.cli import main
from lightning_grad.sampling import JSONLPrompts
from tests.cli_models import Tiny
from tests.unit.test_cli import DATA, HERE, QUIET, SGD

MODEL = [f"--model={HERE}Tiny"]


@pytest.fixture(autouse=True)
def _plain_process(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["lightning-grad"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JSONARGPARSE_DEBUG", raising=False)


def refused(capsys, words: list[str]) -> str:
    """The one line. Lightning's own notes ("Seed set to 1") go through logging and warnings."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("lightning-grad: error: ")]
    assert len(lines) == 1
    assert err.strip().endswith(lines[0])
    assert "Traceback" not in err
    return lines[0].removeprefix("lightning-grad: error: ")


CALLBACK = f"--trainer.callbacks={HERE}Picky"
GROUPS = "--optimizer_groups="
WORDS = [
    # a misspelt argument
    (["--trainer.max_epoch=3"], "`trainer.max_epoch` is not an option. Did you mean `trainer.max_epochs`?"),
    (["--model.widht=3"], "`model`: Tiny has no argument `widht`. Did you mean `width`?"),
    ([*SGD, "--optimizer.momentun=0.9"], "`optimizer`: SGD has no argument `momentun`. Did you mean `momentum`?"),
    ([CALLBACK, "--trainer.callbacks.bta=3"], "`trainer.callbacks`: Picky has no argument `bta`. Did you mean `beta`?"),
    (["--optimizer.lr=1"], "`optimizer`: name the class before its argument `lr`: --optimizer CLASS, or `class_path:`"),
    # a value of the wrong type
    (["--trainer.max_epochs=many"], "`trainer.max_epochs`: expected int, got 'many'."),
    (["--model.width=wide"], "`model.width`: expected int, got 'wide'."),
    ([*SGD, "--optimizer.lr=fast"], "`optimizer.lr`: expected float, got 'fast'."),
    (
        [*SGD, "--lr_scheduler_interval=week"],
        "`lr_scheduler_interval`: expected 'auto' or 'epoch' or 'step', got 'week'.",
    ),
    # a value out of range
    (["--model.width=0"], "`model` (Tiny): `width` must be an integer >= 1, got 0."),
    ([CALLBACK, "--trainer.callbacks.beta=3"], "`trainer.callbacks[0]` (Picky): `beta` must be in (0, 1), got 3.0."),
    (["--optimizer=DiffGrad", "--optimizer.lr=-1"], "`optimizer` (DiffGrad): lr must be >= 0 and finite, got -1.0"),
    (["--trainer.accelerator=abacus"], "`trainer`: You selected an invalid accelerator name"),
    ([*SGD, "--lr_scheduler=StepLR", "--lr_scheduler.step_size=0.5"], "`lr_scheduler.step_size`: expected int"),
    # a missing file
    (["-c=nowhere.yaml"], "`config`: File does not exist: "),
    (["--ckpt_path=nowhere.ckpt"], "`ckpt_path`: there is no checkpoint 'nowhere.ckpt'."),
    # a wrong class path
    (["--model=Tinny"], "`model`: no class named 'Tinny' is known. Did you mean `Tiny`?"),
    (
        ["--model=Xyzzy"],  # like no class of another test
        "`model`: no class named 'Xyzzy' is known. Give its import path, e.g. my_file.Xyzzy for a class in",
    ),
    (["--model=boom.Model"], "`model`: cannot import 'boom.Model': not today."),
    (["c.yaml"], "`c.yaml` is not an option. A config file comes after `-c`: -c c.yaml."),
    (["--model=nowhere.Tiny"], "`model`: cannot import 'nowhere.Tiny': No module named 'nowhere'."),
    ([f"--model={HERE}Tinny"], f"`model`: cannot import '{HERE}Tinny': module"),
    (["--optimizer=DifGrad"], "`optimizer`: no class named 'DifGrad' is known. Did you mean `DiffGrad`?"),
    # parameter groups
    ([*SGD, GROUPS + '[{"params": ["hed.*"]}]'], "`optimizer_groups[0].params`: no parameter matches 'hed.*'."),
    ([*SGD, GROUPS + '[{"parms": ["head.*"]}]'], "`optimizer_groups`: OptimizerGroup has no argument `parms`. Did"),
    (
        [*SGD, GROUPS + '[{"params": ["head.*"], "overrides": {"lrate": 1}}]'],
        "`optimizer_groups[0].overrides`: SGD has no group setting `lrate`. It has dampening,",
    ),
    (
        ["--optimizer=DiffGrad", GROUPS + '[{"params": ["head.*"], "overrides": {"lr": -2}}]'],
        "`optimizer_groups[0].overrides` (DiffGrad): lr must be >= 0 and finite, got -2",
    ),
    (["--optimizer=Rprop", "--no_decay=[norm]"], "`no_decay`: Rprop has no `weight_decay`."),
    (["--no_decay=[norm]"], "`no_decay` needs an `optimizer` in the config"),
    ([], "Tiny has no `configure_optimizers` and the config no `optimizer`. Name one, e.g. --optimizer=AdamW"),
    # found when the run is set up
    ([*SGD, f"--trainer.callbacks={HERE}RefusesAtStart"], "RefusesAtStart needs a map-style dataset. Use another one."),
    (
        [*SGD, "--trainer.callbacks=AdaptiveBatchSize", "--trainer.callbacks.max_batch_size=2"],
        "`max_batch_size` (2) is below the batch that the run starts with: 4 = 1 processes * 1 accumulated * 4 of the",
    ),
    # a class of another kind
    (
        ["--optimizer=AdaptiveBatchSize"],
        "`optimizer`: no class named 'AdaptiveBatchSize' is known. AdaptiveBatchSize is",
    ),
    (
        ["--optimizer.help", "AdaptiveBatchSize"],
        "`--optimizer.help`: no class named 'AdaptiveBatchSize' is known here. AdaptiveBatchSize is a callback: "
        "--trainer.callbacks=AdaptiveBatchSize, and --trainer.callbacks.help=AdaptiveBatchSize for its arguments.",
    ),
    (
        ["--optimizer=lightning_grad.AdaptiveBatchSize"],
        "`optimizer`: lightning_grad.AdaptiveBatchSize is no Optimizer.",
    ),
    (["--trainer.strategy=ElasticSPSAStrategy"], "`trainer`: ElasticSPSAStrategy has arguments to set: add --trainer."),
    (["--trainer.precision=NVFP4Precision"], "`trainer.precision`: expected int or 'transformer-engine' or"),
]


@pytest.mark.parametrize(("words", "text"), WORDS, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_words(capsys, words: list[str], text: str):
    Path("boom.py").write_text("raise RuntimeError('not today')")
    assert refused(capsys, ["fit", *MODEL, *DATA, *QUIET, *words]).startswith(text)


CONFIGS = [
    ("trainer: {max_epoch: 3}", "`trainer.max_epoch` is not an option. Did you mean `trainer.max_epochs`?"),
    ("modle: {a: 1}", "`modle.a` is not an option. Did you mean `model`?"),
    ("fit: {seed_everything: 1}", "`fit.seed_everything` is not an option."),
    (
        "optimiser: {class_path: SGD, init_args: {lr: 1}}",
        "`optimiser.init_args.lr` is not an option. Did you mean `opt",
    ),
    ("trainer: 3", "`trainer` takes settings like max_epochs, got 3."),
    ("- a", "The config file c.yaml must hold lines `key: value`; it has - a."),
    ("", "The config file c.yaml must hold lines `key: value`; it has nothing."),
    ("max_epochs: 3", "`max_epochs` is not an option. Did you mean `trainer.max_epochs`?"),
    ("optimizer: {class_path: SGD, lr: 0.1}", "`optimizer`: beside `class_path` there may be `init_args` only"),
    ("trainer:\n  a: 1\n b: 2", "The config file is not valid YAML: "),
    ("trainer:\n\ta: 1", "The config file is not valid YAML: while scanning for the next token found character that"),
    (
        "trainer: {callbacks: [{class_path: LearningRateMonitor}, "
        f"{{class_path: {HERE}Picky, init_args: {{b: 1}}}}]}}",
        "`trainer.callbacks`: Picky has no argument `b`. It takes beta.",
    ),
    (
        "trainer: {callbacks: [{class_path: LearningRateMonitor}, "
        f"{{class_path: {HERE}Picky, init_args: {{beta: 1}}}}]}}",
        "`trainer.callbacks[1]` (Picky): `beta` must be in (0, 1), got 1.0.",
    ),
    ("optimizer: {class_path: torch.optim.AdamV}", "`optimizer`: cannot import 'torch.optim.AdamV': module"),
    ("lr_scheduler: {class_path: StepLR}\noptimizer: SGD", "`lr_scheduler`: StepLR needs a value for step_size."),
]


@pytest.mark.parametrize(("text", "line"), CONFIGS, ids=lambda v: v.split("\n")[0][:40])
def test_configs(capsys, text: str, line: str):
    Path("c.yaml").write_text(text)
    assert refused(capsys, ["fit", *MODEL, *DATA, *QUIET, "-c", "c.yaml"]).startswith(line)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["fut"], "`fut` is no command. Did you mean `fit`?"),
        (["spas"], "`spas` is no command. Did you mean `spsa`?"),
        (["--optimizer=SGD", "fit"], "the command comes before its options: `lightning-grad fit --optimizer=SGD ...`."),
        (
            ["-c", f"{HERE}yaml"],
            "the command is missing: `lightning-grad fit -c tests.cli_models.yaml`. There are fit,",
        ),
        (["fit"], "`model` is required: set it in a config (-c FILE) or with --model."),
        ([], "say what to do: fit, validate, test, predict, advise, scaling, spsa."),
        (["-c", "nowhere.yaml"], "`config`: File does not exist: "),
    ],
)
def test_the_first_words(capsys, words: list[str], line: str):
    Path(f"{HERE}yaml").write_text("model: {class_path: Tiny}")
    assert refused(capsys, words).startswith(line)


def test_a_refused_optimizer_leaves_no_log_folder(capsys):
    words = [w for w in QUIET if "logger" not in w]
    refused(capsys, ["fit", *MODEL, *DATA, *words, "--optimizer=DiffGrad", "--optimizer.lr=-1"])
    assert list(Path(".").iterdir()) == []


def test_a_broken_config_is_named_and_so_is_a_tab(capsys):
    Path("good.yaml").write_text("trainer: {max_epochs: 1}")
    Path("bad.yaml").write_text("trainer:\n\ta: 1")
    line = refused(capsys, ["fit", *MODEL, "-c", "good.yaml", "-c", "bad.yaml"])
    assert line.endswith("in 'bad.yaml', line 2, column 1. A line is indented with a tab; YAML takes spaces only.")


def test_a_class_of_another_kind_is_said_where_it_belongs(capsys):
    line = refused(capsys, ["fit", *MODEL, *DATA, *QUIET, "--trainer.precision=NVFP4Precision"])
    assert "NVFP4Precision is a precision plugin: --trainer.plugins=NVFP4Precision" in line


def test_a_crash_at_setup_keeps_its_traceback(monkeypatch):
    def bug(*args):
        raise ValueError("a bug")

    monkeypatch.setattr(Tiny, "on_fit_start", bug)
    with pytest.raises(ValueError, match="a bug"):
        main(["fit", *MODEL, *DATA, *QUIET, *SGD])


@pytest.mark.parametrize(("low", "ours"), [(2.0, True), ("two", False)], ids=["refused", "failed"])
def test_only_a_raise_of_ours_is_bad_input(low, ours: bool):
    with pytest.raises(ValueError) as caught:
        check_range("x", 1.0, low, 3.0)
    assert raised_by_us(caught.value) == ours


def test_our_words_are_kept_where_another_error_is_the_cause(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "1 + 1 =", "answer": 2}\n{oops\n')
    with pytest.raises(ValueError) as caught:  # from one of json's
        JSONLPrompts(str(path))
    assert re.search(r"p\.jsonl:2: not JSON", locate(caught.value, {}))


def test_what_was_raised_from_none_has_no_cause():
    def fail():
        try:
            int("x")
        except ValueError:
            raise ValueError("said by hand") from None

    with pytest.raises(ValueError) as caught:
        fail()
    assert locate(caught.value, {}) == "said by hand"


def test_a_crash_in_training_keeps_its_traceback():
    with pytest.raises(ValueError, match="a bug"):
        main(["fit", f"--model={HERE}Crashes", *DATA, *QUIET, *SGD])


def test_misuse_inside_the_training_loop_is_a_crash():
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    with pytest.raises(MisconfigurationException):
        main(["fit", f"--model={HERE}Misuses", *DATA, *QUIET, *SGD])


def test_debug_brings_the_traceback_back(monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "true")
    with pytest.raises(ValueError, match="`width` must be"):
        main(["fit", *MODEL, *DATA, *QUIET, "--model.width=0"])


def test_any_message_becomes_one_line():
    assert one_line("something\n  over\n\n lines") == "something over lines"
    assert not re.search("\n", one_line('Parser key "x":\n  - odd\n  - things'))
