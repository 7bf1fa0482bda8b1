"""Hooks of MkDocs that adapt the pages of the repository, which stay as they are.

- README, CONTRIBUTING and CHANGELOG become pages.
- Links between pages and files are those of the repository. One to a page stays a link, one to another file becomes
  the file's path. A target that does not exist is a warning, which ends a strict build.
- Lists are indented as CommonMark has it. Python-Markdown wants four columns a level, and a blank line before a list.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
#: Pages of the site that are files outside docs/, by their names there.
OUTSIDE = {"readme.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:)([^)#\s]*)(#[^)\s]*)?\)")
FENCE = re.compile(r" *(```|~~~)")
ITEM = re.compile(r"(?:[-*+]|\d+[.)]) +")

log = logging.getLogger("mkdocs.hooks.illada")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not in docs/."""
    for page, source in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the Markdown of a page as Python-Markdown wants it."""
    name = page.file.src_uri
    source = ROOT / OUTSIDE[name] if name in OUTSIDE else DOCS / name
    return indent_lists(relink(markdown, source, DOCS / name))


def relink(markdown: str, source: Path, page: Path) -> str:
    """Point the links of `source` to where their targets are for a page at `page`."""
    pages = {ROOT / outside: DOCS / name for name, outside in OUTSIDE.items()}

    def link(found: re.Match[str]) -> str:
        image, text, target, anchor = found[1], found[2], found[3], found[4] or ""
        if not target:
            return found[0]
        path = (source.parent / target).resolve()
        path = pages.get(path, path)
        if path not in pages.values() and not path.exists():
            log.warning(f"{source.relative_to(ROOT)}: {target} does not exist")
        if path in pages.values() or (path.is_relative_to(DOCS) and path.is_file()):
            return f"{image}[{text}]({Path(os.path.relpath(path, page.parent)).as_posix()}{anchor})"
        shown = path.relative_to(ROOT).as_posix() + ("/" if path.is_dir() else "")
        return f"`{shown}`" if text.strip("`/") in shown else f"{text} (`{shown}`)"

    parts = re.split(r"(```.*?```)", markdown, flags=re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in parts)


def indent_lists(markdown: str) -> str:
    """Indent what is inside list items by four columns a level, with a blank line before a list or table."""
    lines: list[str] = []
    columns: list[int] = []  # where the content of each open list item begins, in the source
    blanks: list[bool] = []  # whether each open item has had a blank line
    fence: str | None = None
    before = ""  # the line before; "" at the beginning of a block
    for line in markdown.splitlines():
        text = line.lstrip(" ")
        if not text:
            lines.append("")
            before, blanks = "", [True] * len(columns)
            continue
        column = len(line) - len(text)
        if fence is not None:
            item, begins = None, False
        else:
            closed = []
            while columns and column < columns[-1]:
                columns.pop()
                closed.append(blanks.pop())
            item = ITEM.match(text) if column - (columns[-1] if columns else 0) < 4 else None
            begins = (item is not None and (not closed or any(closed))) or (text[0] == "|" and before[:1] != "|")
        if begins and before:
            lines.append("")
        if item is not None:
            text = f"{item[0].rstrip()} {text[item.end() :]}"
        inside = max(column - (columns[-1] if columns else 0), 0)
        lines.append(" " * (4 * len(columns) + inside) + text)
        if item is not None:
            columns.append(column + item.end())
            blanks.append(False)
        if FENCE.match(line) and (fence is None or text.startswith(fence)):
            fence = text[:3] if fence is None else None
        before = text
    return "\n".join(lines) + "\n"
