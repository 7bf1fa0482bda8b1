"""The loss benchmark on tiny heads, and its GPU-only peers with stand-ins that have their signatures."""

import importlib.util
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
if importlib.util.find_spec("benchmarks") is None:
    sys.path.insert(0, str(ROOT))

import illada  # noqa: E402
from benchmarks import __main__ as command  # noqa: E402
from benchmarks import ceiling, loss, loss_providers, report, runner, timing  # noqa: E402
from benchmarks.loss_providers import IGNORED, PROVIDERS, Job, LossProvider  # noqa: E402

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FILTER = "illada filter_eps=2^-12"
HERE = [
    name for name in PROVIDERS if name.split()[0] in ("illada", "eager", "torch") and name != FILTER
]  # no GPU, compiler


def job(masked=0.5, spread=1.0, total=48, width=16, vocab=101):
    return Job(total, masked, width, vocab, spread, torch.float32)


def errors(provider, job, direction="fwdbwd"):
    inputs = job.inputs()
    return loss.Exact(inputs, direction).errors(provider, loss.bind(provider, inputs, direction)())


# ---------------------------------------------------------------------------------------------------------- command


@pytest.mark.parametrize("direction", [None, "fwd"])
def test_records(tmp_path, monkeypatch, capsys, direction):
    monkeypatch.setattr(loss, "CPU_SHAPES", [(48, 0.5, 16, 101), (30, 1.0, 16, 101)])
    monkeypatch.setattr(ceiling, "cases", lambda cases, device: [])
    monkeypatch.setattr(loss_providers, "no_compiler", lambda: "no compiler")  # too slow for a test
    out, plot = tmp_path / "o.jsonl", tmp_path / "o.png"
    options = ["--device", "cpu", "--repeats", "1", "--json", str(out), "--plot", str(plot)]
    assert command.main(["loss", *options, *(["--direction", direction] if direction else [])]) == 0
    lines = report.read_json(out)
    assert all(list(line) == list(runner.KEYS) and line["bench"] == "loss" for line in lines)
    names = [f"{direction or 'fwdbwd'} {shape}" for shape in ("48 t=0.5 16x101", "30 t=1 16x101")]
    offered = {n for n in PROVIDERS if direction is None or n not in ("illada grad_weight", FILTER)}
    assert {line["provider"] for line in lines if line["case"] == names[0]} == offered
    assert {line["provider"] for line in lines if line["case"] == names[1]} == {n for n in offered if " all" not in n}
    done = {(line["case"], line["provider"]): line for line in lines if line["median_ms"]}
    left = offered.intersection(HERE) - {p for c, p in done if c == names[0]}
    assert left <= {"torch chunked", "torch chunked unweighted"}
    for (case, _), line in done.items():
        rows = 24 if case == names[0] else 30
        assert line["flops"] == (2 if direction else 6) * rows * 16 * 101 and line["bytes"] is None
        assert line["counts"]["rows"] == rows and line["error"] < 1e-5 and line["peak_memory_bytes"] > 0
        gradients = [] if direction else ["dX error", "dW error", "dW rest"]
        assert list(line["counts"]) == ["rows", "loss error", *gradients]
        assert all(line["counts"][key] < 1e-5 for key in gradients)
    left_out = {line["provider"]: line["error"] for line in lines if line["median_ms"] is None}
    assert left_out["cce exact"] == left_out["quack unweighted"] == "NotImplementedError: runs on GPUs alone"
    assert left_out["compile"] == "NotImplementedError: no compiler"
    assert (
        direction or left_out[FILTER] == "NotImplementedError: filter_eps needs the fused kernels: bfloat16 on sm_90a"
    )
    assert plot.stat().st_size > 1000
    printed = capsys.readouterr()
    head = next(x for x in printed.out.splitlines() if x.startswith("case ")).split()
    assert "GFLOP/s" in head and "rows" in head and ("rest" in head) == (direction is None)
    assert f"{names[0]}: liger left out: NotImplementedError: runs on GPUs alone\n" in printed.err


def test_bad_usage(capsys):
    for options, why in [
        (["loss", "--direction", "bwd"], "loss has no --direction bwd, only fwd and fwdbwd"),
        (["attention", "--spread", "8"], "attention has no --spread; loss has"),
        (["loss", "--spread", "-1"], "--spread must be a positive number, got -1"),
    ]:
        with pytest.raises(SystemExit):
            command.main([*options, "--device", "cpu"])
        assert why in capsys.readouterr().err


