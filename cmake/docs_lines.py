#!/usr/bin/env python3
"""A check that lines of the documentation are at most 100 characters long.

Tables, code, and the targets of links cannot be wrapped, so they do not count. Nor do pages that a program writes.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 100
LINK_TARGET = re.compile(r"\]\([^)\s]*\)|https?://\S+")
GENERATED = {"docs/results.md"}  # by benchmarks/results_page.py


def find_long_lines(text: str) -> list[int]:
    """Return the numbers, from 1, of the lines of a Markdown text that should be wrapped."""
    found: list[int] = []
    fence = ""
    for number, line in enumerate(text.splitlines(), 1):
        marker = re.match(r"\s*(```+|~~~+)", line)
        if marker and (not fence or marker[1].startswith(fence)):
            fence = "" if fence else marker[1]
        elif not fence and not line.startswith(("|", "    ")) and len(LINK_TARGET.sub("", line)) > LIMIT:
            found.append(number)
    return found


def main() -> int:
    """Print each line that is too long; return 1 if there is one."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    wrong = 0
    for page in sorted(pages):
        name = page.relative_to(ROOT).as_posix()
        for number in [] if name in GENERATED else find_long_lines(page.read_text(encoding="utf-8")):
            print(f"{name}:{number}: wrap this line at {LIMIT} characters", file=sys.stderr)
            wrong += 1
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
