"""The command of the benchmarks: what it refuses, shapes of one's own, budgets, signals, an earlier run to compare with."""

import csv
import importlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if importlib.util.find_spec("benchmarks") is None:
    sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import budget, ceiling, registry, regression, report, runner, shapes  # noqa: E402

REAL = tuple(command.BENCHES)
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Stub:
    """A bench of calls that take next to no time; `made` and `called` say what ran."""

    def __init__(self):
        self.made: list[str] = []
        self.called: list[str] = []
        self.calls = {"illada": lambda: None, "peer": lambda: None}
        self.names = ["a", "b"]
        self.module = types.ModuleType("benchmarks.stub", "Nothing, done in two ways.")
        self.module.DEVICES = ("cpu", "cuda")
        self.module.providers = lambda device: list(self.calls)
        self.module.cases = lambda device: [self.case(name) for name in self.names]
        self.module.quick = self.module.cases
        self.module.goals = lambda records: []

    def case(self, name):
        def make():
            self.made.append(name)
            return [runner.Provider(p, lambda p=p: (self.called.append(p), self.calls[p]())) for p in self.calls]

        return runner.Case(name, make, repeats=3)


@pytest.fixture
def stub(monkeypatch):
    found = Stub()
    monkeypatch.setitem(sys.modules, "benchmarks.stub", found.module)
    monkeypatch.setattr(runner, "commit", lambda: "abc")
    monkeypatch.setattr(runner.gc, "collect", lambda: 0)
    for module in (command, registry):  # the command, and the reports
        monkeypatch.setattr(module, "BENCHES", {"stub": ".stub", "loss": ".loss"})
    return found


def run(*arguments, bench="stub"):
    return command.main([bench, "--device", "cpu", *map(str, arguments)])


def refused(capsys, *arguments, bench="stub"):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments, bench=bench)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def record(case, ms, provider="illada", **changes):
    values = {"bench": "stub", "case": case, "provider": provider, "median_ms": ms, "timing": "clock", "n": 7}
    spread = {"p20_ms": ms, "p80_ms": ms} if ms else {}
    return {**dict.fromkeys(runner.KEYS), **values, **spread, "torch": "2", "device": "d", **changes}


# ---------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(("arguments", "why"), [
    (["--repeats", "0"], "--repeats must be at least 1, got 0"),
    (["--time-budget", "0"], "--time-budget must be a positive number of seconds, got 0"),
    (["--time-budget", "nan"], "--time-budget must be a positive number of seconds, got nan"),
    (["--provider", "illada", "--provider", "pear"], "stub has no provider 'pear' on cpu; it has 'illada', 'peer'"),
    (["--json", "{tmp}/no/o.jsonl"], "--json {tmp}/no/o.jsonl: No such file or directory"),
    (["--csv", "{tmp}"], "--csv {tmp}: Is a directory"),
    (["--json", "{tmp}/o.jsonl", "--plot", "{tmp}/o.txt"], "--plot {tmp}/o.txt: no picture ends in 'txt'; "),
    (["--compare", "{tmp}/none.jsonl"], "none.jsonl"),
    (["--compare", "{tmp}/empty.jsonl"], "empty.jsonl: there are no results in it"),
    (["--vocab", "8"], "stub has no --vocab; it takes no shapes of one's own"),
    (["--quick", "--vocab", "8"], "--quick and --vocab: the shapes of one are not those of the other"),
])  # fmt: skip
def test_refused_before_anything_runs(stub, tmp_path, capsys, arguments, why):
    (tmp_path / "empty.jsonl").touch()
    assert why.format(tmp=tmp_path) in refused(capsys, *(a.format(tmp=tmp_path) for a in arguments))
    assert stub.made == [] and [p.name for p in tmp_path.iterdir()] == ["empty.jsonl"]


