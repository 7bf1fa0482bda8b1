"""Every command and every Python block of the README and of docs/ runs as it stands there.

A command is a line of a fenced block without a language, or an indented line that begins like one. They run page by page
in one folder, which holds what the pages take for granted: tiny checkpoints with random weights under the names used
there, a folder of text as ~/books, and configs/demo.toml with fewer steps.
"""

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import published_checkpoints
import pytest
import torch
import torch.distributed as dist

import illada
from illada import cli
from illada.checkpoints.weights import save_pretrained
from illada.cli import sampling
from illada.config import ModelConfig
from illada.model import MaskedDiffusionModel
from illada.text.training import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").rglob("*.md")),
]
PROGRAMS = r"(?:[A-Z_]+=\S+ +)*(?:illada|python|make|pip|cmake|bash) "
#: Commands that no test here runs, by what they begin with: why.
ELSEWHERE = {
    "make ": "targets of the Makefile: the gate runs them",
    "illada benchmark all ": "takes minutes; tests/benchmark/test_benchmarks_front.py runs it in less",
    "bash benchmarks/run_on_gpu.sh": "needs a GPU; tests/benchmark/test_benchmarks_gpu_run.py runs the script",
    "pip install .": "tests/builds/test_packaging.py installs the checkout",
    "pip install 'illada[eval]'": "the harness is one of the requirements for development",
    "pip install 'illada[completion]'": "argcomplete is one of the requirements for development",
    "pip install 'cuda-toolkit": "downloads a CUDA toolkit",
    "CUDACXX=": "needs an nvcc at that place; tests/builds/test_packaging.py and tests/builds/test_archs.py use these variables",
    "pip download": "needs a network; tests/builds/test_packaging.py installs from such a folder",
    "PIP_NO_INDEX=1": "tests/builds/test_packaging.py installs from such a folder",
    "cmake ": "tests/builds/test_packaging.py builds and installs the C++ library",
}


def commands(page: str) -> list[str]:
    """The shell commands of a page, in order, continued lines joined."""
    found, fence = [], None
    for line in (ROOT / page).read_text(encoding="utf-8").replace("\\\n", "").splitlines():
        if line.lstrip().startswith("```"):
            fence = line.strip()[3:] if fence is None else None
        elif line.strip() and (
            fence in ("", "sh", "bash") or (fence is None and re.match(rf" {{4,6}}{PROGRAMS}", line))
        ):
            found.append(line.strip())
    return found


def elsewhere(command: str) -> str | None:
    return next((start for start in ELSEWHERE if command.startswith(start)), None)


def save_model(folder: Path, tokenizer: Path, **changes) -> None:
    config = ModelConfig.preset(
        "tiny", hidden_size=32, intermediate_size=48, num_attention_heads=4, vocab_size=1024, initializer_range=0.3,
        **changes,
    )  # fmt: skip
    save_pretrained(MaskedDiffusionModel(config, seed=4), folder, tokenizer=tokenizer)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """The models are so small that threads only wait for each other."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    sources = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "python" / "illada").rglob("*.py"))]
    tokenizer = folder / "tokenizer.json"
    train_tokenizer(sources, 1024).save(str(tokenizer))
    save_model(folder / "runs/demo/checkpoints/step-003400", tokenizer)
    for name in ("iLLaDA-8B-Base", "iLLaDA-8B-Instruct"):
        save_model(folder / name, tokenizer)
    save_model(folder / "LLaDA-8B-Instruct", tokenizer, model_type="llada")
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    for name in ("iLLaDA-8B-Instruct", "LLaDA-8B-Instruct"):
        (folder / name / "chat_template.jinja").write_text(template)
    qwen2 = {**published_checkpoints.QWEN2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 151_936}
    published_checkpoints.write(folder / "Qwen2.5-7B", qwen2, published_checkpoints.weights(qwen2))
    shutil.copyfile(tokenizer, folder / "Qwen2.5-7B/tokenizer.json")
    books = folder / "books"
    books.mkdir()
    for i, source in enumerate(sources):
        (books / f"{i}.txt").write_text(source, encoding="utf-8")
    (folder / "prompts.txt").write_text("import os\ndef main(\n")
    (folder / "configs").mkdir()
    config = (ROOT / "configs/demo.toml").read_text()
    for key, value in {
        "steps": 20,
        "save_every": 10,
        "warmup_steps": 5,
        "every": 20,
        "windows": 4,
        "strata": 2,
    }.items():
        config, changed = re.subn(rf"^{key} = .*$", f"{key} = {value}", config, flags=re.MULTILINE)
        assert changed == 1, key
    (folder / "configs/demo.toml").write_text(config)
    programs = folder / "bin"
    programs.mkdir()
    for name, arguments in {"illada": "-m illada ", "python": ""}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n')
        (programs / name).chmod(0o755)
    return folder


@pytest.fixture
def place(original, tmp_path, monkeypatch) -> Path:
    """A folder in which the pages' commands and code make sense; the working directory."""
    monkeypatch.chdir(shutil.copytree(original, tmp_path / "docs"))
    return tmp_path / "docs"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(not elsewhere(c) for c in commands(page))])
