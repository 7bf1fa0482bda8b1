"""The pages as the site shows them: lists and tables of every page, and links. `make docs` builds the site itself."""

import importlib.util
import logging
import re
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="requirements-docs.txt is not installed")
markdown = pytest.importorskip("markdown")

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SPEC = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs/site/hooks.py")
assert SPEC and SPEC.loader
hooks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hooks)


def rendered(text: str) -> str:
    return markdown.markdown(hooks.indent_lists(text), extensions=["tables", "fenced_code"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_list_items_and_rows_of_tables_stay_what_they_are(page):
    text = page.read_text(encoding="utf-8")
    plain = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE)
    # Four columns are code, but not inside an item.
    items = len(re.findall(r"^ {0,3}(?:[-*+]|\d+[.)]) ", plain, flags=re.MULTILINE))
    html = rendered(text)
    assert html.count("<li>") == items
    assert html.count("<tr>") == len(re.findall(r"^ *\|(?! ?:?-)", plain, flags=re.MULTILINE))


def test_lists_are_indented_by_four_columns():
    text = "Text:\n- a\n  - b\n    more of b\n\n  A table:\n  | x |\n  |---|\n  | 1 |\n- c\n\n      code of c\n\n    code\n"
    html = rendered(text)
    assert html.count("<ul>") == 2 and html.count("<li>") == 3 and html.count("<tr>") == 2
    assert "code of c" in html[html.index("<pre>") : html.index("</ul>", html.index("<pre>"))]
    fenced = "- a\n\n  ```\n  - no item\n  ```\n"
    assert rendered(fenced).count("<li>") == 1


def test_links_lead_to_pages_or_name_files(caplog):
    docs = hooks.DOCS
    text = "[r](../README.md) [c](../CONTRIBUTING.md#layers) [o](ops.md) [x](../csrc) [demo.py](../examples/demo.py)"
    wanted = "[r](readme.md) [c](contributing.md#layers) [o](ops.md) x (`csrc/`) `examples/demo.py`"
    assert hooks.relink(text, docs / "index.md", docs / "index.md") == wanted
    source = ROOT / "CONTRIBUTING.md"
    assert hooks.relink("[o](docs/ops.md#errors)", source, docs / "contributing.md") == "[o](ops.md#errors)"
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        hooks.relink("[n](nowhere.md)", docs / "index.md", docs / "index.md")
    assert [r.getMessage() for r in caplog.records] == ["docs/index.md: nowhere.md does not exist"]
    untouched = "```\n[n](nowhere.md)\n```\n[w](https://example.org) [a](#here)"
    assert hooks.relink(untouched, docs / "index.md", docs / "index.md") == untouched
