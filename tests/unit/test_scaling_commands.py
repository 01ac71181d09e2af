"""``lightning-grad advise`` and ``lightning-grad scaling fit``: tables, plots, mistakes in one line."""

from __future__ import annotations

import builtins
import re

import pytest
import yaml

from lightning_grad.cli import main
from tests.unit.test_scaling import SURFACES, grid, optimum


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, n, d, loss = grid(SURFACES["chinchilla"], 8.0, points=7, noise=1e-4)
    path = tmp_path / "runs.csv"
    rows = [f"{a!r},{b!r},{c!r}" for a, b, c in zip(n.tolist(), d.tolist(), loss.tolist(), strict=True)]
    path.write_text("N, tokens,val/loss\n" + "\n".join(rows) + "\n\n")
    return path


def one_line(capsys, *words):
    with pytest.raises(SystemExit) as end:
        main(list(words))
    out, err = capsys.readouterr()
    assert end.value.code == 2
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    return err


def test_advise(capsys):
    assert main(["advise", "--params", "1.2e9", "--tokens", "100e9", "--multiple-of", "64"]) == 0
    out = capsys.readouterr().out
    assert "1.433e-03" in out
    assert "1,107,715" in out
    text = out[out.index("# 512 sequences") :]
    assert "# Extrapolation: params 1.2e+09" in text, "it must go along when the fragment is pasted"
    assert "1.267e-03 instead of 1.433e-03; try both." in " ".join(text.replace("#", "").split())
    fragment = yaml.safe_load(text)
    assert fragment["optimizer"] == {"class_path": "AdamW", "init_args": {"lr": 1.433e-3}}
    assert fragment["trainer"]["max_steps"] == round(100e9 / (512 * 2048))
    assert fragment["lr_scheduler"]["init_args"]["eta_min"] == 1e-5
    assert main(["advise", "--params", "1e9", "--tokens", "2e10"]) == 0
    plain = capsys.readouterr().out
    assert "Extrapolation" not in plain
    assert main(["advise", "--params", "1B", "--tokens", "20000m"]) == 0
    assert capsys.readouterr().out == plain


def test_the_fragment_is_a_config(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["advise", "--params", "1e9", "--tokens", "2e10"])
    out = capsys.readouterr().out
    (tmp_path / "c.yaml").write_text(out[out.index("trainer:") :])
    model = ["--model=lightning_grad.demos.DigitsMLP", "--data=lightning_grad.demos.DigitsData"]
    with pytest.raises(SystemExit) as end:
        main(["fit", *model, "-c", "c.yaml", "--print_config"])
    assert end.value.code == 0


def test_fit_prints_a_table_and_draws(runs, capsys):
    assert main(["scaling", "fit", str(runs), "--bootstrap", "10", "--compute", "1e22", "1e18"]) == 0
    out = capsys.readouterr().out
    assert (runs.parent / "scaling_fit.png").stat().st_size > 5000
    values = dict(re.findall(r"^(\w+) +([\d.e+-]+) +[\d.e+-]+ +[\d.e+-]+$", out, re.MULTILINE))
    assert float(values["alpha"]) == pytest.approx(0.34, abs=0.005)
    n, d = map(float, re.search(r"1e\+22 +(\S+) +(\S+)", out).groups())
    assert (n, d) == pytest.approx(optimum(SURFACES["chinchilla"], 1e22), rel=0.05)
    assert "90 %: parameters" in out
    rows = [line.split(",") for line in runs.read_text().split("\n")[1:] if line]
    largest = max(6 * float(a) * float(b) for a, b, _ in rows)
    (beyond,) = re.findall(r"^ *(\S+) .*extrapolated: (\S+) times the largest run$", out, re.MULTILINE)
    assert beyond == ("1e+22", f"{1e22 / largest:.3g}")


@pytest.mark.parametrize("law", ["approach3", "parabola", "overtraining"])
def test_other_laws_on_the_same_table(runs, capsys, law):
    assert main(["scaling", "fit", str(runs), "--law", law, "--bootstrap", "2", "--plot", f"{law}.png"]) == 0
    out = capsys.readouterr().out
    assert (runs.parent / f"{law}.png").exists()
    assert ("bias of the method" in out) == (law == "parabola")
    if law == "parabola":
        assert "tokens -3.3" in out  # 7 points a budget; -2.9 with 15


