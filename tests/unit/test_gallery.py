"""The gallery: every example has its entry; a failure is reported and stops nothing."""

from __future__ import annotations

import importlib.util
import sys
from datetime import date
from pathlib import Path

import pytest
import yaml

pytest.importorskip("markdown")
EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDER = EXAMPLES / "gallery"
RUNNABLE = sorted({path.parent.name for name in ("config.yaml", "compare.py") for path in EXAMPLES.glob(f"*/{name}")})
ENTRIES = yaml.safe_load((FOLDER / "entries.yaml").read_text(encoding="utf-8"))


@pytest.fixture
def gallery(monkeypatch):
    spec = importlib.util.spec_from_file_location("gallery_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(module)
    return module


def test_every_example_has_an_entry():
    assert sorted(entry["example"] for entry in ENTRIES) == RUNNABLE
    for entry in ENTRIES:
        assert set(entry) == {"example", "plugin", "paper", "claim", "here", "seconds"}
        assert entry["paper"]["url"].startswith("https://arxiv.org/abs/")


@pytest.fixture
def examples(gallery, tmp_path, monkeypatch):
    """Three examples: one prints a table and draws, one fails, one is slow."""
    scripts = {
        "good": "print('| a | b |\\n|---|---|\\n| 1 | 2.5 |\\nsaid & done\\ndrawn: here')\n"
        "open('compare.png', 'wb').write(b'x')",
        "bad": "raise RuntimeError('lost <it>')",
        "other": "import os\nprint('threads', os.environ['OMP_NUM_THREADS'])",
    }
    for name, code in scripts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "compare.py").write_text(code)
        (tmp_path / name / "README.md").write_text(f"# Title of {name}\n\n| x | y |\n|---|---|\n| 3 | 4 |\n")
    rest = {
        "plugin": "a plugin",
        "paper": {"title": "T", "url": "https://arxiv.org/abs/1"},
        "claim": "C < D",
        "here": "E",
    }
    monkeypatch.setattr(gallery, "EXAMPLES", tmp_path)
    monkeypatch.setattr(
        gallery,
        "entries",
        lambda only: [
            {"example": name, "seconds": i, **rest} for i, name in enumerate(scripts) if name in (only or name)
        ],
    )
    return tmp_path


def test_a_failure_is_reported_and_stops_nothing(gallery, examples, capsys):
    assert gallery.main(["--jobs", "1", "--out", str(examples / "out")]) == 1
    said = capsys.readouterr().out
    assert "2 of 3 passed; not: bad" in said
    assert "other passed" in said
    page = (examples / "out" / "index.html").read_text(encoding="utf-8")
    assert "Failed: bad." in page
    assert "lost &lt;it&gt;" in page, "the end of the log of a failed example is shown"
    assert "<td>2.5</td>" in page
    assert "said &amp; done" in page
    assert "<td>4</td>" in page, "the README's own table"
    assert "C &lt; D" in page
    assert "<pre>said &amp; done</pre>" in page, "the plot itself says that it was drawn"
    assert page.count("<img") == 1
    assert "src='good/compare.png'" in page
    assert (examples / "out" / "other" / "compare.log").read_text().split() == ["threads", "1"]


def test_a_part_keeps_the_results_of_the_others(gallery, examples):
    out = examples / "out"
    report = ["--jobs", "1", "--out", str(out)]
    gallery.main([*report, "--only", "good"])
    (examples / "bad" / "compare.py").write_text("print('mended')")
    assert gallery.main([*report, "--only", "bad"]) == 0
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "<td>2.5</td>" in page
    assert "src='good/compare.png'" in page
    assert page.count(f"passed on {date.today()}") == 2, "in the contents and in the section"
    assert "mended" in page
    assert "Title of other" not in page, "never run"
    gallery.main([*report, "--only", "bad", "--short"])
    assert "Title of good" not in (out / "index.html").read_text(encoding="utf-8"), "full length beside a few steps"


def test_a_plot_of_an_earlier_run_is_not_shown(gallery, examples):
    folder = examples / "out" / "bad"
    folder.mkdir(parents=True)
    (folder / "compare.png").write_bytes(b"x")
    gallery.main(["--jobs", "1", "--out", str(examples / "out")])
    assert "bad/compare.png" not in (examples / "out" / "index.html").read_text(encoding="utf-8")


def test_only_names_that_exist(gallery):
    assert [entry["example"] for entry in gallery.entries("adamp,quickstart")] == ["quickstart", "adamp"]
    with pytest.raises(SystemExit, match=r"--only takes quickstart, .*; got adamq\."):
        gallery.main(["--only", "adamp,adamq"])
    with pytest.raises(SystemExit):
        gallery.main(["--jobs", "0"])