def test_spread_is_in_the_names(capsys):
    assert command.main(["loss", "--device", "cpu", "--spread", "8", "--only", "t=0.1", "--list"]) == 0
    assert capsys.readouterr().out.endswith("cases of loss on cpu:\n  fwdbwd 512 t=0.1 256x16384 spread=8\n\n")


# ----------------------------------------------------------------------------------------------------- jobs and errors


def test_inputs():
    this = Job(4000, 0.25, 64, 300, dtype=torch.float32)
    inputs = this.inputs()
    weights = inputs.token_weights
    assert torch.equal(weights.nonzero().squeeze(-1), inputs.rows.long()) and len(inputs.rows) == this.count == 1000
    assert weights[inputs.rows].min() >= 1 / 0.375 and weights[inputs.rows].max() <= 1 / 0.125
    assert weights[inputs.rows].std() > 0.5 and inputs.normalizer == 4000
    assert 0.9 < F.linear(inputs.hidden, inputs.weight).std(dim=1).mean() < 1.1
    assert torch.equal(inputs.labels == IGNORED, weights == 0)
    compact = inputs.compact
    assert torch.equal(compact.hidden, inputs.hidden[inputs.rows.long()]) and compact.normalizer == 4000
    assert torch.equal(compact.labels, compact.targets) and compact.rows.tolist() == list(range(1000))
    again = this.inputs()
    assert torch.equal(again.targets, inputs.targets) and torch.equal(again.weight, inputs.weight)
    assert Job(7, 0.01, 4, 8).count == 1 and Job(8192, 1.0, 4, 8).count == 8192


def test_targets_are_likely_where_logits_are_peaked():
    def likelihood(spread):
        inputs = job(1.0, spread, total=512).inputs()
        logits = F.linear(inputs.hidden, inputs.weight)
        return float(F.cross_entropy(logits, inputs.targets).neg().exp())

    assert likelihood(1.0) < 0.05 and likelihood(8.0) > 0.3


def test_flops():
    this = Job(100, 0.3, 7, 11)
    assert this.flops("fwd") == 2 * 30 * 7 * 11 and this.flops("fwdbwd") == 3 * this.flops("fwd")


def test_the_reference_is_what_float64_autograd_gives():
    inputs = job(0.4, 3.0).inputs()
    exact = loss.Exact(inputs, "fwdbwd")
    wide = replace(inputs, hidden=inputs.hidden.double(), weight=inputs.weight.double())
    hidden, weight = (x.requires_grad_() for x in (wide.hidden, wide.weight))
    for weighted, weights in ((True, inputs.token_weights), (False, (inputs.token_weights != 0).float())):
        nll = F.cross_entropy(F.linear(hidden, weight), wide.targets, reduction="none")
        value = nll.dot(weights.double()) / wide.normalizer
        result = (value.detach(), *torch.autograd.grad(value, (hidden, weight)))
        found = exact.errors(LossProvider(loss_providers.eager_loss, everything=True, weighted=weighted), result)
        assert list(found) == ["loss error", "dX error", "dW error", "dW rest"]
        assert all(error < 1e-6 for error in found.values())
        assert min(exact.errors(LossProvider(loss_providers.eager_loss, True, not weighted), result).values()) > 0.1


def test_sampled_rows(monkeypatch):
    assert loss.spaced(5, 9, CPU).tolist() == [0, 1, 2, 3, 4] and loss.spaced(1, 9, CPU).tolist() == [0]
    picked = loss.spaced(155136, 256, CPU)
    assert len(set(picked.tolist())) == 256 and picked[0] == 0 and picked[-1] == 155135
    monkeypatch.setattr(loss, "SAMPLED", 3)
    exact = loss.Exact(job().inputs(), "fwdbwd")
    assert exact.d_hidden.shape == (3, 16) and {d.shape for d in exact.d_logits.values()} == {(24, 3)}
    assert max(errors(PROVIDERS["eager"], job()).values()) < 1e-5