def test_power_law_and_downstream(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "xy.csv"
    path.write_text("x,y\n" + "\n".join(f"{x},{0.1 + 5 * x**-0.3}" for x in (1e3, 1e4, 1e5, 1e6, 1e7)))
    assert main(["scaling", "fit", str(path), "--bootstrap", "0"]) == 0
    assert re.search(r"^b +0\.3$", capsys.readouterr().out, re.MULTILINE)
    path.write_text("loss,error\n" + "\n".join(f"{x},{0.9 - 2 * 2.0**-x}" for x in (2, 2.5, 3, 3.5, 4)))
    assert main(["scaling", "fit", str(path), "--law", "downstream", "--bootstrap", "0"]) == 0
    assert re.search(r"^gamma +0\.693147$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("params,tokens,loss\n1,2,3\n4,x,6\n", [], "line 3: column tokens must be a positive number, got 'x'"),
        ("params,tokens,loss\n1,2,3\n", [], "at least 6 rows, got 1"),
        ("params,tokens,loss\n1,2\n", [], "line 2: column loss"),
        (
            "params,loss\n1,2\n",
            [],
            "tokens missing. Known in the file: params, loss. A column may be called tokens or d or",
        ),
        ("params,N,loss\n1,2,3\n", [], "two columns mean params"),
        ("a,b\n1,2\n", [], "its first line has 'a', 'b'. Known: params or n or parameters"),
        ("params,tokens,loss\n1,2,3\n", ["--law", "cubic"], "invalid choice: 'cubic'"),
        ("params,tokens,loss\n1,2,3\n", ["--bootstrap", "-1"], "--bootstrap: must be an integer >= 0, got '-1'"),
        ("params,tokens,loss\n1,2,3\n", ["--seed", "x"], "--seed: must be an integer >= 0, got 'x'"),
        (f"params,tokens,loss\n1,2,{'3' * 200_000}\n", [], "line 2: not a CSV file (field larger"),
    ],
)
def test_a_bad_table_is_one_line(tmp_path, capsys, text, words, expected):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    assert expected in one_line(capsys, "scaling", "fit", str(path), "--no-plot", *words)


def test_a_plot_that_cannot_be_written_is_refused_before_the_fit(runs, capsys):
    pytest.importorskip("matplotlib")
    assert "no format .foo; choose one of" in one_line(capsys, "scaling", "fit", str(runs), "--plot", "x.foo")
    assert "there is no folder nowhere" in one_line(capsys, "scaling", "fit", str(runs), "--plot", "nowhere/a.png")


def test_rows_that_determine_no_optimum_say_so(tmp_path, capsys):
    path = tmp_path / "six.csv"
    rows = "1e6,1e8,4\n2e6,2e8,3.8\n4e6,3e8,3.5\n1e7,5e8,3.2\n2e7,1e9,3.0\n4e7,2e9,2.9\n"
    path.write_text("params,tokens,loss\n" + rows)
    assert main(["scaling", "fit", str(path), "--no-plot", "--bootstrap", "5"]) == 0
    out = capsys.readouterr().out
    assert out.count("no optimum: A or B is not positive") == 3
    assert "doubt: B is not positive" in out


def test_bad_words_are_one_line(capsys, tmp_path):
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x01")
    assert "not a text file" in one_line(capsys, "scaling", "fit", str(tmp_path / "binary.csv"))
    assert "No such file" in one_line(capsys, "scaling", "fit", str(tmp_path / "nowhere.csv"))
    assert "must be a positive number like 1.2e9 or 1.2B, got '-1'" in one_line(
        capsys, "advise", "--params=-1", "--tokens", "1"
    )
    assert "got '1.2Q'" in one_line(capsys, "advise", "--params=1.2Q", "--tokens", "1")
    assert "--tokens" in one_line(capsys, "advise", "--params", "1e9")
    assert "positive integer" in one_line(capsys, "advise", "--params=1", "--tokens=1", "--seq-len=1.5")
    assert "required: {fit}" in one_line(capsys, "scaling")


def test_without_matplotlib_there_is_the_table_and_a_note(runs, capsys, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["scaling", "fit", str(runs), "--bootstrap", "0"]) == 0
    out = capsys.readouterr().out
    assert "alpha" in out
    assert 'not drawn: the plot needs matplotlib: pip install "lightning-grad[demo]"' in out


def test_tokens_follow_from_compute(runs, capsys):
    """Columns as in the public Chinchilla data, and two that mean nothing here."""
    text = runs.read_text().splitlines()[1:]
    rows = [tuple(map(float, line.split(","))) for line in text if line]
    runs.write_text("x,y,Model Size,Training FLOP,loss\n" + "\n".join(f"7,8,{n},{6 * n * d},{v}" for n, d, v in rows))
    (runs.parent / "t.csv").write_text("tokens,compute,loss\n" + "\n".join(f"{d},{6 * n * d},{v}" for n, d, v in rows))
    for path in (runs.parent / "t.csv", runs):
        assert main(["scaling", "fit", str(path), "--no-plot", "--bootstrap", "0", "--law", "approach3"]) == 0
    assert "Huber's loss of the logarithms" in capsys.readouterr().out
    assert main(["scaling", "fit", str(runs), "--no-plot", "--bootstrap", "0"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("chinchilla:")
    assert float(re.search(r"^alpha +(\S+)$", out, re.MULTILINE)[1]) == pytest.approx(0.34, abs=0.005)
