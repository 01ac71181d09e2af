"""Hooks of the documentation build: pages made from the package and from other pages, formulas as MathML.

Browsers draw MathML by themselves, so no script has to be fetched or shipped.
"""

from __future__ import annotations

import html
import pkgutil
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "lightning_grad"
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def rooms() -> list[str]:
    """Public modules and sub-packages of the package, by name."""
    return sorted(m.name for m in pkgutil.iter_modules([str(PACKAGE)]) if not m.name.startswith("_"))


def public_names(room: str) -> list[str]:
    """Full names of what a reader may import from a room: its `__all__`, else what its public modules define."""
    full = f"lightning_grad.{room}"
    module = import_module(full)
    if hasattr(module, "__all__"):
        return sorted({home(module, name) for name in module.__all__})
    found = set()
    for part in [room, *(f"{room}.{m.name}" for m in pkgutil.iter_modules(getattr(module, "__path__", [])))]:
        if "._" in part:
            continue
        name_of_part = f"lightning_grad.{part}"
        found |= {
            f"{name_of_part}.{name}"
            for name, value in vars(import_module(name_of_part)).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == name_of_part
        }
    return sorted(found)


def home(module: ModuleType, name: str) -> str:
    """The full name under which a re-exported object was defined, if a reader may import it from there."""
    value = getattr(module, name)
    origin = str(getattr(value, "__module__", ""))
    public = origin.startswith("lightning_grad.") and "._" not in origin
    return f"{origin if public else module.__name__}.{name}"


def not_reproduced() -> str:
    """What every method's page says under the heading with "reproduce" in it, on one page."""
    lines = [
        "# What did not reproduce",
        "",
        "What papers claim and we did not find, and what was never run, as the page of each method says it. Nothing was"
        " run on a GPU: none was at hand.",
    ]
    for path in sorted((DOCS / "methods").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        title = re.search(r"^# (.+)", text, re.MULTILINE)
        section = re.search(r"^## [^\n]*reproduce[^\n]*\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
        if title and section and path.name != "index.md":
            # the links were written for a page in methods/
            body = re.sub(r"\]\((?!https?:|#)(?:\.\./)?([^)]+)\)", _moved, section[1])
            lines += ["", f"## [{title[1]}](methods/{path.name})", "", body.strip()]
    return "\n".join(lines) + "\n"


def _moved(link: re.Match[str]) -> str:
    return f"]({link[1]})" if link[0].startswith("](../") else f"](methods/{link[1]})"


def which_method() -> str:
    """The README's tables of methods, with the links of a page in methods/."""
    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## Every method\n(.*?)(?=^## )", readme, re.MULTILINE | re.DOTALL)
    section = re.sub(r"\[[^]]*\]\((examples/\w+)/README\.md\)", r"`\1`", section)  # examples are not on the site
    for source, page in (("docs/methods/", ""), ("docs/", "../"), ("benchmarks/RESULTS.md", "../benchmarks.md")):
        section = section.replace(f"]({source}", f"]({page}")
    return f"## Which method\n{section.rstrip()}\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add one reference page per room, the figures of the benchmarks, and what did not reproduce."""
    results = (PACKAGE.parent / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "benchmarks.md", content=results.replace("# Results", "# Benchmarks", 1)))
    files.append(File.generated(config, "what_did_not_reproduce.md", content=not_reproduced()))
    index = ["# Reference", "", "Generated from the docstrings.", ""]
    documented = {room: names for room in rooms() if (names := public_names(room))}
    for room, names in documented.items():
        summary = (import_module(f"lightning_grad.{room}").__doc__ or "").strip()
        lines = [f"# lightning_grad.{room}", "", summary, ""]
        for name in names:
            origin = name.split(".")[1]
            if origin != room and name in documented.get(origin, []):  # one description of an object, on one page
                lines += [f"- [`{name.rpartition('.')[2]}`][{name}] is described with `lightning_grad.{origin}`", ""]
            else:
                lines += [f"::: {name}", ""]
        short = ", ".join(f"`{name.rpartition('.')[2]}`" for name in names)
        index.append(f"- [lightning_grad.{room}]({room}.md): {short}")
        files.append(File.generated(config, f"reference/{room}.md", content="\n".join(lines)))
    files.append(File.generated(config, "reference/index.md", content="\n".join(index)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show on the first page of the methods what each is for."""
    if page.file.src_uri != "methods/index.md":
        return markdown
    before, heading, after = markdown.partition("## What all optimizers have in common")
    return f"{before}{which_method()}\n{heading}{after}"


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the formulas of a page into MathML."""

    def draw(match: re.Match[str]) -> str:
        display = "block" if match[2] == "[" else "inline"
        formula = html.unescape(match[3]).strip()
        return convert(formula.replace("{aligned}", "{split}"), display=display)  # the converter knows one of the two

    return FORMULA.sub(draw, content)