def test_what_is_there_is_not_touched_by_a_refusal(stub, tmp_path, capsys):
    (tmp_path / "o.jsonl").write_text("{}\n")
    refused(capsys, "--json", tmp_path / "o.jsonl", "--csv", tmp_path / "no" / "o.csv")
    assert (tmp_path / "o.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize("bench", command.BENCHES)
def test_every_bench_refuses_what_it_does_not_have(bench, capsys):
    values = {"seqlens": "2x8", "heads": "2/1", "head_dim": "8", "vocab": "64", "rows": "4", "hidden": "8"}
    module = importlib.import_module(command.BENCHES[bench], "benchmarks")
    lacking = [name for name in values if name not in getattr(module, "OWN", ())]
    assert lacking
    for name in lacking:
        said = refused(capsys, shapes.option(name), values[name], "--list", bench=bench)
        assert f"{bench} has no {shapes.option(name)}; it takes " in said
    assert "--vocab: of one bench; all takes none of them" in refused(capsys, "--vocab", 64, bench="all")


@pytest.mark.parametrize(
    "text", ["", "8x", "x8", "0x8", "8x-1", "a", "1,,2", "0", "0,0", "2x3x4", "1.5", "99999999999x1"]
)
def test_lengths_that_are_none(text, capsys):
    assert "argument --seqlens: got" in refused(capsys, f"--seqlens={text}", bench="attention")


@pytest.mark.parametrize("text", ["", "3/2", "0", "4/0", "a/b", "4/", "-4/2"])
def test_heads_that_are_none(text, capsys):
    assert "argument --heads: got" in refused(capsys, f"--heads={text}", bench="attention")


def test_dimensions_that_are_none(capsys):
    assert "argument --rows: got '0'; a whole number from 1 on" in refused(capsys, "--rows", 0, bench="loss")


# ----------------------------------------------------------------------------------------------------- shapes of one's own


@pytest.mark.parametrize(("bench", "options", "names"), [
    ("attention", "--seqlens 8x1024 --heads 32/8 --head-dim 128", ["fwd 8x1024 32/8 D128"]),
    ("attention", "--seqlens 100,7,0,33 --direction bwd", ["bwd 100+7+0+33 8/2 D64", "bwd 100+7+0+33 8/8 D64"]),
    ("attention", "--seqlens 2x30,8x4 --heads 4 --dtype bfloat16", ["fwd 10 of 4 to 30, 92 tokens 4/4 D64 bfloat16"]),
    ("loss", "--rows 64 --vocab 500", ["fwdbwd 64 t=1 256x500"]),
    ("loss", "--rows 64 --hidden 32 --vocab 500 --direction fwd --spread 4", ["fwd 64 t=1 32x500 spread=4"]),
    ("loss", "--vocab 500 --only t=0.1", ["fwdbwd 512 t=0.1 256x500"]),
    ("remask", "--rows 16 --vocab 500 --dtype float32", ["16x500 T=0 float32", "16x500 T=1 float32"]),
    ("remask", "--rows 16 --vocab 500 --hidden 32 --only T=1", ["linear 16x32x500 T=1"]),
    ("generate", "--seqlens 3,9 --vocab 400", ["tiny V400 var 3+9 prompts"]),
    ("train-step", "--seqlens 40,24 --hidden 64 --heads 4/2 --vocab 500", ["own 40+24 C64 V500 4/2 D16"]),
])  # fmt: skip
def test_own_shapes(bench, options, names, capsys):
    options = command.parser("x").parse_args([bench, "--device", "cpu", *options.split()])
    assert [case.name for plan in command.plans(options) for case in plan.cases] == names


@pytest.mark.parametrize("options", [
    ["attention", "--seqlens", "3,5", "--heads", "4/2", "--head-dim", "16", "--dtype", "bfloat16"],
    ["generate", "--seqlens", "3,5", "--vocab", "300", "--provider", "illada"],
    ["train-step", "--seqlens", "9,7", "--hidden", "64", "--heads", "4/2", "--vocab", "300"],
], ids=lambda options: options[0])  # fmt: skip
def test_own_shapes_run(options, tmp_path, monkeypatch):
    bench, *more = options
    monkeypatch.setattr(ceiling, "cases", lambda cases, device: [])
    assert run(*more, "--repeats", 1, "--json", tmp_path / "o.jsonl", bench=bench) == 0
    lines = report.read_json(tmp_path / "o.jsonl")
    assert lines and all(r["median_ms"] > 0 and r["bench"] == bench for r in lines)
    there = {r["provider"] for r in lines}
    assert there and there <= set(importlib.import_module(command.BENCHES[bench], "benchmarks").providers(CPU))
    assert all(r["error"] is None or r["error"] < 0.02 for r in lines)


def test_prompts_of_no_token(capsys):
    assert "prompts here, of at least one token" in refused(capsys, "--seqlens", "3,0", bench="generate")


@pytest.mark.parametrize("bench", ["generate", "train-step"])
def test_vocabularies_without_the_special_tokens(bench, capsys):
    assert f"{bench} needs a --vocab of at least 7, got 6" in refused(capsys, "--vocab", 6, "--list", bench=bench)


@pytest.mark.parametrize("device", [CPU, GPU])
def test_quick_is_a_part_of_each_bench(device):
    for name, module in command.BENCHES.items():
        bench = importlib.import_module(module, "benchmarks")
        cases = bench.quick(device)
        assert 1 <= len(cases) <= 5 and len({case.name for case in cases}) == len(cases), name


# ------------------------------------------------------------------------------------------------------------- output


def test_list_says_what_cases_and_providers_are(stub, capsys):
    assert run("--list", "--only", "b") == 0
    out = capsys.readouterr().out
    assert "A case is one job on one input" in out and "A provider is one way to do it" in out
    assert "Nothing, done in two ways." in out and stub.made == []
    assert out.endswith("providers of stub on cpu:\n  illada\n  peer\n\ncases of stub on cpu:\n  b\n\n")


def test_a_reader_of_the_list_that_is_gone_is_no_wrong_argument(stub, monkeypatch):
    """`illada benchmark all --list | head -1`: the command line ends with 141 and says nothing."""

    def gone(found):
        raise BrokenPipeError

    monkeypatch.setattr(command, "show_list", gone)
    with pytest.raises(BrokenPipeError):
        run("--list")


def test_rows_come_as_they_are_measured(stub, capsys):
    case, seen = stub.case, []

    def looks(name):
        found = case(name)
        make = found.make
        found.make = lambda: (seen.append(capsys.readouterr().out), make())[1]
        return found

    stub.case = looks
    stub.calls["peer"] = lambda: time.sleep(2e-3)
    assert run() == 0
    assert "a:" not in seen[0]
    first = seen[1].splitlines()
    assert first[0].startswith("a: illada ") and " ms (" in first[0]
    assert first[1].startswith("a: peer ") and first[1].partition("  [")[0].endswith(" of ours")


def test_a_row_says_that_it_varies_and_that_it_is_of_one_call():
    mine = record("c", 10.0, p20_ms=8.0, p80_ms=12.0)
    once = record("c", 20.0, "peer", n=1)
    assert command.row(mine, [mine, once]) == "c: illada 10 ms (8 to 12)  [varies 40%]"
    assert command.row(once, [mine, once]) == "c: peer 20 ms, 2.00 of ours  [timed once]"


def test_csv_has_a_column_for_each_key(stub, tmp_path):
    assert run("--csv", tmp_path / "o.csv", "--only", "a") == 0
    with (tmp_path / "o.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["case"], r["provider"], r["n"]) for r in rows] == [("a", "illada", "3"), ("a", "peer", "3")]
    assert list(rows[0]) == list(runner.KEYS) and float(rows[0]["median_ms"]) > 0


def test_the_page_names_every_key():
    table = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").partition("| key |")[2].partition("\n\n")[0]
    keys = [key for row in table.splitlines()[2:] for key in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(keys) == sorted(runner.KEYS)


def test_all_runs_every_bench(stub, tmp_path, capsys, monkeypatch):
    other = Stub()
    monkeypatch.setitem(sys.modules, "benchmarks.other", other.module)
    monkeypatch.setitem(command.BENCHES, "loss", ".other")
    options = ["--json", tmp_path / "o.jsonl", "--plot", tmp_path / "o.png", "--provider", "peer", "--only", "b"]
    assert run(*options, bench="all") == 0
    lines = report.read_json(tmp_path / "o.jsonl")
    assert [(r["bench"], r["case"], r["provider"]) for r in lines] == [("stub", "b", "peer"), ("loss", "b", "peer")]
    assert (tmp_path / "o.png").stat().st_size > 1000
    assert "\nstub:\n" in (out := capsys.readouterr().out) and "\nloss:\n" in out


# ------------------------------------------------------------------------------------------------- signals and budgets


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_a_signal_leaves(stub, tmp_path, capsys, number, status):
    """It comes in the second turn of the second case."""

    def at_last():
        if stub.made == ["a", "b"] and stub.called[-12:].count("peer") and stub.called.count("peer") == 6:
            os.kill(os.getpid(), number)

    stub.calls["peer"] = at_last
    stub.names = ["a", "b", "c"]
    assert run("--json", tmp_path / "o.jsonl", "--plot", tmp_path / "o.png") == status
    lines = report.read_json(tmp_path / "o.jsonl")
    assert stub.made == ["a", "b"]
    assert [(r["case"], r["provider"]) for r in lines] == [
        ("a", "illada"),
        ("a", "peer"),
        ("b", "illada"),
        ("b", "peer"),
    ]
    assert [r["n"] for r in lines[:3]] == [3, 3, 1] and (tmp_path / "o.png").stat().st_size > 1000
    table = capsys.readouterr().out.partition("\ncase ")[2]
    assert "\na " in table and "\nb " in table


def test_a_budget_is_shared_and_what_did_not_fit_is_said(stub, capsys, tmp_path):
    stub.names = ["a", "b", "c"]
    stub.calls = {"illada": lambda: time.sleep(0.01), "peer": lambda: time.sleep(0.01), "slow": lambda: time.sleep(60)}
    began = time.monotonic()
    assert run("--time-budget", 3, "--repeats", 1000, "--json", tmp_path / "o.jsonl") == 0
    assert time.monotonic() - began < 3
    lines = {(r["case"], r["provider"]): r for r in report.read_json(tmp_path / "o.jsonl")}
    assert [lines["c", p]["error"] for p in ("slow",)] == [runner.NO_TIME]
    out, err = capsys.readouterr()
    assert "Did not fit into --time-budget 3:\n- stub a: " in out and f"slow left out: {runner.NO_TIME}" in err
    assert stub.made == ["a", "b", "c"]


def test_within_a_budget_fast_calls_are_all_made(stub, tmp_path):
    assert run("--time-budget", 60, "--json", tmp_path / "o.jsonl") == 0
    assert [r["n"] for r in report.read_json(tmp_path / "o.jsonl")] == [3] * 4
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_turns_end_before_a_budget_does():
    calls = [runner.Provider("illada", lambda: time.sleep(0.02)), runner.Provider("peer", lambda: time.sleep(0.02))]
    records = runner.run("b", [runner.Case("c", lambda: calls, repeats=1000)], budget=runner.Budget(0.5, 1))
    assert [r["provider"] for r in records] == ["illada", "peer"] and records[0]["n"] == records[1]["n"] < 20


def test_a_peer_that_takes_too_long_leaves_time_for_the_others():
    calls = {"illada": lambda: None, "endless": lambda: time.sleep(60), "late": lambda: None}
    kept, case = [], runner.Case("c", lambda: [runner.Provider(*p) for p in calls.items()], repeats=2)
    runner.run("b", [case], budget=runner.Budget(0.5, 1), after_case=kept.extend)
    assert [(r["provider"], r["n"], r["error"]) for r in kept] == [
        ("illada", 2, None), ("endless", None, runner.NO_TIME), ("late", None, runner.NO_TIME),
    ]  # fmt: skip


def test_no_alarm_outlives_a_case(monkeypatch):
    """Also where it rings as the case begins or ends, or where nothing is left."""
    monkeypatch.setattr(budget, "REPEAT", 0.05)
    for seconds in (1e-6, 1e-4, 0.0, -1.0):
        share = budget.Budget(seconds, 1)
        runner.run("b", [runner.Case("c", lambda: [runner.Provider("illada", int)], repeats=3)], budget=share)
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    time.sleep(0.1)


def test_an_import_is_not_cut_short(tmp_path, monkeypatch):
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(0.6)\nwhole = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    kept, done = [], []

    def call():
        done.append(importlib.import_module("slow_to_import").whole)
        time.sleep(60)

    case = runner.Case("c", lambda: [runner.Provider("illada", call)])
    runner.run("b", [case], budget=runner.Budget(0.3, 1), after_case=kept.extend)
    assert done == [True] and [r["error"] for r in kept] == [runner.NO_TIME]


@pytest.mark.parametrize("option", ["--json", "--csv"])
def test_a_full_disk_is_no_regression(option, stub, capsys):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    assert run(option, "/dev/full") == 2
    assert "error: the results could not be written: [Errno 28]" in capsys.readouterr().err


@pytest.mark.slow
def test_a_reader_that_is_gone():
    reader, writer = os.pipe()
    os.close(reader)
    call = [sys.executable, "-m", "benchmarks", "score", "--list"]
    ended = subprocess.run(call, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert ended.returncode == 141 and "Traceback" not in ended.stderr


def test_inputs_beyond_memory_leave_the_case_out(stub, tmp_path, capsys):
    stub.module.cases = lambda device: [
        runner.Case("huge", lambda: torch.empty(2**62, dtype=torch.int8)),
        stub.case("a"),
    ]
    assert run("--json", tmp_path / "o.jsonl") == 0
    out = {r["case"]: r["error"] for r in report.read_json(tmp_path / "o.jsonl")}
    assert "can't allocate memory" in out["huge"] and out["a"] is None


def test_a_run_that_measured_nothing_has_a_status(stub, capsys):
    stub.module.cases = lambda device: [runner.Case("huge", lambda: torch.empty(2**62, dtype=torch.int8))]
    assert run() == 2 and "nothing was measured" in capsys.readouterr().err


def test_inputs_that_take_too_long_leave_the_whole_case_out(monkeypatch):
    monkeypatch.setattr(runner.gc, "collect", lambda: 0)
    kept = []
    cases = [runner.Case("c", lambda: time.sleep(60)), runner.Case("d", lambda: [runner.Provider("illada", int)])]
    runner.run("b", cases, budget=runner.Budget(1.0, 2), after_case=kept.extend)
    assert [(r["case"], r["provider"], r["error"]) for r in kept] == [
        ("c", "all", runner.NO_TIME), ("d", "illada", None),
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------- an earlier run, and peers


def test_old_files_have_no_timing():
    old, new = record("a", 1.0, timing=None), record("a", 1.0)
    assert [line.verdict for line in regression.compare([new], [old])] == [regression.SAME]


def test_verdicts_know_the_noise():
    def verdict(now, before, **changes):
        (line,) = regression.compare([record("c", now, **changes)], [record("c", before)])
        return line.verdict

    assert verdict(1.02, 1.0) == "same" and verdict(1.2, 1.0) == "SLOWER" and verdict(0.8, 1.0) == "FASTER"
    assert verdict(1.2, 1.0, p20_ms=0.9, p80_ms=1.4) == "same"
    assert verdict(1.2, 1.0, n=1) == "same" and verdict(1.5, 1.0, n=1) == "SLOWER"
    assert verdict(1.1, 1.0, n=3) == "same" and verdict(1.1, 1.0, n=7) == "SLOWER"


def test_a_row_too_noisy_for_a_verdict_is_named(capsys):
    before, now = record("c", 1.0), record("c", 2.0, p20_ms=1.0, p80_ms=2.5)
    assert regression.show([now], [before], "old") == 0
    assert "- too noisy to tell, measure again: c: illada, 2.00 times" in capsys.readouterr().out


def test_a_slower_machine_is_no_regression():
    def both(ours, peers, torch_now="2"):
        before = [record("c", 1.0), *(record("c", 1.0, f"peer {i}") for i in range(3))]
        now = [record("c", ours), *(record("c", peers, f"peer {i}") for i in range(3))]
        return regression.compare([{**r, "torch": torch_now} for r in now], before)[0].verdict

    assert both(1.5, 1.0) == "SLOWER" and both(1.5, 1.5) == "same" and both(2.0, 1.5) == "SLOWER"
    assert both(1.5, 1.5, torch_now="3") == "SLOWER"  # a peer's code may have changed
    assert both(1.0, 0.5) == "same"

    def apart(peers):  # a case without peers is judged by those of all others, of which three are needed
        before = [record("c", 1.0), *(record("d", 1.0, f"peer {i}") for i in range(peers))]
        return regression.compare([{**r, "median_ms": 1.5, "p20_ms": 1.5, "p80_ms": 1.5} for r in before], before)[0]

    assert apart(3).verdict == "same" and apart(2).verdict == "SLOWER"
    beside = [record("c", 1.0), record("c", 1.0, "peer"), *(record("d", 1.0, f"peer {i}") for i in range(3))]
    now = [
        {**r, "median_ms": ms, "p20_ms": ms, "p80_ms": ms} for r, ms in zip(beside, (1.5, 1.0, 2, 2, 2), strict=True)
    ]
    assert regression.compare(now, beside)[0].verdict == "SLOWER"  # its own peer took no longer


def test_compare_with_an_earlier_run(stub, tmp_path, capsys):
    stub.calls["illada"] = lambda: time.sleep(2e-3)
    old = tmp_path / "old.jsonl"
    assert run("--json", old) == 0
    capsys.readouterr()
    assert run("--json", old, "--compare", old) in (0, 1)  # itself is not in what it is compared with
    assert f"## This run against the earlier one in {old}" in capsys.readouterr().out
    fast = [{**r, "median_ms": 1e-3, "p20_ms": 1e-3, "p80_ms": 1e-3} for r in report.read_json(old)[:4:2]]
    report.write_json(fast, tmp_path / "fast.jsonl")
    assert run("--compare", tmp_path / "fast.jsonl") == 1
    out = capsys.readouterr().out
    assert "- ours: 2 slower, 0 the same, 0 faster" in out and "SLOWER" in out
    slow = [{**r, "median_ms": 1e3, "p20_ms": 1e3, "p80_ms": 1e3} for r in fast]
    report.write_json(slow, tmp_path / "slow.jsonl")
    assert run("--compare", tmp_path / "slow.jsonl") == 0
    assert regression.main([str(tmp_path / "slow.jsonl"), str(tmp_path / "fast.jsonl")]) == 0
    assert regression.main([str(tmp_path / "fast.jsonl"), str(tmp_path / "slow.jsonl")]) == 1
    report.write_json([record("other", 1.0)], tmp_path / "other.jsonl")
    capsys.readouterr()
    assert run("--compare", tmp_path / "other.jsonl") == 2
    assert "No case and provider is in both runs." in capsys.readouterr().out


def test_what_else_differs_is_said():
    before, now = [record("c", 1.0, threads=2, load=0.1)], [record("c", 1.0, threads=4, load=9.0, device="e")]
    assert regression.differences(now, before) == [
        "device: d before, e now", "threads: 2 before, 4 now", "load: up to 0.1 before, up to 9 now",
    ]  # fmt: skip
    assert regression.differences(before, before) == []


def test_check_fails_where_a_peer_is_faster_beyond_noise(stub, capsys):
    stub.calls["illada"] = lambda: time.sleep(5e-3)
    assert run() == 0 and run("--check") == 1
    assert "MISSED a: peer takes 0.0" in capsys.readouterr().out
    stub.module.rivals = lambda name: False
    assert run("--check") == 0


def test_peers_within_the_noise_are_no_missed_goal():
    ours, peer = record("c", 1.0, p20_ms=0.8, p80_ms=1.3), record("c", 0.9, "peer")
    assert regression.peer_goals([ours, peer, record("c", 0.1, "mm+illada")]) == []
    goals = regression.peer_goals([ours, record("c", 0.5, "peer"), record("c", 0.1, "peer", timing="graph")])
    assert [(g.text, g.met) for g in goals] == [("c: peer takes 0.50 of our time", False)]


# ------------------------------------------------------------------------------------------------------------ all of it


@pytest.mark.slow
def test_all_quick_ends_in_its_budget_and_compares(tmp_path):
    def whole(*more):
        began = time.monotonic()
        options = ["all", "--device", "cpu", "--quick", "--time-budget", "20", *more]
        done = subprocess.run([sys.executable, "-m", "benchmarks", *options], cwd=ROOT, capture_output=True, text=True)
        return done, time.monotonic() - began

    out, plot = tmp_path / "o.jsonl", tmp_path / "o.png"
    done, seconds = whole("--json", str(out), "--plot", str(plot))
    assert done.returncode == 0, done.stderr[-3000:]
    assert seconds < 35, done.stdout  # what one call of torch takes cannot be cut short; nor can importing it
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["bench"] for line in lines} == {ceiling.BENCH, *command.BENCHES} and plot.stat().st_size > 10_000
    done, _ = whole("--compare", str(out))
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    assert done.returncode in (0, 1)  # on cores that others use as well a regression may show
    assert f"## This run against the earlier one in {out}" in done.stdout and "- ours: " in done.stdout
