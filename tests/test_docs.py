"""What the README tells people to type."""

import re
from pathlib import Path

import pytest

from illada import cli
from illada.checkpoint import save_pretrained
from illada.config import ModelConfig
from illada.data import train_tokenizer
from illada.model import MaskedDiffusionModel

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_op_example_runs():
    names: dict = {}
    exec(BLOCKS[0], names)
    assert names["out"].shape == (8, 8, 64) and names["head"].grad is not None
    assert sorted(names["tokens"].tolist()).count(5) <= 1  # one of the two masks is gone


@pytest.mark.parametrize("page", ["README.md", "docs/generation.md"])
def test_model_example_runs(page, tmp_path, capsys):
    block = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)[-1]
    config = ModelConfig.preset("tiny", hidden_size=32, intermediate_size=48, num_attention_heads=4, vocab_size=300)
    train_tokenizer(["import os\ndef main():\n"] * 9, 300).save(str(tmp_path / "tokenizer.json"))
    save_pretrained(MaskedDiffusionModel(config), tmp_path / "m", tokenizer=tmp_path / "tokenizer.json")
    exec(re.sub(r'"runs/demo/[^"]*"', repr(str(tmp_path / "m")), block), {})
    assert capsys.readouterr().out


def test_commands_exist():
    for line in re.findall(r"^ {4,6}illada (\w+) .*$", README, flags=re.MULTILINE):
        with pytest.raises(SystemExit) as stopped:
            cli.main([line, "--help"])
        assert stopped.value.code == 0
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make ([\w-]+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