def test_a_wrong_provider_shows():
    inputs = job().inputs()
    exact = loss.Exact(inputs, "fwdbwd")
    provider = PROVIDERS["eager all"]
    value, d_hidden, d_weight = loss.bind(provider, inputs, "fwdbwd")()

    def found(value=value, d_hidden=d_hidden, d_weight=d_weight):
        return exact.errors(provider, (value, d_hidden, d_weight))

    assert max(found().values()) < 1e-5
    assert found(value=value * 1.5)["loss error"] == pytest.approx(0.5, rel=1e-3)
    assert found(d_hidden=d_hidden * 0)["dX error"] == pytest.approx(1)
    assert found(d_weight=d_weight * 1.01)["dW error"] == pytest.approx(0.01, rel=1e-3)
    stray = d_hidden.clone()
    stray[inputs.token_weights == 0] = d_hidden.abs().max()
    assert found(d_hidden=stray)["dX error"] > 1
    filtered = d_weight.clone()
    filtered[exact.rest] = 0
    assert found(d_weight=filtered)["dW rest"] == pytest.approx(1) and found(d_weight=filtered)["dW error"] < 0.5
    assert found(d_weight=d_weight * torch.nan)["dW error"] == torch.inf
    # and in the records, timed all the same
    wrong = LossProvider(lambda inputs: lambda h, w: 2 * loss_providers.eager_loss(inputs)(h, w))
    records = run({"illada": PROVIDERS["illada"], "wrong": wrong})
    assert records["illada"]["error"] < 1e-5 and records["wrong"]["error"] == pytest.approx(1, rel=1e-3)


def run(providers):
    """Return the records of a tiny case by provider."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "PROVIDERS", providers)
        return {r["provider"]: r for r in runner.run("loss", [loss.make_case(job())], repeats=1)}


# ------------------------------------------------------------------------------------------------------------ providers


@pytest.mark.parametrize("spread", [1.0, 8.0])
@pytest.mark.parametrize("masked", [0.1, 0.7, 1.0])
@pytest.mark.parametrize("name", HERE)
def test_ways_agree(name, masked, spread):
    if name.startswith("torch") and not hasattr(F, "linear_cross_entropy"):
        with pytest.raises(NotImplementedError, match="has no F.linear_cross_entropy; 2.13 has"):
            PROVIDERS[name].make(job().inputs())
        return
    for direction in loss.DIRECTIONS:
        assert max(errors(PROVIDERS[name], job(masked, spread), direction).values()) < 1e-5


def test_straight_into_a_buffer():
    inputs = job().inputs()
    provider, exact = PROVIDERS["illada grad_weight"], loss.Exact(inputs, "fwdbwd")
    call = loss.bind(provider, inputs, "fwdbwd")
    added = call()[2].clone()
    assert max(exact.errors(provider, (*call()[:2], added)).values()) < 1e-5
    torch.testing.assert_close(call()[2], 3 * added)  # and not written anew

    def memory(name):
        provider = next(p for p in loss.make_case(job(total=64, vocab=9000, width=64)).make() if p.name == name)
        return provider.memory()

    gradient = 9000 * 64 * 4
    assert memory("illada grad_weight") == pytest.approx(memory("illada"), abs=gradient / 2)  # beyond the results


def test_filter_is_offered_where_it_filters(monkeypatch):
    seen = []

    def function(hidden, weight, targets, token_weights, **keywords):
        seen.append(keywords)
        return hidden.sum() + weight.sum()

    with pytest.raises(NotImplementedError, match="filter_eps needs the fused kernels"):
        PROVIDERS[FILTER].make(job().inputs())
    monkeypatch.setattr(illada.ops.raw, "linear_masked_cross_entropy_workspace", lambda *tensors: 1)
    monkeypatch.setattr(illada, "linear_masked_cross_entropy", function)
    loss.bind(PROVIDERS[FILTER], job().inputs(), "fwdbwd")()
    assert seen == [{"filter_eps": 2**-12, "rows": None, "normalizer": 48.0}]


def test_compiled(monkeypatch):
    monkeypatch.setattr(loss_providers, "compiled", lambda function: function)
    monkeypatch.setattr(loss_providers, "no_compiler", lambda: None)
    for name in ("compile", "compile all"):
        assert max(errors(PROVIDERS[name], job()).values()) < 1e-5


def reduce(hidden, weight, target, ignore_index, reduction):
    return F.cross_entropy(F.linear(hidden, weight), target, ignore_index=ignore_index, reduction=reduction)


def stand_ins(seen):
    """The packages' modules, with functions that have their signatures and defaults."""

    def liger(input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0,
              label_smoothing=0.0, reduction="mean", softcap=None, return_z_loss=False, accum_dtype=None,
              use_token_scaling=False, return_token_accuracy=False, return_predicted_tokens=False,
              chunk_mem_const=1):  # fmt: skip
        seen.append(chunk_mem_const)
        return reduce(input, weight, target, ignore_index, reduction)

    def scaled(_input, weight, target, temperature=1.0, ignore_index=-100, m_tiles_per_cluster=1,
               return_entropy=False, selected_token_ids=None):  # fmt: skip
        return reduce(_input, weight, target, ignore_index, "none")

    def cce(e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, filter_eps="high",
            impl="cce"):  # fmt: skip
        seen.append(filter_eps)
        return reduce(e, c, targets, ignore_index, reduction)

    def quack(x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean", tuned=True, use_scaled_exp=None):
        assert reduction in ("mean", "sum")
        return reduce(x, weight, target, ignore_index, reduction)

    return {
        "liger_kernel.transformers.functional": SimpleNamespace(liger_fused_linear_cross_entropy=liger),
        "liger_kernel.ops": SimpleNamespace(LigerFusedLinearScaledCrossEntropyFunction=SimpleNamespace(apply=scaled)),
        "cut_cross_entropy": SimpleNamespace(linear_cross_entropy=cce),
        "quack.linear_cross_entropy": SimpleNamespace(chunked_linear_cross_entropy=quack),
    }


def test_packages(monkeypatch):
    seen = []
    modules = stand_ins(seen)
    monkeypatch.setattr(loss_providers, "_gpu_package", lambda inputs, module, package: modules[module])
    for name in [name for name in PROVIDERS if name.split()[0] in ("liger", "cce", "quack")]:
        for masked in (0.5, 1.0):
            assert max(errors(PROVIDERS[name], job(masked)).values()) < 1e-5, name
        constants = {"liger": 1, "liger tuned": 7, "liger tuned unweighted": 7, "cce": "high", "cce exact": None}
        assert name not in constants or seen[-1] == constants[name]
    assert PROVIDERS["quack unweighted"].weighted is PROVIDERS["liger all unweighted"].weighted is False


def test_packages_that_are_missing(monkeypatch):
    on_gpu = SimpleNamespace(hidden=SimpleNamespace(device=GPU, shape=(4, 4)), weight=range(9))
    for name, module in [("liger", "liger_kernel"), ("cce", "cut_cross_entropy"), ("quack unweighted", "quack")]:
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match="pip install .* for this peer"):
            PROVIDERS[name].make(on_gpu)


