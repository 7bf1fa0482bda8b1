"""`make lint` finds products of sizes in 32 bits: what clang-tidy says, and how it is judged."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "cmake" / "tidy.py"
CHECKS = TOOL.parent.parent / ".clang-tidy"


@pytest.fixture
def tidy(monkeypatch):
    spec = importlib.util.spec_from_file_location("tidy", TOOL)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tidy", module)
    spec.loader.exec_module(module)
    return module


def test_products_are_found_and_held_against_the_reviewed_ones(tidy):
    text = (
        "/x/csrc/loss/a.cu:7:3: warning: a product of sizes in 32 bits [custom-size-product]\n"
        "    7 |   x = num_rows * width;\n      |       ^\n"
        f"csrc/loss/a.cu:9:3: warning: result of multiplication in type 'int' [{tidy.WIDENING}]\n    9 |   p[2 * i];\n"
        f"csrc/cpu/b.h:3:3: warning: performing an implicit widening [{tidy.WIDENING}]\n    3 |   int64_t y = a * b;\n"
    )
    found, errors = tidy.parse(text)
    assert not errors and [it.number for it in sorted(found, key=lambda it: it.number)] == [3, 7, 9]
    reviewed, files = {"loss/a.cu: x = num_rows * width;"}, {"loss/a.cu", "cpu/b.h"}
    (late,) = tidy.judge(found, reviewed, files)
    assert "csrc/cpu/b.h:3" in late and "widened" in late
    assert (
        "csrc/loss/a.cu:7: a product of sizes in 32 bits: x = num_rows * width;" in tidy.judge(found, set(), files)[1]
    )
    (_, stale) = tidy.judge(found, reviewed | {"loss/a.cu: gone", "loss/other.cu: unseen"}, files)
    assert stale.endswith("without such a product: loss/a.cu: gone")


def test_what_clang_does_not_understand_is_a_fault(tidy):
    assert tidy.parse("csrc/cpu/b.h:3:3: error: unknown type name 'x' [clang-diagnostic-error]\n")[1]


def test_every_review_says_what_bounds_it_and_names_a_line_that_is_there(tidy):
    for bound in tidy.tomllib.loads(tidy.REVIEWED.read_text())["bound"]:
        assert len(bound["because"]) > 20
        for file, lines in bound["lines"].items():
            code = {line.strip() for line in (TOOL.parent.parent / "csrc" / file).read_text().splitlines()}
            assert not set(lines) - code


@pytest.mark.skipif(
    not shutil.which("clang-tidy", path=Path(sys.executable).parent), reason="no clang-tidy beside this Python"
)
@pytest.mark.parametrize(
    "code,fault",
    [
        ("int f(int num_tokens, int num_heads) { return num_tokens * num_heads; }", "a product of sizes in 32 bits"),
        ("long f(int x, int y) { return x * y; }", "widened after"),
        ("long f(int num_tokens, int num_heads) { return long(num_tokens) * num_heads; }", None),
    ],
)
def test_sources(tidy, code, fault, tmp_path, monkeypatch, capsys):
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "cpu" / "x.cpp").write_text(code + "\n")
    shutil.copy(CHECKS, tmp_path)
    monkeypatch.setattr(tidy, "ROOT", tmp_path)
    monkeypatch.setattr(tidy, "read_reviewed", lambda: set())
    monkeypatch.setattr(tidy, "find_cuda", lambda: "not here")
    monkeypatch.setattr(sys, "argv", ["tidy.py"])
    assert tidy.main() == int(bool(fault))
    assert (fault or "1 sources, 0 faults") in capsys.readouterr().out
