"""The recipes of examples/embedding: they run, in one process and in two, and their glue is short.

Each compares its step, or its logits, with plain torch, and fails where they differ.
"""

import ast
import importlib.util
import os
import re
import runpy
import socket
import sys
import types
from pathlib import Path

import pytest
import torch
from two_processes import run_in_two

FOLDER = Path(__file__).resolve().parents[2] / "examples/embedding"
RECIPES = sorted(path.stem for path in FOLDER.glob("*_style.py"))
DISTRIBUTED = {"torchtitan_style": "torch", "accelerate_style": "accelerate", "lightning_style": "lightning"}
AGREES = "rank {} of 2: the step is that of one pass over all batches in plain torch"


def names_of_illada(tree: ast.Module) -> tuple[set[str], set[int]]:
    """The names that a recipe imports from this package, and the lines that do."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    ours = [
        (alias.asname or alias.name, node.lineno)
        for node in imports
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).partition(".")[0] == "illada"
    ]
    return {name for name, _ in ours}, {line for _, line in ours}


@pytest.mark.parametrize("name", RECIPES)
def test_glue_is_marked_and_five_lines_at_most(name):
    """Every line that imports or uses this package, and what was put beside it for that. All other lines were there."""
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    marked = {i for i, line in enumerate(text.splitlines(), 1) if re.search(r"# glue\b", line)}
    names, lines = names_of_illada(tree := ast.parse(text))
    if name != "flash_attn_style":  # there the name is flash-attn's own, which its callers know
        lines |= {node.lineno for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in names}
    assert names and lines <= marked and len(marked) <= 5
    code = {node.lineno for node in ast.walk(tree) if isinstance(node, ast.stmt)}
    assert marked <= code  # one statement a line


def test_what_is_not_marked_runs_without_illada():
    """Of the module that the recipes share: it is their trainer's own code."""
    assert not names_of_illada(ast.parse((FOLDER / "small.py").read_text(encoding="utf-8")))[0]


@pytest.mark.parametrize("name", ["flash_attn_style", "liger_style", "torchtitan_style"])
def test_recipes_run_in_one_process(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(FOLDER)
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    try:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    finally:
        sys.modules.pop("small", None)
    assert re.search("are those of|is that of", capsys.readouterr().out)


def test_the_recipe_of_torchtitan_gives_the_head_back(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    try:
        loss = runpy.run_path(str(FOLDER / "torchtitan_style.py"))["masked_diffusion_loss"]
    finally:
        sys.modules.pop("small", None)
    head = torch.nn.Linear(4, 7, bias=False)
    hidden, labels, owner = torch.randn(2, 3, 4), torch.randint(7, (2, 3)), types.SimpleNamespace(lm_head=head)
    loss(owner, hidden, labels, 6)[0].backward()
    assert head(hidden).shape == (2, 3, 7)
    with pytest.raises(ValueError, match="labels must have shape"):
        loss(owner, hidden, labels[:1], 6)
    assert head(hidden).shape == (2, 3, 7)


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def run_recipes(*names_and_ports: str) -> None:
    """Run recipe after recipe in one of two processes, each with its own port, as torchrun would start it."""
    sys.path.insert(0, str(FOLDER))
    for name, port in zip(names_and_ports[::2], names_and_ports[1::2], strict=True):
        os.environ["MASTER_PORT"] = port
        print(f"== {name}", flush=True)
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")


def runs_here(name: str) -> bool:
    if name == "torchtitan_style" and torch.__version__ < (2, 13):  # gloo's reduce-scatter for FSDP2
        return False
    return importlib.util.find_spec(DISTRIBUTED[name]) is not None


@pytest.fixture(scope="module")
def two_processes():
    """Return what each process printed: {recipe: text}."""
    names = [name for name in DISTRIBUTED if runs_here(name)]
    arguments = [word for pair in zip(names, map(str, free_ports(len(names))), strict=True) for word in pair]
    said = run_in_two(run_recipes, *arguments, timeout=240, TORCHELASTIC_RUN_ID="recipes")
    return [dict(re.findall(r"^== (\w+)\n(.*?)(?=^== |\Z)", text, flags=re.DOTALL | re.MULTILINE)) for text in said]


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTRIBUTED)
def test_recipes_run_in_two_processes(name, request):
    if not runs_here(name):
        pytest.skip(f"needs {DISTRIBUTED[name]}" if name != "torchtitan_style" else "FSDP2 on gloo needs torch 2.13")
    for rank, printed in enumerate(request.getfixturevalue("two_processes")):
        assert AGREES.format(rank) in printed[name]
