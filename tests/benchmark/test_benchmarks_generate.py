"""`python -m benchmarks generate`: what it runs where, what it promises, its models."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if importlib.util.find_spec("benchmarks") is None:
    sys.path.insert(0, str(ROOT))

from benchmarks import generate, published, report, runner  # noqa: E402

SMALL = {
    "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 96,
    "num_hidden_layers": 1, "vocab_size": 300,
}  # fmt: skip


def record(**changes):
    values = {"bench": "generate", "provider": "illada", "median_ms": 1000.0, "p20_ms": 1.0, "p80_ms": 1.0, "n": 7}
    return {**dict.fromkeys(runner.KEYS), **values, "device": "d", "timing": "clock", **changes}


@pytest.mark.parametrize("mode", ["var", "fixed"])
@pytest.mark.parametrize("batch", [1, 3])
def test_all_ways_find_the_same_tokens(mode, batch, monkeypatch):
    monkeypatch.setitem(generate.SIZES, "tiny", (8, 4, 2, 16))
    case = generate.make_case("tiny", batch, mode, **SMALL)
    assert case.name == f"tiny {mode} {batch} prompts" and case.bytes is None
    providers = {p.name: p for p in case.make()}
    assert list(providers) == ["illada", "illada prefix", "illada block", "one by one"] + ["padded"] * (mode == "fixed")
    for name, provider in providers.items():
        result = provider.call()
        assert provider.counts(result)["tokens"] == 8 * batch
        assert 0 <= provider.error(result) <= (1 if "illada " in name else 0)


def test_cases_of_a_gpu():
    names = [case.name for case in generate.cases(torch.device("cuda"))]
    assert names == ["8b var 1 prompts", "8b-batch var 8 prompts", "8b-batch var 32 prompts"]
    one = generate.cases(torch.device("cuda"))[0]
    assert one.bytes == 2 * 7_615_025_152 * 256  # bfloat16, 8 blocks of 32 steps


def test_goals():
    case = "tiny var 32 prompts"
    records = [
        record(case="copy", provider="copy", bytes=3e9, median_ms=1.0),
        record(case="8b var 1 prompts", provider="illada block", counts={"forwards": 150}, bytes=150 * 15e9),
        record(case="8b-batch var 32 prompts", error=0.5), record(case="8b-batch var 32 prompts", provider="one by one"),
        record(case=case, error=0.0), record(case=case, provider="one by one", median_ms=5000.0),
    ]  # fmt: skip
    assert [(goal.text, goal.met) for goal in generate.goals(records)] == [
        ("8b var 1 prompts: 150 forwards/s (goal 176), 75% of what the copy bandwidth allows", False),
        ("tiny var 32 prompts: 5.00x one by one (goal 4x), 0.00% of the tokens differ", True),
    ]
    assert not generate.goals([records[1] | {"provider": "illada prefix"}])
    assert generate.goals([records[1] | {"median_ms": 800.0}])[0].met


def test_table_of_jobs_beside_a_yardstick(capsys):
    job = {"counts": {"tokens": 64, "forwards": 32}, "error": 0.0}
    report.print_table([record(case="copy", provider="copy", bytes=3e9), record(case="8b var 1 prompts", **job)])
    lines = capsys.readouterr().out.splitlines()
    assert "tokens/s" in lines[1] and lines[-1].split()[-2:] == ["64.0", "32.0"]


def test_published_loop_takes_one_prompt_where_blocks_grow():
    with pytest.raises(ValueError, match="takes one prompt, got 2"):
        published.generate(
            generate.make_model("tiny", **SMALL), [[7], [8]], gen_length=4, block_length=4, steps=1, var=True
        )
