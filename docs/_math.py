"""Docstrings speak reStructuredText for formulas and roles, as torch's do; the pages are Markdown."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from griffe import Extension, Object

BLOCK = re.compile(r"^( *)\.\. math::[ ]*(.*)\n((?:\1[ ]+.*\n|[ ]*\n)*)", re.MULTILINE)
INLINE = re.compile(r":math:`([^`]+)`")
ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`~?([^`<]+?)(?:\s*<[^`]*>)?`")


def to_markdown(text: str) -> str:
    """Write the formulas and roles of a docstring in Markdown."""

    def block(match: re.Match[str]) -> str:
        body = (match[2] + "\n" + textwrap.dedent(match[3])).strip()
        if "&" in body or r"\\" in body:
            body = r"\begin{split}" + "\n" + body + "\n" + r"\end{split}"
        return textwrap.indent(f"\n$$\n{body}\n$$\n\n", match[1])

    text = BLOCK.sub(block, text + "\n")
    text = INLINE.sub(r"$\1$", text)
    return ROLE.sub(r"`\1`", text).replace("``", "`")


class RestructuredText(Extension):
    """Rewrites every docstring of the package as it is loaded."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
