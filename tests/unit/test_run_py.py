"""run.py on machines where something is missing: each situation ends in a sentence that says what to do."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN_PY = Path(__file__).parents[2] / "run.py"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run.py as a module whose repository is an empty folder."""
    spec = importlib.util.spec_from_file_location("run_py", RUN_PY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    venv = tmp_path / ".venv"
    monkeypatch.setattr(module, "ROOT", str(tmp_path))
    monkeypatch.setattr(module, "VENV", str(venv))
    monkeypatch.setattr(module, "STAMP", str(venv / "stamp.json"))
    monkeypatch.setattr(module, "LOG", str(venv / "install.log"))
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text("as released\n")
    return module


@pytest.fixture
def installs(run, monkeypatch):
    """Count installations instead of doing them."""
    calls = []

    def make_venv():
        Path(run.VENV).mkdir(exist_ok=True)
        Path(run.in_venv("python")).parent.mkdir(exist_ok=True)
        Path(run.in_venv("python")).touch()

    def follow(command):
        calls.append(command)
        return 0, "Successfully installed"

    monkeypatch.setattr(run, "make_venv", make_venv)
    monkeypatch.setattr(run, "venv_defect", lambda: None)
    monkeypatch.setattr(run, "follow", follow)
    return calls


def test_an_old_python_can_read_the_file():
    ast.parse(RUN_PY.read_text(encoding="utf-8"), feature_version=(3, 6))


def test_old_python_is_told_what_to_install(run, monkeypatch, capsys):
    monkeypatch.setattr(run.sys, "version_info", (3, 8, 10))
    monkeypatch.setattr(run.shutil, "which", lambda name: None)
    monkeypatch.setattr(run.check_python, "__defaults__", (lambda name: None,))
    assert run.main(["demo"]) == 2
    assert "needs Python 3.11 or newer; this is Python 3.8. Install a newer one" in capsys.readouterr().err


def test_old_python_is_told_of_a_newer_one_on_the_machine(run):
    with pytest.raises(run.UserError, match=r"This machine has python3\.12: use `python3\.12 run\.py` instead"):
        run.check_python((3, 10, 0), which=lambda name: name == "python3.12")
    run.check_python((3, 11, 0))


@pytest.mark.parametrize("absent", ["venv", "ensurepip"])
def test_missing_venv_module(run, absent):
    with pytest.raises(run.UserError, match=rf"`{absent}` is missing.*apt-get install python3\.\d+-venv"):
        run.check_venv_module(find=lambda name: None if name == absent else name)


def test_no_network_with_the_words_of_the_real_pip(run):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "NO_PROXY": "*", "no_proxy": "*"}
    pip = [sys.executable, "-m", "pip", "download", "--retries", "1", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run(  # nothing listens on port 9 of this machine
        [*pip, "--index-url", "http://127.0.0.1:9/simple", "lightning"], env=environment, capture_output=True, text=True
    )
    assert done.returncode
    assert run.explain_install_failure(done.stdout + done.stderr).startswith("No network: pip could not reach")


def test_other_install_failures_are_explained(run):
    text = run.explain_install_failure("ERROR: No matching distribution found for torch==2.13.0")
    assert "no build of torch==2.13.0 for Python" in text
    assert "disk is full" in run.explain_install_failure("OSError: [Errno 28] No space left on device")
    text = run.explain_install_failure("".join(f"line {i}\n" for i in range(100)))
    assert "line 99" in text
    assert "line 3\n" not in text
    assert run.LOG in text


def test_installs_once_and_again_only_when_the_requirements_change(run, installs):
    run.environment({"demo"})
    run.environment({"demo"})
    assert len(installs) == 1
    assert installs[0][-1] == ".[demo]"
    Path(run.ROOT, "constraints.txt").write_text("another version\n")
    run.environment({"demo"})
    assert len(installs) == 2


def test_extras_add_up(run, installs):
    run.environment({"demo"})
    run.environment({"docs"})
    run.environment({"demo"})
    assert [call[-1] for call in installs] == [".[demo]", ".[demo,docs]"]


def test_a_failed_install_is_tried_again(run, installs, monkeypatch):
    monkeypatch.setattr(run, "follow", lambda command: (1, "ERROR: NewConnectionError"))
    with pytest.raises(run.UserError, match="No network"):
        run.environment({"demo"})
    monkeypatch.setattr(run, "follow", lambda command: (installs.append(command), (0, ""))[1])
    run.environment({"demo"})
    assert len(installs) == 1


def test_a_broken_environment_is_made_anew(run, capsys):
    Path(run.VENV).mkdir()
    Path(run.VENV, "pyvenv.cfg").write_text("home = /nowhere\n")
    run.make_venv()
    assert "is broken (its Python does not start" in capsys.readouterr().out
    assert run.venv_defect() is None


def test_a_folder_that_is_no_environment_is_left_alone(run):
    Path(run.VENV).mkdir()
    Path(run.VENV, "thesis.tex").write_text("years of work")
    with pytest.raises(run.UserError, match="is not a virtual environment"):
        run.make_venv()
    assert Path(run.VENV, "thesis.tex").read_text() == "years of work"


def test_the_documentation_is_built_strictly(run, installs, monkeypatch):
    calls = []
    monkeypatch.setattr(run, "call", lambda *command: calls.append(command) or 0)
    assert run.main(["docs"]) == run.main(["test", "--only", "docs"]) == 0
    for command in calls:
        assert "--strict" in command
        assert "--quiet" not in command, "mkdocs then ignores its warnings, also under --strict"
    assert len(calls) == 2


def test_the_demo_ends_with_a_next_step(run, installs, monkeypatch, capsys):
    monkeypatch.setattr(run, "call", lambda *command: 0)
    assert run.main(["demo"]) == 0
    said = capsys.readouterr().out
    assert f"{run.in_venv('lightning-grad')} fit --model my_model.MyModel" in said
    monkeypatch.setattr(run, "call", lambda *command: 3)
    assert run.main(["demo"]) == 3
    assert "Next" not in capsys.readouterr().out


def test_unknown_stage_and_unknown_benchmark(run, installs, capsys):
    assert run.main(["test", "--only", "lint,tpyes"]) == 2
    assert "--only takes lint, types, tests" in capsys.readouterr().err
    assert run.main(["bench", "nosuch"]) == 2
    assert "There is no benchmark 'nosuch'" in capsys.readouterr().err


def test_all_stages_run_and_a_failure_is_named(run, installs, monkeypatch, capsys):
    ran = []

    def stage(name, status):
        return (lambda rest: (ran.append(name), status)[1], "purpose")

    monkeypatch.setattr(run, "STAGES", {"one": stage("one", 0), "two": stage("two", 1), "three": stage("three", 0)})
    assert run.main(["test"]) == 1
    assert ran == ["one", "two", "three"]
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("FAILED: two (")
