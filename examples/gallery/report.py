"""The gallery's report: one HTML file, with the plots beside it."""

from __future__ import annotations

import html
import json
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import lightning
import markdown
import torch

import lightning_grad

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --bad: #c33; --good: #2a7; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .75rem .25rem 0; text-align: left; vertical-align: top; }
pre { background: var(--soft); padding: .75rem; overflow-x: auto; font-size: 13px; line-height: 1.35; }
img { max-width: 100%; background: white; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
.pair > div { background: var(--soft); padding: .5rem 1rem; }
.failed { color: var(--bad); font-weight: bold; } .passed { color: var(--good); }
.small { opacity: .75; font-size: 14px; }
@media (max-width: 40rem) { .pair { grid-template-columns: 1fr; } }
"""


@dataclass
class Outcome:
    """What became of one example."""

    entry: dict[str, Any]
    readme: str
    folder: Path
    status: str = "not run"
    #: name of a command (fit, compare) -> seconds it took
    seconds: dict[str, float] = field(default_factory=dict)
    #: when it was run; empty: by the gallery that writes the report
    earlier: str = ""

    @property
    def name(self) -> str:
        return str(self.entry["example"])

    @property
    def said(self) -> str:
        """Its status for a reader."""
        return f"{self.status} on {self.earlier}" if self.earlier else self.status

    def save(self, short: bool) -> None:
        """Keep the outcome beside the logs, for the report of a later gallery that runs other examples only."""
        kept = {"status": self.status, "seconds": self.seconds, "short": short, "day": f"{date.today()}"}
        (self.folder / "outcome.json").write_text(json.dumps(kept), encoding="utf-8")

    def load(self, short: bool) -> bool:
        """Take the outcome of an earlier gallery of the same kind, short or not; False if there is none."""
        try:
            kept = json.loads((self.folder / "outcome.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        if kept["short"] != short:
            return False
        self.status, self.seconds, self.earlier = kept["status"], kept["seconds"], kept["day"]
        return True

    def log(self, command: str) -> str:
        path = self.folder / f"{command}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def write_report(outcomes: Sequence[Outcome], target: Path, seconds: float, short: bool) -> None:
    """Write the report of what has been run so far; examples that were not run are named as such."""
    failed = [outcome.name for outcome in outcomes if outcome.status == "failed"]
    kept = sum(bool(outcome.earlier) for outcome in outcomes)
    earlier = f" {kept} examples were run by an earlier gallery, on the day that is said." if kept else ""
    machine = f"Python {platform.python_version()}, torch {torch.__version__}, lightning {lightning.__version__}"
    warning = (
        "<p class=failed>Short run: a few steps of each, to see that everything works. The numbers mean nothing.</p>"
    )
    body = [
        f"<h1>lightning-grad {lightning_grad.__version__}: gallery</h1>",
        f"<p>{len(outcomes) - kept} examples in {seconds / 60:.1f} minutes; {html.escape(machine)},"
        f" {platform.machine()}.{earlier} Every number below was printed by the run; what the papers claim and what we"
        " found is said beside it.</p>",
        warning if short else "",
        f"<p class=failed>Failed: {', '.join(failed)}.</p>" if failed else "",
        contents(outcomes),
        *map(section, outcomes),
    ]
    page = "\n".join(part for part in body if part)
    head = "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'><title>Gallery</title>"
    target.write_text(f"{head}<style>{STYLE}</style>\n{page}\n", encoding="utf-8")


def contents(outcomes: Sequence[Outcome]) -> str:
    rows = [
        f"<tr><td><a href='#{o.name}'>{title(o)}</a><td>{html.escape(o.entry['plugin'])}"
        f"<td class={o.status.replace(' ', '-')}>{o.said}<td>{sum(o.seconds.values()):.0f} s"
        for o in outcomes
    ]
    return "<table><tr><th>example<th>plugin<th>run<th>time" + "".join(rows) + "</table>"


def title(outcome: Outcome) -> str:
    heading = re.search(r"^# (.+)", outcome.readme, re.MULTILINE)
    return html.escape(heading[1] if heading else outcome.name)


def section(outcome: Outcome) -> str:
    entry, paper = outcome.entry, outcome.entry["paper"]
    times = ", ".join(f"{command} {seconds:.0f} s" for command, seconds in outcome.seconds.items())
    plot = outcome.folder / "compare.png"
    parts = [
        f"<h2 id='{outcome.name}'>{title(outcome)}</h2>",
        f"<p class=small>{html.escape(entry['plugin'])} · examples/{outcome.name} · <span"
        f" class={outcome.status.replace(' ', '-')}>{outcome.said}</span>{' · ' + times if times else ''}</p>",
        f"<div class=pair><div><b>The paper claims</b><p>{html.escape(entry['claim'])}<p class=small><a"
        f" href='{html.escape(paper['url'])}'>{html.escape(paper['title'])}</a></div>"
        f"<div><b>What we found</b><p>{html.escape(entry['here'])}</div></div>",
        printed(outcome.log("compare")) if outcome.status != "failed" else "",
        f"<img src='{outcome.name}/compare.png' alt='plot of {outcome.name}'>" if plot.exists() else "",
    ]
    for command in outcome.seconds:
        opened = " open" if outcome.status == "failed" and command == list(outcome.seconds)[-1] else ""
        log = "\n".join(outcome.log(command).splitlines()[-40:])
        parts.append(
            f"<details{opened}><summary>end of the log: {command}</summary><pre>{html.escape(log)}</pre></details>"
        )
    recorded = markdown.markdown(outcome.readme.partition("\n")[2], extensions=["tables", "fenced_code"])
    recorded = re.sub(r"<img [^>]*>", "", recorded)  # the plot of this run is above
    parts.append(
        f"<details><summary>README, with the numbers recorded when it was written</summary>{recorded}</details>"
    )
    return "\n".join(part for part in parts if part)


def printed(text: str) -> str:
    """Return what a comparison printed, its tables as tables."""
    text = re.sub(r"^drawn: .*\n?", "", text, flags=re.MULTILINE)  # the picture follows
    parts = []
    for block in re.split(r"((?:^\|.*\n?)+)", text, flags=re.MULTILINE):
        if block.startswith("|"):
            parts.append(markdown.markdown(block, extensions=["tables"]))
        elif block.strip():
            parts.append(f"<pre>{html.escape(block.strip())}</pre>")
    return "\n".join(parts)