def test_commands_run(page, place):
    env = {
        **os.environ, "HOME": str(place), "PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    for command in commands(page):
        if not elsewhere(command):
            done = subprocess.run(
                ["bash", "-c", command], env=env, input="Hello\n", capture_output=True, text=True, timeout=600
            )
            assert done.returncode == 0, f"{page}: {command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def test_every_command_has_a_place_where_it_runs():
    found = {elsewhere(command) for page in PAGES for command in commands(page)}
    assert set(ELSEWHERE) <= found, f"no page has these commands: {sorted(set(ELSEWHERE) - found)}"
    makefile = (ROOT / "Makefile").read_text()
    for target in {c.split()[1] for page in PAGES for c in commands(page) if c.startswith("make ")}:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_options_in_prose_exist(capsys):
    """`illada NAME --option` inside a sentence is too short to run; its names are known."""
    checked = 0
    for page in PAGES:
        for name, rest in re.findall(r"`illada ([a-z]+)([^`]*)`", (ROOT / page).read_text(encoding="utf-8")):
            with pytest.raises(SystemExit) as stopped:
                cli.main([name, "--help"])
            assert stopped.value.code == 0, f"{page}: illada {name}"
            usage = capsys.readouterr().out
            for option in re.findall(r"--[a-z][a-z-]*", rest):
                assert option in usage, f"{page}: illada {name} {option}"
                checked += 1
    assert checked > 5


def test_settings_of_published_evaluations():
    """The rows of the table are options, of any checkpoint that has the tokens they name."""
    text = (ROOT / "docs/generation.md").read_text(encoding="utf-8")
    table = text.split("| evaluation | options |\n|---|---|\n")[1].split("\n\n")[0].splitlines()
    model, settings, before = ModelConfig.preset("tiny", vocab_size=300, eot_token_id=4), [], list[str]()
    parser = argparse.ArgumentParser()
    for add in (sampling.add_model_options, sampling.add_prompt_options, sampling.add_sampling_options):
        add(parser)
    for row in table:
        words = " ".join(re.findall(r"`(--[^`]*)`", row)).split()
        if "the same with" in row:
            words = [*before[: before.index("--delay-tokens")], *words]
        options = parser.parse_args(["model", "--apply-chat-template", *words])
        settings.append(sampling.make_config(options, None, model))  # no tokenizer: none of them ends reasoning
        before = words
    assert len(settings) == len(table) == 4
    delayed = (model.eos_token_id, model.eot_token_id)
    assert [config.delay_tokens for config in settings] == [delayed, (), delayed, ()]
    assert settings[1] == dataclasses.replace(settings[0], delay_tokens=(), forbid_tokens=delayed[:1])
    assert [config.gen_length for config in settings] == [512, 512, 256, 256]
    assert all(config.mode == "fixed" and config.steps == config.gen_length for config in settings)
    assert settings[3].filtered and settings[3].schedule == "dream"


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/checkpoints.md", "docs/generation.md", "docs/scoring.md"])
def test_python_runs(page, place, request):
    if any("trust_remote_code" in block for block in python_blocks(page)):
        request.getfixturevalue("remote_code")
    names: dict = {}
    for block in python_blocks(page):
        exec(block, names)


def test_python_of_the_ops_runs():
    """Its blocks are calls, whose arguments the text around them describes."""
    generator = torch.Generator().manual_seed(1)
    tokens, heads, kv_heads, dim, width, vocab, rows = 8, 4, 2, 16, 32, 100, 3
    q, k, v = (torch.randn(tokens, h, dim, generator=generator) for h in (heads, kv_heads, kv_heads))
    masked_rows, ids = torch.tensor([1, 4, 6], dtype=torch.int32), torch.arange(tokens)
    head = torch.randn(vocab, width, generator=generator)
    names = {
        "illada": illada, "T": tokens, "H": heads, "G": kv_heads, "D": dim, "V": vocab, "N": rows, "q": q, "k": k, "v": v,
        "cu_seqlens": torch.tensor([0, 3, 8], dtype=torch.int32), "num_tokens": tokens, "start": 0, "step": 0, "seed": 1,
        "hidden": torch.randn(tokens, width, generator=generator), "head_weight": head, "head_shard": head,
        "logits": torch.randn(tokens, vocab, generator=generator, requires_grad=True), "rows": masked_rows,
        "targets": torch.randint(vocab, (tokens,), generator=generator), "request_seed": 1, "positions": ids[:rows],
        "token_weights": torch.zeros(tokens).index_fill(0, masked_rows.long(), 2.0), "masked_rows": masked_rows,
        "tokens": torch.full((tokens,), 5), "cu_rows": torch.tensor([0, 1, 3], dtype=torch.int32),
    }  # fmt: skip
    raw = {
        "logits": torch.randn(rows, vocab, generator=generator), "targets": ids[:rows], "weights": torch.ones(rows),
        "rows": torch.arange(rows, dtype=torch.int32), "nll": torch.empty(rows), "lse": torch.empty(rows),
        "out": illada.ops.op_types.TokenSample(torch.empty(rows, dtype=torch.int64), torch.empty(rows), torch.empty(rows)),
        "workspace": None,
    }  # fmt: skip
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        names["group"] = dist.group.WORLD
        for block in python_blocks("docs/ops.md"):
            exec(block, names | raw if "ops.raw" in block else names)
    finally:
        dist.destroy_process_group()
