"""The stages of run_on_gpu.sh with stand-ins for the GPU: what is right, wrong or hangs, what is recorded and advised."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if importlib.util.find_spec("benchmarks") is None:
    sys.path.insert(0, str(ROOT))

from benchmarks import (  # noqa: E402
    commands,
    loss,
    peers,
    report,
    run_tests,
    runner,
    sanitizer,
    smoke,
    smoke_jobs,
    timing,
    tune,
    tune_jobs,
)  # fmt: skip
from benchmarks.choices import PREFIXES, SM80_ALONE, SM90_ALONE, concerns, matters_on, others  # noqa: E402
from benchmarks.smoke_jobs import Job  # noqa: E402
from illada.ops.variants import Variant, variants  # noqa: E402

DEVICE = torch.device("cuda", 0)
IN_USE: dict[str, str] = {}  # the stand-ins' choices


def choice(name, *values):
    return Variant(name, f"ILLADA_VARIANT_{name.upper()}", "a choice", values, values[0])


@contextlib.contextmanager
def use_fake_variants(**values):
    IN_USE.update(values)
    yield
    IN_USE.clear()


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: None)
    for module in (smoke, tune):
        monkeypatch.setattr(module, "use_variants", use_fake_variants)
        monkeypatch.setattr(module, "variants", lambda: [])


# ---------------------------------------------------------------------------------------------------------- choices


@pytest.mark.parametrize("name, kinds", [
    ("attention_forward_d128", {"attention_forward"}), ("attention_cluster", {"attention_forward"}),
    ("attention_backward_sums", {"attention_backward"}), ("loss_gradients", {"linear_loss"}),
    ("loss_order", {"linear_loss"}), ("sample_tokens", {"sample_tokens"}),
    ("linear_sample_rows", {"linear_sample_tokens"}), ("pdl", set(PREFIXES)), ("l2_hints", {"attention_forward", "attention_backward"}),
    ("attention_order", {"attention_forward", "attention_backward"}),
])  # fmt: skip
def test_what_a_choice_is_about(name, kinds):
    assert {kind for kind in PREFIXES if concerns(name, kind)} == kinds


def test_choices_of_one_head_dim():
    assert concerns("attention_forward_d128", "attention_forward", 128)
    assert not concerns("attention_forward_d128", "attention_forward", 64)
    assert not concerns("attention_forward_d64", "attention_forward", 128)
    assert concerns("attention_backward_sums", "attention_backward", 64) and concerns("pdl", "attention_backward", 64)
    choices = [
        choice("attention_forward_d64", "a", "b"),
        choice("pdl", "early", "wait", "0"),
        choice("loss_x", "y", "z"),
    ]
    assert others(choices, "attention_forward", 64) == [
        ("attention_forward_d64", "b"), ("pdl", "wait"), ("pdl", "0"),
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "on_sm90", "on_others"), [
    ("attention_forward_warps", False, True), ("attention_forward_d64", True, False), ("l2_hints", True, False),
    ("loss_raster", True, False), ("pdl", True, True), ("sample_tokens", True, True),
])  # fmt: skip
def test_choices_of_kernels_that_a_gpu_lacks(name, on_sm90, on_others):
    assert matters_on(name, 9) == on_sm90 and matters_on(name, None)
    assert {matters_on(name, major) for major in (8, 10, 12)} == {on_others}


@pytest.mark.skipif(not variants(), reason="built without CUDA kernels, which have the choices")
def test_these_names_are_choices_of_the_library():
    for prefix in (*SM80_ALONE, *SM90_ALONE):
        assert any(choice.name.startswith(prefix) for choice in variants()), prefix


# ------------------------------------------------------------------------------------------------------------ smoke


def test_every_kernel_of_the_sources_is_in_a_smoke_job():
    # Between __global__ and the name there are launch bounds, whose parentheses may nest.
    pattern = re.compile(r"__global__[^;{]*?\bvoid\s+illada_(\w+)\(")
    kernels = {name for path in (ROOT / "csrc").rglob("*.cu*") for name in pattern.findall(path.read_text())}
    launched = {name for job in smoke_jobs.jobs() for name in (*job.kernels, *job.portable)}
    assert len(kernels) > 20 and launched == kernels
    names = [job.name for job in smoke_jobs.jobs()]
    assert len(set(names)) == len(names) and {job.kind for job in smoke_jobs.jobs()} == set(PREFIXES)


def test_covering_jobs_launch_what_all_launch():
    jobs = smoke_jobs.jobs()
    few = smoke.covering(jobs)
    assert len(few) < len(jobs) / 2
    assert {(k, j.dim) for j in few for k in j.kernels} == {(k, j.dim) for j in jobs for k in j.kernels}


def fake_jobs():
    def right(device):
        return {"out": (0.5 if IN_USE else 0.25, 1.0), "count": (0.0, 0.0)}

    def wrong(device):
        return {"out": (float("nan"), 1.0), "lse": (0.1, 1.0)}

    def hang(device):
        time.sleep(60)

    def fail(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    return [Job(name, kind, run, (name,)) for name, kind, run in (
        ("fine", "remask", right), ("bad", "remask", wrong), ("stuck", "loss", hang), ("broken", "loss", fail),
    )]  # fmt: skip


def test_smoke_tells_right_wrong_hanging_and_broken_kernels(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(smoke_jobs, "jobs", fake_jobs)
    monkeypatch.setattr(smoke, "variants", lambda: [choice("pdl", "early", "0"), choice("remask_way", "a", "b")])
    path = tmp_path / "smoke.jsonl"
    began = time.monotonic()
    assert smoke.main(["--json", str(path), "--limit", "2", "--at-once", "4"]) == 1
    assert time.monotonic() - began < 25
    found = {(x["task"], x["step"]): x for x in map(json.loads, path.read_text().splitlines())}
    statuses = {"fine": "OK", "bad": "WRONG", "stuck": "HANG", "broken": "ERROR"}
    for under in ("default", "pdl=0"):
        assert {step: x["status"] for (task, step), x in found.items() if task == under} == statuses
    # a choice of one kind of job is tried on those alone, and before the choices of all
    assert [step for task, step in found if task == "remask_way=b"] == ["fine", "bad"]
    assert found["default", "fine"]["value"]["out"] == [0.25, 1.0] and found["pdl=0", "fine"]["value"]["out"] == [
        0.5,
        1.0,
    ]
    assert found["default", "broken"]["message"].endswith("an illegal memory access was encountered")
    out = capsys.readouterr().out
    assert (
        "WRONG" in out and "bad: out nan, allowed 1.0e+00\n" in out and "fine [pdl=0]: 0.50 of what is allowed" in out
    )
    assert out.splitlines()[-1] == "3 OK, 3 WRONG, 2 HANG, 2 ERROR"


def test_smoke_without_time_skips(monkeypatch, capsys):
    monkeypatch.setattr(smoke_jobs, "jobs", fake_jobs)
    assert smoke.main(["--seconds", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "4 SKIPPED"


def test_smoke_usage(monkeypatch, capsys):
    monkeypatch.setattr(smoke_jobs, "jobs", fake_jobs)
    with pytest.raises(SystemExit):
        smoke.main(["--only", "nothing like it"])
    assert "no job contains 'nothing like it'" in capsys.readouterr().err
    assert smoke.main(["--list"]) == 0 and "broken: broken" in capsys.readouterr().out
    assert [smoke.main(["--in-process", name]) for name in ("fine", "bad", "none")] == [0, 1, 2]


# ------------------------------------------------------------------------------------------------------------- tune


class FakeEvents(timing.Clock):
    timing = "events"

    def __init__(self, device, flush_bytes=None):
        pass


SPEED = {"": 0.006, "tile=fast": 0.003, "tile=wrong": 0.001, "order=back": 0.004, "order=stuck": 60, "order=broken": 0}


def fake_tune_jobs(device):
    def call():
        if IN_USE.get("order") == "broken":
            raise RuntimeError("no resources")
        pace = sum(SPEED.get(f"{c}={v}", SPEED[""]) - SPEED[""] for c, v in IN_USE.items())
        time.sleep(SPEED[""] + pace)
        return 9.0 if IN_USE.get("tile") == "wrong" else 0.1

    def make():
        return tune_jobs.Inputs(lambda: [call], lambda result: result, 1.0)

    return [tune_jobs.Job(f"fwd {i}", "attention_forward", "attention", make, 1e9) for i in (1, 2)]


def test_tune_finds_the_fastest_right_values(monkeypatch, tmp_path, capsys):
    for name, value in {"jobs": fake_tune_jobs}.items():
        monkeypatch.setattr(tune_jobs, name, value)
    monkeypatch.setattr(timing, "Events", FakeEvents)
    monkeypatch.setattr(timing, "device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    elsewhere = choice("attention_forward_warps", "auto", "8")
    choices = [elsewhere, choice("tile", "plain", "fast", "wrong"), choice("order", "there", "back", "stuck", "broken")]
    monkeypatch.setattr(tune, "variants", lambda: choices)
    paths = [str(tmp_path / name) for name in ("t.json", "t.jsonl")]
    began = time.monotonic()
    assert tune.main(["--json", paths[0], "--records", paths[1], "--limit", "2"]) == 0
    assert time.monotonic() - began < 30
    found = json.loads(Path(paths[0]).read_text())
    assert found["device"] == "a GPU" and [job["job"] for job in found["jobs"]] == ["fwd 1", "fwd 2"]
    for job in found["jobs"]:
        by_value = {entry["value"]: entry for entry in job["values"]}
        assert {value: entry["status"] for value, entry in by_value.items()} == {
            "default": "OK", "fast": "OK", "wrong": "WRONG", "back": "OK", "stuck": "HANG", "broken": "ERROR",
        }  # fmt: skip
        assert by_value["wrong"]["ms"] is None and by_value["wrong"]["message"] == "off by 9.0e+00, 1.0e+00 is allowed"
        assert by_value["fast"]["gain"] > by_value["back"]["gain"] > 1.2 and by_value["fast"]["default_ms"] > 5
        assert job["best"]["values"] == {"tile": "fast", "order": "back"} and job["best"]["gain"] > 3
    tile, order = found["advice"]
    assert tile.startswith('tile: write "fast" first in its values in csrc/common/variants.cpp (+')
    assert tile.endswith("; wrong: WRONG at fwd 1, WRONG at fwd 2")
    assert order.startswith('order: write "back" first') and "stuck: HANG at fwd 1" in order
    records = report.read_json(paths[1])
    assert {r["variants"] for r in records} == {"default", "tile=fast", "order=back"}
    assert all(list(r) == list(runner.KEYS) and r["device"] == "a GPU" and r["timing"] == "events" for r in records)
    out = capsys.readouterr().out
    assert "fwd 1: the fastest is tile=fast, order=back" in out and "What to write into the defaults:" in out
    assert tune.main(["--list"]) == 0
    out = capsys.readouterr().out
    assert "tile=fast" in out and "attention_forward_warps" not in out


def result(job, **gains):
    """A job's entry with a default and one choice."""
    values = [{"choice": None, "value": "default", "status": "OK", "gain": 1.0}]
    for value, gain in gains.items():
        status, gain = (gain, None) if isinstance(gain, str) else ("OK", gain)
        values.append({"choice": "tile", "value": value, "status": status, "gain": gain})
    return {"job": job, "values": values}


