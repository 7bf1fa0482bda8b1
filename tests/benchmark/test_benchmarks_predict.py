"""Predictions from what the timing model prints, and their comparison with measurements."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if importlib.util.find_spec("benchmarks") is None:
    sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import compare, predict, predict_cases, runner, stock_gemm, tune_jobs  # noqa: E402
from benchmarks.predict import Launch  # noqa: E402
from benchmarks.predict_cases import ESTIMATES, Case  # noqa: E402

REPLAY = """== void illada::loss::(anonymous namespace)::illada_linear_masked_cross_entropy_gather<illada::BFloat16
   grid (4096,1,1) block (128,1,1) cluster (1,1,1), 1040 B shared, 25 registers (ptxas sm_90a), 16 CTAs per SM
   predicted 29.64 us (46745 cycles at 1.75 GHz + 3.0 us launch), HBM 3421 GB/s, L2 3421 GB/s
   busy: tensor 0.0%, issue 25.4%, mufu/xu 0.0%, shared/L1 15.8%, L2 share 39.4%, HBM share 100.6%
== illada::loss::(anonymous namespace)::illada_linear_masked_cross_entropy_logits_sm90(CUtensorMap_st, 
   predicted 387.89 us (585031 cycles at 1.52 GHz + 3.0 us launch), 731 TFLOP/s, HBM 448 GB/s, L2 5892 GB/s
   busy: tensor 89.6%, issue 18.6%, mufu/xu 2.9%, shared/L1 0.9%, L2 share 68.8%, HBM share 11.6%
"""  # noqa: W291


def nothing():
    pass


def make_case(**more):
    return Case(**{"name": "c", "group": "g", "estimate": "gemm", "kernel": "k", "run": nothing, **more})


def test_what_the_model_prints():
    gather, logits = predict.parse(REPLAY)
    assert (gather.kernel, gather.us) == ("linear_masked_cross_entropy_gather", 29.64)
    assert (logits.kernel, logits.us, logits.busy["tensor"]) == (
        "linear_masked_cross_entropy_logits_sm90",
        387.89,
        89.6,
    )
    assert (
        predict.bound([gather]) == "memory, 100% busy" and predict.bound([gather, logits]) == "tensor cores, 90% busy"
    )
    assert predict.bound([Launch("x", 1.0, {"issue": 9.0})]) == "latency; the busiest pipe is issue, 9%"
    assert predict.parse("") == []
    with pytest.raises(ValueError, match="not what the timing model prints"):
        predict.parse("== something else\n   predicted nothing")


def test_small_jobs_are_scaled_beyond_their_launch():
    launches = [Launch("a_logits", 13.0, {}), Launch("b", 8.0, {}), Launch("a_logits", 50.0, {}), Launch("b", 4.0, {})]
    found = predict.counted(make_case(scale={"logits": 2.5}, once=("logits",)), launches)
    assert [(x.kernel, x.us) for x in found] == [("a_logits", 28.0), ("b", 8.0), ("b", 4.0)]


def test_the_busiest_slot_counts():
    slots = [[Launch("a", 5.0, {}), Launch("b", 9.0, {})], [Launch("a", 7.0, {}), Launch("b", 2.0, {})]]
    assert [x.us for x in predict.busiest(slots)] == [7.0, 9.0]


def test_an_entry_has_a_range_and_what_it_rests_on():
    expected, slow = [Launch("a", 103.0, {"tensor": 80.0}), Launch("b", 13.0, {})], [Launch("a", 203.0, {})]
    case = make_case(estimate="backward", flops=1e9, more_us=6.0, note="from a small one")
    found = predict.entry(case, expected, expected, [*slow, expected[1]], "h200")
    low, high = ESTIMATES["backward"].factors
    assert found["expected_us"] == 122.0 and found["expected_tflops"] == 8
    assert found["kernels"]["a"] == {"expected_us": 103.0, "range_us": pytest.approx([1 + low * 100, 4 + high * 200])}
    assert found["range_us"] == pytest.approx([2 + low * 110 + 3, 8 + high * 210 + 6], abs=0.1)
    assert found["rests_on"].startswith("8 to 12 bytes") and found["rests_on"].endswith("; from a small one")
    assert found["bound"] == "tensor cores, 80% busy" and found["machine"] == "h200" and "commit" in found


def test_some_cases_are_predicted_again_and_the_others_kept(monkeypatch, tmp_path, capsys):
    out = tmp_path / "p.json"
    old, mine = "fwd 1x8192 32/8 D128", "bwd 1x8192 32/8 D128"
    out.write_text(json.dumps({mine: {"expected_us": 1.0}, "gone": {"expected_us": 3.0}, old: {"expected_us": 2.0}}))
    (tmp_path / "cusim").touch()
    monkeypatch.setenv("CUSIM", str(tmp_path))

    def fake(case, cusim, machine):
        if "64x128" in case.name:
            raise RuntimeError("no traces")
        return predict.entry(case, *[[Launch("k", 50.0, {})]] * 3, machine)

    monkeypatch.setattr(predict, "predict", fake)
    assert predict.main(["--only", "backward", "--out", str(out)]) == 1
    found = json.loads(out.read_text())
    assert list(found)[:2] == [old, mine] and list(found)[-1] == "gone"
    assert found[old] == {"expected_us": 2.0} and found[mine]["expected_us"] == 50.0
    assert len(found) == 7 and "bwd 64x128 32/8 D128" not in found
    assert "bwd 64x128 32/8 D128: FAILED: no traces" in capsys.readouterr().out
    assert predict.main(["--list", "--only", "remask"]) == 0
    assert capsys.readouterr().out.startswith("remask: commit 32x32 quota")
    with pytest.raises(SystemExit):
        predict.main(["--only", "nothing like it"])
    monkeypatch.setattr(predict, "predict", lambda *_: pytest.fail("simulated"))
    for text, why in (("[1]", "is not what this command writes"), ("{", "Expecting property name")):
        out.write_text(text)
        with pytest.raises(SystemExit):
            predict.main(["--only", "backward", "--out", str(out)])
        assert f"--out {out}: " in (said := capsys.readouterr().err) and why in said and out.read_text() == text


def test_cases_have_the_names_of_what_is_measured():
    predicted = {case.name for case in predict_cases.cases()}
    tuned = {job.name for job in tune_jobs.jobs(tune_jobs.torch.device("cuda", 0))}
    assert tuned <= predicted and {case.estimate for case in predict_cases.cases()} <= set(ESTIMATES)


def test_the_predictions_of_this_repository():
    found = compare.read_predicted(str(compare.PREDICTED))
    cases = {case.name for case in predict_cases.cases()}
    assert set(found) <= cases and {about["group"] for about in found.values()} >= {
        "forward",
        "loss",
        "sample",
        "linear",
    }
    for name, about in found.items():
        low, high = about["range_us"]
        assert 0 < low < about["expected_us"] < high < 2 * low + 20, name
        assert about["rests_on"] and about["bound"] and about["kernels"] and about["commit"], name


# ---------------------------------------------------------------------------------------------------------- compare

PREDICTED = {
    "fwd": {
        "group": "forward", "expected_us": 100.0, "range_us": [90.0, 120.0], "rests_on": "guesses", "machine": "h200",
        "kernels": {"forward_sm90": {"expected_us": 100.0, "range_us": [90.0, 120.0]}},
    },
    "bwd": {
        "group": "backward", "expected_us": 300.0, "range_us": [250.0, 400.0], "rests_on": "8 to 12 bytes",
        "machine": "h200", "kernels": {"keys": {"expected_us": 200.0, "range_us": [180.0, 300.0]},
                                       "rows": {"expected_us": 100.0, "range_us": [70.0, 110.0]}},
    },
    "loss": {"group": "loss", "expected_us": 5.0, "range_us": [4.0, 6.0], "rests_on": "x", "machine": "h200"},
}  # fmt: skip


def record(case, ms, **more):
    values = {"case": case, "provider": "illada", "median_ms": ms, "timing": "events", "device": "H200", **more}
    return {**dict.fromkeys(runner.KEYS), **values}


MEASURED = [
    record("fwd", 0.110), record("fwd", 0.001, provider="peer"), record("fwd", 0.05, variants="tile=x"),
    record("bwd", 0.5, variants="default"), record("bwd", 0.45, provider="illada raw", variants="default"),
    record("bwd", None), record("other", 1.0),
    {"case": "bwd", "kernel": "keys", "us": 150.0, "launches": 1},
    {"case": "bwd", "kernel": "rows", "us": 100.0, "launches": 1},
    {"case": "bwd", "kernel": "unknown", "us": 1.0, "launches": 1},
]  # fmt: skip


def test_measured_against_predicted():
    lines, missing = compare.compare(MEASURED, PREDICTED)
    assert [(x.case, x.kernel, x.how, round(x.measured, 6), x.verdict) for x in lines] == [
        ("fwd", None, "events", 110.0, "ok"), ("bwd", None, "events", 500.0, "SLOWER"),
        ("bwd", None, "events, raw", 450.0, "SLOWER"), ("bwd", "keys", "kernels", 150.0, "FASTER"),
        ("bwd", "rows", "kernels", 100.0, "ok"),
    ]  # fmt: skip
    assert missing == ["loss"] and lines[1].ratio == pytest.approx(5 / 3)
    text = "\n".join(compare.summary(lines, PREDICTED))
    assert "forward: measured 1.10 times the predicted time on average, 1 of 1 within their range" in text
    assert "  - beyond it; rests on: 8 to 12 bytes" in text and "guesses" not in text


def test_compare_command(tmp_path, capsys):
    predicted, measured = tmp_path / "p.json", tmp_path / "m.jsonl"
    predicted.write_text(json.dumps(PREDICTED))
    measured.write_text("".join(json.dumps(line) + "\n" for line in MEASURED))
    options = ["compare", str(measured), "--predicted", str(predicted)]
    assert command.main(options) == 0
    out = capsys.readouterr().out
    assert "## Predicted (h200) against measured (H200)" in out and "- not measured: loss" in out
    assert "| bwd | keys | kernels | 200.0 | 180.0 to 300.0 | 150.0 | 0.75 | FASTER |" in out
    measured.write_text(json.dumps(record("other", 1.0)) + "\n")
    assert command.main(options) == 1 and "Nothing was both" in capsys.readouterr().out
    old = [{key: value for key, value in line.items() if key not in ("timing", "variants")} for line in MEASURED]
    measured.write_text("".join(json.dumps(line) + "\n" for line in [{}, *old]) + '{"case": "f')
    assert command.main(options) == 0
    assert f"skipped a damaged line: {measured}, line {len(old) + 2}: " in capsys.readouterr().err
    measured.write_text("not json\n")
    with pytest.raises(SystemExit):
        command.main(options)
    assert f"no line is a JSON object; {measured}, line 1: " in capsys.readouterr().err
    predicted.write_text("[1]")
    with pytest.raises(SystemExit):
        command.main(options)
    assert "is not what `make predict` writes" in capsys.readouterr().err
    predicted.write_text(json.dumps({"fwd": {"expected_us": 1.0, "group": "forward"}}))
    measured.write_text(json.dumps(MEASURED[0]))
    with pytest.raises(SystemExit):
        command.main(options)
    assert "'fwd' has no range_us, machine, rests_on; `make predict` writes it again" in capsys.readouterr().err


def test_a_recording_that_fails_names_its_case(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 3, stdout="x" * 5000, stderr="the end")
    monkeypatch.setattr(predict.subprocess, "run", lambda *_, **__: failed)
    case = predict_cases.cases()[0]
    with pytest.raises(RuntimeError) as error:
        predict.trace(case, 0, tmp_path, tmp_path)
    text = str(error.value)
    assert f"--inside '{case.name}': exit 3, 0 traces" in text and text.endswith("the end") and len(text) < 3000


@pytest.mark.parametrize("schedule", stock_gemm.SCHEDULES, ids=lambda schedule: schedule.name)
def test_stock_gemms_are_scaled_to_the_vocabulary(schedule, monkeypatch):
    """The busiest slot, of 606 tiles of ids where the sample has 33; a launch is not scaled."""
    times = {"0": 103.0, "33": 203.0, "65": 103.0}
    monkeypatch.setattr(predict, "record", lambda command, kernel, slot, folder, cusim: [str(slot)])
    monkeypatch.setattr(predict, "replay", lambda traces, *_: [Launch("stock_gemm", times[traces[0]], {})])
    found = stock_gemm.predict_us(schedule, Path("program"), Path(), "h200")
    assert found == pytest.approx(3 + 200 * 147 / 8)
