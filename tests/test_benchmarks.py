"""The benchmarks on tiny inputs: the same code, the JSON that machines read, providers that agree."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if importlib.util.find_spec("benchmarks") is None:
    sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import remask, runner, train_step  # noqa: E402


def test_remask_records(tmp_path, monkeypatch):
    tiny = [remask.make_case(32, 501, t) for t in (0.0, 1.0)]
    monkeypatch.setattr(remask, "cases", lambda: tiny)
    out, plot = tmp_path / "o.jsonl", tmp_path / "o.png"
    options = ["--provider", "illada", "--provider", "published", "--json", str(out), "--plot", str(plot)]
    assert command.main(["remask", *options, "--repeats", "3"]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [list(line) for line in lines] == [list(runner.KEYS)] * 4
    assert {line["provider"] for line in lines} == {"illada", "published"}
    for line in lines:
        assert line["p20_ms"] <= line["median_ms"] <= line["p80_ms"] and line["bytes"] == 32 * 501 * 2
        assert line["peak_memory_bytes"] is None and line["error"] < (1e-5 if line["provider"] == "illada" else 0.02)
    assert plot.stat().st_size > 1000
    assert runner.ratio(lines, "32x501 T=0", "published") > 0
    assert runner.ratio(lines, "32x501 T=0", "compile") is None


def test_remask_providers_commit_the_same(generator):
    import torch

    case = remask.make_case(32, 501, 0.0, torch.float32)
    ours, published, _ = case.make()
    for a, b in zip(ours.call(), published.call(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_train_step_providers_agree():
    case = train_step.make_case("tiny 2x64")
    records = runner.run("train-step", [case], repeats=1)
    errors = {r["provider"]: r["error"] for r in records}
    assert errors["padded"] == 0 and errors["illada"] < 1e-5
    assert all(r["peak_memory_bytes"] >= 0 for r in records)
    assert [goal.text.split(":")[0] for goal in train_step.goals(records)] == ["tiny 2x64"] * 2


def test_a_peer_that_fails_is_left_out_and_ours_is_not(capsys):
    def fail():
        raise RuntimeError("no compiler\nand more")

    def records(*names):
        providers = [runner.Provider(name, fail if name.endswith("!") else lambda: 1) for name in names]
        return runner.run("b", [runner.Case("c", lambda: providers)], repeats=1)

    assert [r["provider"] for r in records("illada", "peer!", "other")] == ["illada", "other"]
    assert "c: peer! left out: RuntimeError: no compiler\n" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="no compiler"):
        runner.run("b", [runner.Case("c", lambda: [runner.Provider("illada", fail)])], repeats=1)


def test_check_fails_when_a_goal_is_missed(monkeypatch):
    monkeypatch.setattr(remask, "cases", lambda: [remask.make_case(8, 64, 0.0)])
    monkeypatch.setattr(remask, "goals", lambda records: [runner.Goal("impossible", False)])
    assert command.main(["remask", "--provider", "illada", "--repeats", "1", "--check"]) == 1
    assert command.main(["remask", "--provider", "illada", "--repeats", "1"]) == 0


def test_bad_usage(capsys):
    with pytest.raises(SystemExit):
        command.main(["remask", "--only", "nothing like it"])
    assert "no case of remask contains" in capsys.readouterr().err