def test_advice_weighs_all_shapes():
    tile = [choice("tile", "a", "b", "c")]
    assert tune.advice([result("x", b=1.2, c=0.9), result("y", b=0.97, c=1.04)], tile) == [
        'tile: write "b" first in its values in csrc/common/variants.cpp (+7.9% on average, -3.0% to +20.0% over 2 '
        "shapes); c is 7.2% faster at y"
    ]
    assert tune.advice([result("x", b=1.005, c=0.9)], tile) == ["tile: keep 'a'"]
    assert tune.advice([result("x", b=1.5), result("y", b="HANG")], tile) == [
        "tile: keep 'a'; b is 50.0% faster at x; b: HANG at y"
    ]
    broken = result("x", b=0.5, c="WRONG")
    broken["values"][0] |= {"status": "HANG", "gain": None}
    assert tune.advice([broken], tile)[0].startswith('tile: write "b" first')
    assert tune.advice([result("x")], tile) == [] and tune.advice([], tile) == []


def test_jobs_to_tune_are_those_of_the_issue():
    names = [job.name for job in tune_jobs.jobs(DEVICE)]
    assert len(set(names)) == len(names)
    for direction in ("fwd", "bwd"):
        for pack in ("1x8192", "2x4096", "8x1024", "64x128"):
            assert f"{direction} {pack} 32/8 D128" in names
    assert "fwdbwd 8192 t=0.5 4096x155136" in names
    assert [n for n in names if n.startswith("linear")] == [f"linear {n}x4096x155136 T=0" for n in (128, 1024, 32)]
    # the names are those of the benchmarks' cases
    offered = [case.name for case in loss.cases(DEVICE)]
    assert "fwdbwd 8192 t=0.5 4096x155136" in offered


