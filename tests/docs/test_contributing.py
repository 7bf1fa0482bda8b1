"""Every file, name, target and section that CONTRIBUTING.md mentions exists."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
RECIPES = {
    title: body for title, body in re.findall(r"^### ([^\n]*)\n(.*?)(?=^##)", TEXT, flags=re.MULTILINE | re.DOTALL)
}
#: Made by a command, or the user's.
NOT_HERE = {".venv/bin/pre-commit"}


def rows(text: str) -> list[list[str]]:
    """The cells of a table's rows, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


def test_the_recipes_are_those_of_the_design():
    titles = ["A commit rule", "A head dim", "An architecture", "A checkpoint format", "A corpus source"]
    assert list(RECIPES) == titles


@pytest.mark.parametrize("title", RECIPES)
def test_places_of_a_recipe_exist(title):
    places = rows(RECIPES[title])
    assert len(places) >= 3
    for files, names, task in places:
        texts = [(ROOT / name).read_text(encoding="utf-8") for name in spans(files)]
        assert texts and task, files
        for name in spans(names):
            for file, text in zip(spans(files), texts, strict=True):
                assert re.search(rf"\b{re.escape(name)}\b", text), f"{file} has no {name}"


def test_paths_exist():
    layers = rows(TEXT.split("## Layers")[1].split("\n\n")[2])
    assert len(layers) >= 5
    inside = [name for _, modules, _ in layers for name in spans(modules)]
    assert not [name for name in inside if not (ROOT / "python/illada" / name).exists()]
    paths = [s for s in spans(TEXT) if re.fullmatch(r"[\w./-]+", s) and "/" in s and s not in inside]
    paths += re.findall(r"\b(?:tests|cmake|csrc|benchmarks)/[\w./]+\w", TEXT)
    assert len(paths) > 40
    assert not {path for path in paths if path not in NOT_HERE and not (ROOT / path).exists()}


def test_layers_are_those_of_the_contract():
    layers = rows(TEXT.split("## Layers")[1].split("\n\n")[2])
    shown = [{name.rstrip("/").removesuffix(".py") for name in spans(modules)} for _, modules, _ in layers]
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    contract = tools["importlinter"]["contracts"][0]["layers"]
    top, commands, *others = [set(re.findall(r"\w+", line)) for line in contract]
    assert shown == [top | commands, *others]
    own_line = [":" in line for line in contract]
    assert own_line == [False, False, True, *[False] * (len(own_line) - 4), True], "CONTRIBUTING.md says so in words"


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"\bmake ([a-z][a-z-]*)", TEXT))
    assert len(targets) > 8
    assert not [t for t in targets if not re.search(rf"^{t}:.* ## ", makefile, flags=re.MULTILINE)]
