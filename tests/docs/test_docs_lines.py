"""`make lint` finds lines of the documentation that are too long."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "cmake" / "docs_lines.py"


@pytest.fixture
def docs_lines():
    spec = importlib.util.spec_from_file_location("docs_lines", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_long_text_is_found_but_not_tables_code_and_targets_of_links(docs_lines):
    long = "word " * 25
    assert docs_lines.find_long_lines("x" * 100) == []
    assert docs_lines.find_long_lines(f"short\n{long}\n- {long}") == [2, 3]
    assert docs_lines.find_long_lines(f"| {long} |\n\n    {long}") == []
    assert docs_lines.find_long_lines(f"```\n{long}\n```\n{long}") == [4]
    assert docs_lines.find_long_lines(f"````\n```\n{long}\n````\n{long}") == [5]
    assert docs_lines.find_long_lines(f"- [text]({'x' * 120})\nhttps://{'x' * 120}") == []
    assert docs_lines.find_long_lines(f"[{long}](target)") == [1]


def test_the_documentation_is_wrapped():
    done = subprocess.run([sys.executable, TOOL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
