"""Every code block a reader may copy works: Python runs, YAML is accepted by the command, commands name what exists.

A block is left out only by a line `<!-- not run: reason -->` right before it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
        *ROOT.glob("benchmarks/*.md"),
    ]
)
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+?) -->\n+)?"
    r"(?P<indent> *)```(?P<language>[\w-]*)[^\n]*\n(?P<code>.*?)^(?P=indent)```",
    re.DOTALL | re.MULTILINE,
)
CONFIG_KEYS = {
    "trainer",
    "model",
    "data",
    "optimizer",
    "optimizer_groups",
    "lr_scheduler",
    "no_decay",
    "seed_everything",
}


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    code: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        indent = match["indent"]
        code = "".join(line.removeprefix(indent) for line in match["code"].splitlines(keepends=True))
        line = text[: match.start("language")].count("\n") + 2
        found.append(Block(page, line, match["language"], code, match["reason"]))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def blocks(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages and not block.reason]


def test_the_search_finds_blocks_and_their_exceptions(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\na = 1\n```\n\n1. item\n\n    ```yaml\n    model: x\n    ```\n\n"
        "<!-- not run: needs a GPU -->\n```python\nb\n```\n"
    )
    assert [(b.line, b.language, b.code, b.reason) for b in blocks_of(page)] == [
        (2, "python", "a = 1\n", None),
        (8, "yaml", "model: x\n", None),
        (13, "python", "b\n", "needs a GPU"),
    ]
    fences = {page: len(re.findall(r"^ *```", page.read_text(encoding="utf-8"), re.MULTILINE)) for page in PAGES}
    assert {p: n for p, n in fences.items() if n != 2 * len(blocks_of(p))} == {}, "a fence is not closed"


@pytest.mark.parametrize("block", blocks("python", "py"), ids=str)
def test_python_runs(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile("\n" * (block.line - 1) + block.code, str(block.page), "exec"), {"__name__": "__main__"})


def is_config(block: Block) -> bool:
    content = yaml.safe_load(block.code)
    return isinstance(content, dict) and bool(CONFIG_KEYS & content.keys())


CONFIGS = [block for block in blocks("yaml", "yml") if is_config(block)]
HEADER = re.compile(r"# (?P<name>\w+\.yaml)(?:: lightning-grad fit (?P<words>-c [^\n(]+))?")
QUIET = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]


def is_whole(block: Block) -> bool:
    return {"model", "data"} <= yaml.safe_load(block.code).keys()


@pytest.mark.parametrize("block", [block for block in CONFIGS if is_whole(block)], ids=str)
def test_config_is_accepted(block, tmp_path, capsys):
    from lightning_grad.cli import main

    config = tmp_path / "config.yaml"
    config.write_text(block.code)
    with pytest.raises(SystemExit) as end:
        main(["fit", "-c", str(config), "--print_config"])
    out, err = capsys.readouterr()
    assert end.value.code == 0, err
    printed = yaml.safe_load(out)
    assert yaml.safe_load(block.code).keys() <= printed.keys()


@pytest.mark.parametrize("block", [block for block in CONFIGS if not is_whole(block)], ids=str)
def test_a_fragment_runs_by_the_command_in_its_first_line(block, tmp_path, monkeypatch):
    """The files it names are blocks of the same page, or `digits.yaml` of the first page, to which the page links."""
    from lightning_grad.cli import main

    monkeypatch.chdir(tmp_path)
    header = HEADER.match(block.code)
    assert header, "the first line must say how to run it: # NAME.yaml: lightning-grad fit -c digits.yaml -c NAME.yaml"
    assert header["words"]
    start = ROOT / "docs" / "index.md"
    # what is written later wins: this block, then the page's first of that name
    for other in [*(b for page in (start, block.page) for b in CONFIGS[::-1] if b.page == page), block]:
        if named := HEADER.match(other.code):
            Path(named["name"]).write_text(other.code)
    text = block.page.read_text(encoding="utf-8")
    if "digits.yaml" in header["words"] and "# digits.yaml\n" not in text:
        assert "index.md#or-configure-everything-in-yaml" in text
    words = header["words"].split()
    steps = "--trainer.max_steps=25"  # more than an epoch of digits
    assert main(["fit", *words, *QUIET, steps, "--trainer.limit_val_batches=1"]) == 0


@pytest.mark.parametrize("block", blocks("yaml", "yml"), ids=str)
def test_yaml_is_yaml(block):
    assert yaml.safe_load(block.code) is not None


@pytest.mark.parametrize("block", blocks("", "bash", "sh", "console"), ids=str)
def test_commands_name_what_exists(block):
    commands = re.findall(r"python3? run\.py (\w+)", block.code)
    assert set(commands) <= {"demo", "test", "bench", "docs", "gallery"}
    configs = re.findall(r"(?:-c|--config) (examples/\S+)", block.code)
    scripts = re.findall(r"python3? ((?:examples|benchmarks|docs)/\S+\.py)", block.code)
    tests = re.findall(r"\b(tests/\S+\.py)", block.code)
    missing = [path for path in [*configs, *scripts, *tests] if not (ROOT / path).exists()]
    modules = re.findall(r"python3? -m (benchmarks\.\S+|tests\.\S+)", block.code)
    missing += [module for module in modules if not (ROOT / (module.replace(".", "/") + ".py")).exists()]
    assert not missing


def test_the_site_is_searched_without_a_server_and_without_another_host():
    """The theme's `offline` would load a script from elsewhere unless one of its name is configured."""
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert {"search", "offline"} <= {plugin for plugin in config["plugins"] if isinstance(plugin, str)}
    (script,) = config["extra"]["polyfills"]
    assert script.endswith("iframe-worker.js")
    assert (ROOT / "docs" / script).exists()


LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)\s#]+)")


@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if p.parent != ROOT / "docs" and "docs" not in p.parts[-3:-1]],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_links_between_files_resolve(page):
    """The documentation build checks the pages under docs/; these are the others."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert not [link for link in LINK.findall(text) if not (page.parent / link).exists()]
