"""Results of the examples of README and docs, and the links; that all of them run: test_docs_commands.py."""

import contextlib
import re
import tomllib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import illada
from illada.config import ModelConfig
from illada.diffusion import make_batch
from illada.model import MaskedDiffusionModel
from illada.testing import relative_error

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_op_example_runs():
    names: dict = {}
    exec(BLOCKS[0], names)
    assert names["out"].shape == (8, 8, 64) and names["head"].grad is not None
    assert sorted(names["tokens"].tolist()).count(5) <= 1  # one of the two masks is gone


def test_trainer_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/embedding.md").read_text(encoding="utf-8"), flags=re.DOTALL
    )
    others = [block for block in blocks if not re.search(r"\bmodel\b", block)]
    assert len(blocks) == 13 and len(others) == 9
    names = {"torch": torch, "illada": illada}
    for block in others:  # in order: later ones use the tensors of those before
        exec(block, names)
    config = ModelConfig.preset("tiny", hidden_size=32, intermediate_size=48, num_attention_heads=4, vocab_size=300)
    windows = np.random.default_rng(0).integers(6, 300, (4, 12))
    batches = [
        make_batch(windows[i : i + 2], np.arange(i, i + 2), seed=1, mask_id=config.mask_token_id) for i in (0, 2)
    ]
    want = None
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for block in blocks:
            if block in others:
                continue
            if "fully_shard" in block and torch.__version__ < (2, 13):
                continue  # gloo did not average
            names = {"model": MaskedDiffusionModel(config), "batches": batches, "torch": torch, "illada": illada}
            names |= {"contextlib": contextlib, "dist": dist, "DistributedDataParallel": DistributedDataParallel}
            names |= {"fully_shard": fully_shard, "MixedPrecisionPolicy": MixedPrecisionPolicy}
            exec(block, names)
            grad = names["model"].embed_tokens.weight.grad
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            want = grad if want is None else want
            assert relative_error(grad, want) < 0.05  # some in bfloat16
    finally:
        dist.destroy_process_group()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them of a heading without links."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "index.md"} <= {page.name for page in pages}
    for page in pages:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
            to = page.parent / target if target else page
            assert to.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(to), f"{page.name}: {target}#{anchor}"


def test_the_index_names_every_page():
    linked = set(re.findall(r"\]\((\w[\w./-]*\.md)\)", (ROOT / "docs/index.md").read_text(encoding="utf-8")))
    site = (ROOT / "docs/site/mkdocs.yml").read_text(encoding="utf-8")
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")} - {"index.md"}
    assert pages == linked
    assert all(re.search(rf"^ +- {re.escape(page)}$", site, flags=re.MULTILINE) for page in pages)


def test_the_api_page_has_every_public_name():
    named = re.findall(r"^::: illada\.(.+)$", (ROOT / "docs/api.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(illada.__all__) - {"__version__"} <= set(named)
    assert len(named) == len(set(named))


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_the_citation_has_the_version_of_the_package():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_the_kernels_pages_name_files_that_exist():
    names = {path.name for folder in ("csrc", "python", "tests", ".ci") for path in (ROOT / folder).rglob("*.*")}
    for page in (ROOT / "docs/kernels").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        named = {name for name in re.findall(r"`(?:[\w./-]+/)?(\w+\.(?:cuh?|h|cpp|py))`", text)}
        assert named or page.name == "index.md", page.name
        assert not named - names, page.name
