"""The commands: inspect, verify, replay."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

from lightning_grad.cli import main as command
from lightning_grad.spsa import Journal, Record, digest64
from lightning_grad.spsa.commands import main
from tests.spsa_helpers import batches, make_session, run_alone, tiny_model


@pytest.fixture
def run(tmp_path):
    """A journal file, its base weights in three forms, and the digest after every step."""
    safetensors = pytest.importorskip("safetensors.torch")
    session = make_session()
    session.journal.open_append(tmp_path / "run.spsa")
    digests = run_alone(session, batches(10))
    session.journal.close()
    state = tiny_model().state_dict()
    torch.save(state, tmp_path / "base.pt")
    around = {"pytorch-lightning_version": "2.6.6", "hyper_parameters": {"a": 1}}
    torch.save({"state_dict": state, **around}, tmp_path / "base.ckpt")
    safetensors.save_file(state, str(tmp_path / "base.safetensors"))
    return tmp_path, digests


@pytest.mark.parametrize("base", ["base.pt", "base.ckpt", "base.safetensors"])
@pytest.mark.parametrize("out", ["final.ckpt", "final.safetensors"])
def test_replay_writes_the_trained_weights(run, base, out, capsys):
    folder, digests = run
    words = ["replay", "--base", str(folder / base), "--journal", str(folder / "run.spsa"), "--out", str(folder / out)]
    assert main([*words, "--no-progress"]) == 0
    assert f"10 steps replayed to {folder / out}, digest {digests[-1]:016x}" in capsys.readouterr().out
    if out.endswith("safetensors"):
        from safetensors.torch import load_file

        state = load_file(folder / out)
    else:
        checkpoint = torch.load(folder / out, weights_only=True)
        assert checkpoint["global_step"] == 10
        assert checkpoint.get("hyper_parameters") == ({"a": 1} if base == "base.ckpt" else None)
        state = checkpoint["state_dict"]
    assert digest64([state[name] for name in tiny_model().state_dict()]) == digests[-1]


def test_verify_and_upto_through_the_package_command(run, capsys):
    folder, digests = run
    words = ["spsa", "verify", "--base", str(folder / "base.pt"), "--journal", str(folder / "run.spsa"), "--upto", "4"]
    assert command(words) == 0
    shown = capsys.readouterr()
    assert shown.out.strip() == f"4 steps, 4 digests equal, final digest {digests[3]:016x}"
    assert "replay" in shown.err  # the progress bar


def test_the_package_runs_as_a_module(run, capsys, monkeypatch):
    folder, _ = run
    monkeypatch.setattr(sys, "argv", ["spsa", "inspect", "--journal", str(folder / "run.spsa")])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("lightning_grad.spsa", run_name="__main__", alter_sys=False)
    assert end.value.code == 0
    assert "steps          10" in capsys.readouterr().out


def test_inspect_shows_the_run(run, capsys):
    folder, _ = run
    assert main(["inspect", "--journal", str(folder / "run.spsa")]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if len(line.split()) > 1)
    assert rows["steps"] == "10"
    assert rows["parameters"] == "37 in 4 tensors"
    assert rows["eps"] == "2**-10"
    assert rows["workers"] == "0"


def test_what_is_wrong_is_one_line_and_status_one(run, capsys):
    folder, _ = run
    journal = Journal.load(folder / "run.spsa")
    forged = Journal(journal.header)
    for number, record in enumerate(journal):
        codes = b"\x44" if number == 3 else record.codes
        forged.append(Record(codes, record.lr, record.roster, record.digest))
    forged.save(folder / "forged.spsa")
    words = ["verify", "--base", str(folder / "base.pt"), "--journal", str(folder / "forged.spsa"), "--no-progress"]
    assert main(words) == 1
    assert "after step 3 the journal has digest" in capsys.readouterr().err
    data = bytearray((folder / "run.spsa").read_bytes())
    data[journal.header_bytes + 40] ^= 4
    (folder / "bad.spsa").write_bytes(data)
    assert main(["inspect", "--journal", str(folder / "bad.spsa")]) == 1
    shown = capsys.readouterr()
    assert "steps          1" in shown.out
    assert "record 1 at byte offset" in shown.err
    torch.save({"a": 1}, folder / "x.ckpt")
    torch.save({"a": Path("y")}, folder / "unsafe.ckpt")
    others = {
        "base.safetensors": "neither a journal nor a checkpoint",
        "x.ckpt": "neither a journal",
        "unsafe.ckpt": "neither a journal",
        "no": "No such file",
    }
    for name, text in others.items():
        assert main(["inspect", "--journal", str(folder / name)]) == 1
        assert text in capsys.readouterr().err


def test_a_damaged_journal_in_a_checkpoint_is_reported_as_one_in_a_file(run, capsys):
    folder, _ = run
    journal = Journal.load(folder / "run.spsa")
    data = bytearray(journal.to_bytes())
    data[journal.header_bytes + 40] ^= 4
    state = {"journal": torch.frombuffer(data, dtype=torch.uint8)}
    torch.save({"optimizer_states": [{"spsa": state}]}, folder / "bad.ckpt")
    assert main(["inspect", "--journal", str(folder / "bad.ckpt")]) == 1
    shown = capsys.readouterr()
    assert "steps          1" in shown.out
    assert "the checkpoint's journal: record 1 at byte offset" in shown.err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.spsa", None),
        ("a.pt", b"hello"),
        ("a.safetensors", b"hello"),
        ("list.pt", [1, 2]),
        ("object.pt", Path("x")),
    ],
)
def test_a_base_without_weights_is_one_line(run, capsys, name, content):
    folder, _ = run
    if isinstance(content, bytes):
        (folder / name).write_bytes(content)
    elif content is not None:
        torch.save(content, folder / name)
    words = ["verify", "--base", str(folder / name), "--journal", str(folder / "run.spsa"), "--no-progress"]
    assert main(words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{name}: no weights can be read from it" in line