@pytest.mark.parametrize("vocab", [155136, 126464, 151936])
@pytest.mark.parametrize("rows", [819, 1024, 4096, 7373, 8192])
def test_tuned_chunks_are_large(rows, vocab):
    """As Liger makes them of its constant."""
    factor = -(-vocab // (loss_providers.liger_constant(rows, 4096, vocab) * 4096))
    chunk = min(1 << (-(-rows // factor) - 1).bit_length(), rows)
    assert chunk == (rows if rows < 8192 else 4096)


def test_ours_without_a_kernel_is_left_out_and_ours_that_fails_is_not():
    def fail(error, inputs):
        raise error

    providers = {"eager": PROVIDERS["eager"], "illada": LossProvider(partial(fail, NotImplementedError("no kernel")))}
    assert list(run(providers)) == ["eager"]
    with pytest.raises(ValueError, match="wrong"):
        run({"illada": LossProvider(partial(fail, ValueError("wrong")))})


# --------------------------------------------------------------------------------------------------------------- memory


def test_extra_memory_on_a_cpu():
    def call():
        first = torch.ones(1 << 20, dtype=torch.uint8)
        second = torch.ones(1 << 20, dtype=torch.uint8)
        del first
        return second, second[1:]  # one storage, counted once

    assert (1 << 20) <= timing.extra_memory(call, CPU) < (1 << 20) + 1024
    assert timing.extra_memory(lambda: (torch.ones(1 << 20),), CPU) < 1024


def test_memory_of_the_providers():
    inputs = job(0.5, total=256, vocab=4096).inputs()
    logits = 128 * 4096 * 4

    def memory(name):
        return timing.extra_memory(loss.bind(PROVIDERS[name], inputs, "fwd"), CPU)

    assert 2 * logits <= memory("eager") < 2.1 * logits and 4 * logits <= memory("eager all") < 4.2 * logits
    assert logits <= memory("illada") < 1.2 * logits  # one chunk of all of them


def test_memory_on_a_gpu_is_the_peak_without_the_results(monkeypatch):
    def peak(call, device):
        call()
        return 5000

    monkeypatch.setattr(timing, "peak_memory", peak)
    assert timing.extra_memory(lambda: (torch.ones(1000), torch.ones(8, dtype=torch.uint8)), GPU) == 5000 - 4008


# ------------------------------------------------------------------------------------------------------- cases and goals


def test_cases_of_a_gpu():
    names = [case.name for case in loss.cases(GPU)]
    assert len(set(names)) == len(names) == 3 + 3 * 2 * 4 + 2 and names[0] == loss.PAPER
    assert sum("t=1 " in name for name in names) == 26 and "fwdbwd 4095 t=1 4096x155136" in names
    assert "fwd 1024 t=1 2048x151936 spread=8" in [case.name for case in loss.cases(GPU, "fwd", 8.0)]


def record(provider, ms, case=loss.PAPER, error=1e-3, memory=1e9, rest=1e-3, **changes):
    counts = {"rows": 4096, "loss error": 1.0, "dX error": error, "dW error": error, "dW rest": rest}
    values = {"case": case, "provider": provider, "median_ms": ms, "p20_ms": ms, "p80_ms": ms, "device": "d", "n": 7}
    values |= {"error": error, "peak_memory_bytes": memory, "counts": counts, "timing": "events", "flops": 1.5e13}
    return {**dict.fromkeys(runner.KEYS), **values, **changes}


def test_goals_of_a_gpu():
    records = [
        record("illada", 20.0), record("illada chunk_rows=1024", 22.0, memory=5e8), record("eager", 40.0, rest=4e-4),
        record("liger", 60.0), record("liger scaled", 25.0), record("liger tuned unweighted", 24.0),
        record("quack unweighted", 20.2), record("eager", 9.0, case="fwdbwd 1024 t=1 4096x155136"),
        record("illada", 9.0, case="fwd 1024 t=1 4096x155136", counts={"rows": 1024, "loss error": 1.0}),
        record(FILTER, 15.0, rest=1.0), record("cce", 50.0, rest=1.0),  # inexact, and no goal is about them
    ]  # fmt: skip
    assert [(goal.text.removeprefix(f"{loss.PAPER}: "), goal.met) for goal in loss.goals(records)] == [
        ("2.5 times the error of eager (goal 2)", False),
        ("20.0 ms (goal 21 ms)", True),
        ("illada takes 1.00 GB (goal 1.4 GB)", True),
        ("illada chunk_rows=1024 takes 0.50 GB (goal 0.4 GB)", False),
        ("1.25x faster than liger scaled (goal 1.4x)", False),
        ("3.00x faster than liger (goal 2.5x)", True),
        ("1.01x faster than quack unweighted (goal 1.05x)", False),
    ]


def test_goals_of_a_cpu():
    records = [
        record("illada", 2.0, timing="clock"), record("eager", 2.0, timing="clock"),
        record("eager all", 4.0, memory=3e9, timing="clock"),
    ]  # fmt: skip
    assert [(goal.text.removeprefix(f"{loss.PAPER}: "), goal.met) for goal in loss.goals(records)] == [
        ("1.0 times the error of eager (goal 2)", True),
        ("3.0x less memory than eager all (goal 2x)", True),
    ]


def test_table_counts_in_tera_where_there_are_many(capsys):
    report.print_table([record("illada", 20.0), record("slow", 2000.0)])
    lines = capsys.readouterr().out.splitlines()
    assert "TFLOP/s" in lines[1] and " 750.0 " in lines[3] and " 7.5 " in lines[4]
    assert lines[3].split()[-5:] == ["4096", "1.0e+00", "1.0e-03", "1.0e-03", "1.0e-03"]


@pytest.mark.parametrize("ours, theirs, met", [
    (0.0, 0.0, True), (math.inf, math.inf, True), (1e-9, 0.0, False), (math.nan, 1e-3, False), (1e-3, 1e-3, True),
])  # fmt: skip
def test_errors_that_are_zero_infinite_or_no_number(ours, theirs, met):
    case = "fwdbwd 1 t=1 1x1"
    records = [record(name, 1.0, case=case, counts={"dX error": 1.0, "dW error": error}, timing="clock")
               for name, error in (("illada", ours), ("eager", theirs))]  # fmt: skip
    assert [goal.met for goal in loss.goals(records) if "eager" in goal.text] == [met]