def test_inputs_of_jobs_on_a_cpu(monkeypatch):
    """The same code as on a GPU, with the ops' CPU kernels."""
    cpu = torch.device("cpu")
    for made in (
        tune_jobs.sample_inputs(4, 300, 0.0, cpu), tune_jobs.linear_inputs(4, 16, 300, 0.0, cpu),
        tune_jobs.loss_inputs(tune_jobs.loss_providers.Job(40, 0.5, 16, 300, dtype=torch.float32)),
    ):  # fmt: skip
        calls = made.bind()
        assert made.error(calls[0]()) <= made.allowed
    sampled = tune_jobs.sample_inputs(4, 300, 0.0, cpu)
    good = sampled.bind()[0]()
    assert sampled.error(good._replace(token=(good.token + 1) % 300)) == float("inf")


# ------------------------------------------------------------------------------------------------------------ peers


def test_peers_are_timed_alone_where_ours_hangs(monkeypatch, tmp_path, capsys):
    def hang():
        time.sleep(60)

    def fail():
        raise RuntimeError("no kernel image")

    def case(name, ours):
        providers = [
            runner.Provider("illada", ours),
            runner.Provider("mm+illada", ours),
            runner.Provider("peer", lambda: 1),
            runner.Provider("other", fail),
        ]
        return runner.Case(name, lambda: providers, repeats=1)

    def job(name, ours):
        return peers.Job("attention", case(name, ours), ("illada", "mm+illada", "peer", "other"))

    jobs = [job("stuck", hang), job("broken", fail), job("fine", lambda: 1)]
    monkeypatch.setattr(peers, "jobs", lambda device: jobs)
    monkeypatch.setattr(timing, "timer", lambda device: timing.Clock())
    monkeypatch.setattr(timing, "peak_memory", lambda call, device: call() and 0)
    monkeypatch.setattr(timing, "device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(runner.variants, "describe", lambda: "default")
    monkeypatch.setattr(runner, "commit", lambda: "abc")
    path = tmp_path / "r.jsonl"
    assert peers.main(["--json", str(path), "--outcomes", str(tmp_path / "o.jsonl"), "--limit", "3"]) == 1
    ran = {(r["case"], r["provider"]): r["median_ms"] is not None for r in report.read_json(path)}
    assert ran["stuck", "peer"] and not {("stuck", "illada"), ("stuck", "mm+illada")} & ran.keys()
    assert ran["broken", "peer"] and not ran["broken", "illada"] and ran["fine", "illada"] and not ran["fine", "other"]
    outcomes = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [(o["task"], o["status"]) for o in outcomes] == [
        ("stuck", "HANG"), ("stuck, peers alone", "OK"), ("broken", "OK"), ("fine", "OK"),
    ]  # fmt: skip
    out = capsys.readouterr().out
    assert "broken: illada: RuntimeError: no kernel image; mm+illada: RuntimeError" in out
    assert out.splitlines()[-1] == "cases: 1 HANG, 3 OK"


def test_peers_cover_what_is_wanted_and_flex_comes_last():
    mine = peers.jobs(DEVICE)
    names = [(job.case.name, "flex" in job.providers) for job in mine]
    first = [name for name, _ in names[:3]]
    assert first == ["fwd 1x8192 32/8 D128", "bwd 1x8192 32/8 D128", "fwdbwd 8192 t=0.5 4096x155136"]
    flex = [i for i, (_, has_flex) in enumerate(names) if has_flex]
    assert flex == list(range(len(names) - len(flex), len(names))) and len(flex) == 4
    backward = next(job for job in mine if job.case.name.startswith("bwd"))
    assert {"sdpa flash", "sdpa cudnn", "fa3"} <= set(backward.providers)


# ------------------------------------------------------------------------------------------------- tests, sanitizer


def test_a_command_out_of_time_says_what_it_has_also_in_the_background():
    """A shell has what it starts with & ignore INT."""
    code = "import time\ntry:\n  time.sleep(60)\nexcept KeyboardInterrupt:\n  print('so far')"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        (ended,) = commands.run({"x": [sys.executable, "-c", code]}, at_once=1, limit=6, deadline=time.monotonic() + 60)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.code is None and ended.output == "so far\n" and ended.seconds < 15


def test_tests_run_by_file_and_one_that_hangs_loses_itself_alone(monkeypatch, tmp_path, capsys):
    files = {
        "test_fine.py": "def test_a(): pass\ndef test_b(): pass\n",
        "test_bad.py": "def test_a(): pass\ndef test_c(): assert 1 == 2, 'off'\n",
        "test_stuck.py": "import time\ndef test_a(): pass\ndef test_d(): time.sleep(60)\n",
        "test_worse.py": "import os\ndef test_e(): os._exit(7)\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(run_tests, "files", lambda only: [tmp_path / name for name in files])
    monkeypatch.setattr(run_tests.importlib.util, "find_spec", lambda name: None)  # without the plugins
    monkeypatch.setattr(commands, "LEAST_SECONDS", 0.5)
    path = tmp_path / "t.json"
    began = time.monotonic()
    options = ["--json", str(path), "--log", str(tmp_path / "t.log"), "--file-seconds", "15", "--at-once", "4"]
    assert run_tests.main(options) == 1
    assert time.monotonic() - began < 50  # far less than the test that sleeps would take, on a busy machine too
    found = {entry["file"]: entry for entry in json.loads(path.read_text())}
    keys = ("status", "passed", "failed")
    assert {name: tuple(entry[key] for key in keys) for name, entry in found.items()} == {
        "test_fine.py": ("OK", 2, 0), "test_bad.py": ("FAILED", 1, 1), "test_stuck.py": ("OUT OF TIME", 1, 0),
        "test_worse.py": ("FAILED", 0, 0),
    }  # fmt: skip
    assert found["test_bad.py"]["failures"][0].startswith("test_c: AssertionError: off")
    assert "=== test_bad.py" in (tmp_path / "t.log").read_text()
    assert "out of time: test_stuck.py" in capsys.readouterr().out


def test_tests_use_the_plugins_that_there_are():
    parts = run_tests.command(Path("t.py"), Path("x.xml"), 4, 60, ["xdist", "pytest_timeout"])
    assert parts[parts.index("-n") + 1] == "4" and "--timeout=60" in parts and "--timeout-method=thread" in parts
    assert not {"-n", "--timeout=60"} & set(run_tests.command(Path("t.py"), Path("x.xml"), 4, 60, []))
    assert "-n" not in run_tests.command(Path("t.py"), Path("x.xml"), 1, 60, ["xdist"])
    names = [path.name for path in run_tests.files()]
    assert names[:2] == ["test_ops_attention.py", "test_ops_attention_backward.py"] and len(names) > 15
    assert "test_ops_sampling.py" in names and "test_reload.py" not in names  # of tests/ops those that take a device
    assert [path.name for path in run_tests.files("graphs")] == ["test_graphs.py"]


FAKE_SANITIZER = """#!/bin/bash
echo ========= COMPUTE-SANITIZER
tool="$2" job="${@: -1}"
if [ "$tool" = racecheck ]; then
  echo "========= Error: Race reported between Write access at illada_x"
  echo "========= ERROR SUMMARY: 1 error"
  exit 99
fi
[ "$job" != stuck ] || sleep 60
[ "$job" != broken ] || { echo "no such job"; exit 2; }
"""


def test_sanitizer_reports_and_never_fails(monkeypatch, tmp_path, capsys):
    program = tmp_path / "compute-sanitizer"
    program.write_text(FAKE_SANITIZER)
    program.chmod(0o755)
    monkeypatch.setattr(smoke_jobs, "jobs", fake_jobs)
    monkeypatch.setattr(commands, "LEAST_SECONDS", 0.2)
    path = tmp_path / "s.json"
    options = ["--json", str(path), "--program", str(program), "--limit", "1", "--log", str(tmp_path / "s.log")]
    assert sanitizer.main([*options, "--tool", "memcheck", "--tool", "racecheck", "--at-once", "8"]) == 0
    found = {(entry["tool"], entry["job"]): entry for entry in json.loads(path.read_text())}
    assert {job: found["memcheck", job]["status"] for job in ("fine", "bad", "stuck", "broken")} == {
        "fine": "clean", "bad": "clean", "stuck": "OUT OF TIME", "broken": "ERROR",
    }  # fmt: skip
    assert {found["racecheck", job]["status"] for job in ("fine", "stuck")} == {"FOUND"}
    assert found["racecheck", "fine"]["message"] == "Error: Race reported between Write access at illada_x"
    assert found["memcheck", "broken"]["message"] == "no such job"
    assert "racecheck: 4 FOUND" in capsys.readouterr().out
    assert sanitizer.main(["--json", str(path), "--program", str(tmp_path / "none")]) == 0
    assert (
        capsys.readouterr().out == "skipped: compute-sanitizer was not found\n" and json.loads(path.read_text()) == []
    )


# ------------------------------------------------------------------------------------------------- run_on_gpu.sh


def run_on_gpu(*arguments, **environment):
    command = ["bash", str(ROOT / "benchmarks" / "run_on_gpu.sh"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_run_on_gpu_teaches():
    done = run_on_gpu("--help")
    assert done.returncode == 0 and "[MINUTES] [OUT]" in done.stdout and "OUT/summary.md" in done.stdout
    for arguments, why in (
        (["soon"], "MINUTES must be a positive whole number, got soon"), (["0"], "got 0"),
        ([1, "a", "b"], "at most MINUTES and OUT"), (["--stages", "smoke,sing"], "there is no stage sing; there are smoke,"),
        (["--fast"], "unknown option --fast"), (["--prebuilt"], "--prebuilt needs a value"),
    ):  # fmt: skip
        done = run_on_gpu(*arguments)
        assert done.returncode == 2 and why in done.stderr and "usage:" in done.stderr and not done.stdout


def test_run_on_gpu_says_what_is_missing_and_touches_nothing(tmp_path):
    (tmp_path / "summary.md").write_text("of an earlier run")
    done = run_on_gpu(1, tmp_path, PYTHON="/no/python", CUDACXX="/no/nvcc")
    assert done.returncode == 2
    assert "  /no/python: Python 3.11 or newer" in done.stderr and "  nvcc (CUDA 12.3 or newer)" in done.stderr
    done = run_on_gpu("--dry-run", "--prebuilt", tmp_path, 1, tmp_path, PYTHON="/no/python", CUSIM="/no/simulator")
    assert done.returncode == 2 and f"  illada in {tmp_path}, the folder of --prebuilt" in done.stderr
    assert "  the simulator; CUSIM names its folder" in done.stderr and "nvcc" not in done.stderr.split("usage")[0]
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("summary.md", "of an earlier run")]


def test_run_on_gpu_needs_the_headers_of_cutlass(tmp_path):
    """From a variable, the checkout's cache, or a wheel in pip's folder: all of them can be carried along."""
    script = tmp_path / "checkout" / "benchmarks" / "run_on_gpu.sh"
    script.parent.mkdir(parents=True)
    shutil.copy(ROOT / "benchmarks" / "run_on_gpu.sh", script)
    clean = {k: v for k, v in os.environ.items() if k not in ("ILLADA_CUTLASS_DIR", "PIP_FIND_LINKS")}

    def missing(**environment):
        environment = {**clean, "PYTHON": "/no/python", "CUDACXX": "/no/nvcc", **environment}
        command = ["bash", str(script), "1", str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path.parent)
        assert done.returncode == 2 and "  nvcc (CUDA 12.3 or newer)" in done.stderr
        return "  the headers of CUTLASS 4.0 or newer; ILLADA_CUTLASS_DIR names them, or PIP_FIND_LINKS" in done.stderr

    assert missing() and missing(PIP_FIND_LINKS=str(tmp_path)) and missing(ILLADA_CUTLASS_DIR="")
    assert not missing(ILLADA_CUTLASS_DIR="/some/where")
    (tmp_path / "nvidia_cutlass-4.2.0.0-py3-none-any.whl").touch()
    assert not missing(PIP_FIND_LINKS=str(tmp_path)) and not missing(PIP_FIND_LINKS=tmp_path.name)
    (tmp_path / "checkout" / ".cache" / "cutlass-4.2.0.0.new").mkdir(parents=True)
    assert missing()  # not complete
    (tmp_path / "checkout" / ".cache" / "cutlass-4.2.0.0").mkdir()
    assert not missing()


FAKE_PYTHON = """#!/bin/bash
case "$*" in
  *benchmarks.smoke*) echo "HANG     20.0 s  attention"; echo "5 OK, 1 HANG"; exit 1 ;;
  *benchmarks.tune*) echo "a table"; printf 'What to write into the defaults:\\npdl: keep\\n' ;;
  *benchmarks.peers*) printf '%s\\n' "$*"; echo "{}" >"$4"; exit 3 ;;
  *benchmarks.run_tests*) printf '3 passed, 0 failed\\n' ;;
  *benchmarks.sanitizer*) printf 'racecheck: 4 FOUND\\n' ;;
  *--list*) printf 'providers of it:\\n  illada\\n\\ncases of it:\\n  a case\\n\\n' ;;
  *"-m benchmarks "*) exit 1 ;;
  *benchmarks.report*) echo "the tables" ;;
  *"os.path.dirname"*) echo /usr/bin ;;
esac
"""


def test_run_on_gpu_goes_on_after_a_stage_that_fails(tmp_path):
    python, site, out = tmp_path / "python", tmp_path / "site", tmp_path / "out"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    (site / "illada").mkdir(parents=True)
    (site / "illada" / "__init__.py").touch()
    done = run_on_gpu("9", out, "--prebuilt", site, PYTHON=str(python))
    assert done.returncode == 1, done.stderr
    order = re.findall(r"^=== (\w+)", done.stdout, re.MULTILINE)
    assert list(dict.fromkeys(order)) == ["smoke", "tune", "peers", "tests", "models", "sanitizer"]
    summary = (out / "summary.md").read_text()
    for line in (
        "- smoke: FAILED (exit 1); 5 OK, 1 HANG", "- tune: pdl: keep", "- peers: FAILED (exit 3); -m benchmarks.peers",
        "- tests: 3 passed, 0 failed", "- models: train-step 8b 8192 FAILED (exit 1), see models.txt",
        "- models: without a result, for lack of time or after a failure: a case", "- sanitizer: racecheck: 4 FOUND",
        "What to write into the defaults:\npdl: keep", "the tables",
    ):  # fmt: skip
        assert line in summary, line
    assert summary.index("- smoke") < summary.index("- tune") < summary.index("- sanitizer")
    assert (out / "smoke.txt").read_text().splitlines()[0] == "HANG     20.0 s  attention"
    few = run_on_gpu("9", out, "--prebuilt", site, "--stages", "tests,smoke", PYTHON=str(python))
    assert list(re.findall(r"^=== (\w+)", few.stdout, re.MULTILINE)) == ["smoke", "tests"]
    assert not (out / "tune.txt").exists() and few.returncode == 1


def test_a_stage_gets_what_is_left_of_the_time(tmp_path):
    python, site, out = tmp_path / "python", tmp_path / "site", tmp_path / "out"
    python.write_text(
        '#!/bin/bash\ncase "$*" in *benchmarks.*) printf \'%s\\n\' "$*" ;; *dirname*) echo /usr/bin ;; esac\n'
    )
    python.chmod(0o755)
    (site / "illada").mkdir(parents=True)
    (site / "illada" / "__init__.py").touch()

    def seconds(minutes):
        done = run_on_gpu(minutes, out, "--prebuilt", site, "--stages", "smoke,tune", PYTHON=str(python))
        return [int(s) for s in re.findall(r"^-m.*--seconds (\d+)$", done.stdout, re.MULTILINE)][:2]

    smoke_seconds, tune_seconds = seconds(1)
    assert 30 <= smoke_seconds <= 40 and 25 <= tune_seconds <= 40  # a minute less what the end takes
    assert seconds(10) == [180, 240] and seconds(20) == [360, 480]
