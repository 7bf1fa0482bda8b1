"""The attention benchmark on tiny packs, and its GPU-only peers with stand-ins that have their signatures."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if importlib.util.find_spec("benchmarks") is None:
    sys.path.insert(0, str(ROOT))

import illada  # noqa: E402
from benchmarks import __main__ as command  # noqa: E402
from benchmarks import attention, attention_providers, ceiling, report, runner, timing  # noqa: E402
from benchmarks.attention_providers import Job, Pack, cached, equal, listed, ragged  # noqa: E402
from illada.ops import reference  # noqa: E402

PACKS = [equal(2, 7), listed(5, 0, 9), cached(3, 2, 4, 8)]
GPU = torch.device("cuda", 0)


def job(pack, kv_heads=2, **more):
    return Job(pack, 4, kv_heads, 16, torch.float32, **more)


def no_kernel(job):
    raise NotImplementedError("varlen_attention: no CUDA kernel")


def error(provider, job, direction="fwd", tolerance=1e-4):
    inputs = job.inputs()
    call = attention.bind(provider, inputs, direction)
    return attention.check(provider, attention.exact(job, inputs, direction), tolerance, call())


# ---------------------------------------------------------------------------------------------------------- command


@pytest.mark.parametrize("direction", [None, "bwd", "fwdbwd"])
def test_records(tmp_path, monkeypatch, direction, capsys):
    monkeypatch.setattr(attention, "CPU_PACKS", PACKS)
    monkeypatch.setattr(ceiling, "cases", lambda cases, device: [])
    out, plot = tmp_path / "o.jsonl", tmp_path / "o.png"
    options = ["--device", "cpu", "--only", "8/2", "--repeats", "1", "--json", str(out), "--plot", str(plot)]
    assert command.main(["attention", *options, *(["--direction", direction] if direction else [])]) == 0
    lines = report.read_json(out)
    calls = [line for line in lines if not line["case"].startswith("plan ")]
    packs = PACKS if direction is None else PACKS[:2]  # caches have no backward
    assert [(line["case"], line["provider"]) for line in calls] == [
        (f"{direction or 'fwd'} {p.name} 8/2 D64", provider) for p in packs for provider in attention.CPU_PROVIDERS
    ]
    assert len(lines) - len(calls) == len(PACKS)
    for line in lines:
        assert list(line) == list(runner.KEYS)
        assert set(line["counts"]) == {"sequences", "longest"} and line["peak_memory_bytes"] is None
    assert all(line["error"] < 1e-5 and line["flops"] and line["bytes"] for line in calls)
    assert plot.stat().st_size > 1000
    head = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("case ")).split()
    assert head[-3:] == ["ratio", "sequences", "longest"] and "GFLOP/s" in head
    assert attention.goals(lines) == []


def test_direction_is_refused_where_there_is_none(capsys):
    with pytest.raises(SystemExit):
        command.main(["remask", "--device", "cpu", "--direction", "bwd"])
    assert "remask has no --direction; attention and loss have" in capsys.readouterr().err


def test_an_op_without_a_kernel_and_a_peer_that_is_not_installed_are_named(tmp_path, monkeypatch, capsys):
    def no_backward(job):
        def attend(q, k, v):
            raise NotImplementedError("forward only")

        return attention_providers.AttentionProvider(attend)

    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", None)
    providers = {
        **attention.CPU_PROVIDERS,
        "illada": no_kernel,
        "fa3": attention_providers.fa3_provider,
        "other": no_backward,
    }
    monkeypatch.setattr(attention, "CPU_PROVIDERS", providers)
    monkeypatch.setattr(attention, "cases", lambda device: [attention.make_case(job(PACKS[0]))])
    monkeypatch.setattr(ceiling, "cases", lambda cases, device: [])
    out = tmp_path / "o.jsonl"
    assert command.main(["attention", "--device", "cpu", "--repeats", "1", "--json", str(out)]) == 0
    lines = {line["provider"]: line for line in report.read_json(out)}
    assert all(list(line) == list(runner.KEYS) for line in lines.values())
    assert [name for name, line in lines.items() if line["median_ms"]] == ["sdpa flash", "sdpa padded"]
    assert lines["illada"]["error"] == "NotImplementedError: varlen_attention: no CUDA kernel"
    assert lines["fa3"]["error"].endswith("pip install fa3-fwd for this peer")
    assert lines["other"]["error"] == "NotImplementedError: forward only"
    capsys.readouterr()
    report.main([str(out)])
    assert "- attention: other left out of 1 case: NotImplementedError: forward only\n" in capsys.readouterr().out


def test_ours_without_a_kernel_is_left_out_and_ours_that_fails_is_not():
    def records(error):
        def fail():
            raise error

        return runner.run("b", [runner.Case("c", lambda: [runner.Provider("illada", fail)])], repeats=1)

    assert records(NotImplementedError("no kernel")) == []
    with pytest.raises(ValueError, match="wrong"):
        records(ValueError("wrong"))


def test_a_result_that_is_wrong_is_left_out():
    provider = attention_providers.illada_provider(job(PACKS[1]))
    assert error(provider, job(PACKS[1])) < 1e-5
    one_row = attention_providers.AttentionProvider(
        lambda q, k, v: provider.attend(q, k, v).index_fill(0, torch.tensor([13]), 0.0)
    )
    with pytest.raises(ValueError, match=r"a row is off by 1.0e\+00 of its length"):
        error(one_row, job(PACKS[1]))
    with pytest.raises(ValueError, match="off by nan"):
        error(attention_providers.AttentionProvider(lambda q, k, v: q * torch.nan), job(PACKS[1]))


# ------------------------------------------------------------------------------------------------- packs and counts


def test_packs():
    assert equal(3, 5) == Pack("3x5", (5, 5, 5)) and listed(5, 0, 9).name == "5+0+9"
    for total in (1024, 32768):
        lengths = ragged(total).lengths
        assert sum(lengths) == total and all(n > 0 and n % 128 for n in lengths) and ragged(total).lengths == lengths
        assert max(lengths) > 4 * min(lengths) and len(lengths) > 16
    blocks = cached(4, 8, 64, 512)
    assert blocks.lengths == (8,) * 4 and blocks.used[0] == 64 and blocks.used[-1] == blocks.slot == 512
    assert blocks.pairs == 8 * sum(blocks.used) and cached(1, 8, 512, 512).used == (512,)


def test_counts_of_a_job():
    dense = Job(equal(2, 8), 4, 2, 16)
    assert dense.flops("fwd") == 4 * 4 * 16 * 2 * 64 and dense.flops("bwd") == 10 * 4 * 16 * 2 * 64
    assert dense.flops("fwdbwd") == dense.flops("fwd") + dense.flops("bwd")
    rows, keys, lse = 2 * 16 * 4 * 16 * 2, 2 * 16 * 2 * 16 * 2, 4 * 4 * 16
    assert dense.bytes("fwd") == rows + keys + lse and dense.bytes("bwd") == 2 * (rows + keys) + lse
    assert dense.bytes("fwdbwd") == dense.bytes("fwd") + dense.bytes("bwd")
    blocks = Job(cached(3, 2, 4, 8), 4, 2, 16)
    assert (blocks.total_q, blocks.total_k) == (6, 24) and blocks.flops("fwd") == 4 * 4 * 16 * 2 * (4 + 6 + 8)
    assert blocks.lengths["cu_seqlens_k"].tolist() == [0, 8, 16, 24] and blocks.lengths["seqused_k"].tolist() == [
        4,
        6,
        8,
    ]


def test_cases_of_a_gpu():
    names = [case.name for case in attention.cases(GPU)]
    assert len(set(names)) == len(names) == 2 * 11 + 2 * 2 + 11
    assert names[0] == "fwd 1x8192 32/8 D128" and "fwd 8x1024 32/32 D64" in names and "plan 64x128 32/8 D128" in names
    backward = [case.name for case in attention.cases(GPU, "bwd")]
    assert "bwd 5120+3072 32/32 D128" in backward and not any("cached" in n for n in backward if n.startswith("bwd"))


# ------------------------------------------------------------------------------------------------- providers agree


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("pack", PACKS, ids=lambda pack: pack.name)
@pytest.mark.parametrize("name", attention.CPU_PROVIDERS)
def test_ways_agree(name, pack, kv_heads):
    provider = attention.CPU_PROVIDERS[name](job(pack, kv_heads))
    for direction in attention.DIRECTIONS if pack.used is None else ["fwd"]:
        assert error(provider, job(pack, kv_heads), direction) < 1e-5


@pytest.mark.parametrize("pack", PACKS, ids=lambda pack: pack.name)
def test_illada_raw(monkeypatch, pack):
    """Stand-ins for the native calls: which buffers they get, and that a backward has those of its own forward."""
    seen = []

    def forward(out, lse, q, k, v, plan, sequences, scale, *, workspace):
        seen.append(("fwd", len(workspace), sequences))
        for target, found in zip((out, lse), attend(q.detach(), k.detach(), v.detach()), strict=True):
            target.copy_(found)

    def backward(
        dq, dk, dv, dout, dlse, q, k, v, out, lse, plan, sequences, scale, *, workspace, recompute_scores_for_dq
    ):
        assert recompute_scores_for_dq  # as the op decides in packs this short
        seen.append(("bwd", len(workspace), sequences))
        want_out, want_lse = attend(q, k, v)
        assert dlse is None and torch.equal(out, want_out) and torch.equal(lse, want_lse)
        for target, found in zip((dq, dk, dv), torch.autograd.grad(want_out, (q, k, v), dout), strict=True):
            target.copy_(found)

    def attend(q, k, v):
        return reference.varlen_attention(q, k, v, **this.lengths, return_lse=True)

    this = job(pack)
    raw = SimpleNamespace(
        varlen_attention=forward, varlen_attention_workspace=lambda *sizes: 7,
        varlen_attention_backward=backward, varlen_attention_backward_workspace=lambda *sizes: 9,
    )  # fmt: skip
    monkeypatch.setattr(attention_providers, "raw", raw)
    call_forward, call_backward = ("fwd", 7, len(pack.lengths)), ("bwd", 9, len(pack.lengths))
    provider = attention_providers.illada_raw_provider(this)
    assert error(provider, this) < 1e-5 and seen == [call_forward]
    if pack.used:
        return
    for direction, calls in (("bwd", [call_backward] * 2), ("fwdbwd", [call_forward, call_backward] * 2)):
        call = attention.bind(provider, this.inputs(), direction)
        assert attention.check(provider, attention.exact(this, this.inputs(), direction), 1e-4, call()) < 1e-5
        seen.clear()
        call(), call()
        assert seen == calls


@pytest.mark.parametrize("direction", attention.DIRECTIONS)
def test_repeatable_gradients_are_a_provider_of_the_backward(monkeypatch, direction):
    monkeypatch.setattr(Job, "inputs", lambda self, seed=0: ())
    monkeypatch.setattr(attention, "exact", lambda *arguments: ())
    monkeypatch.setattr(timing, "input_sets", lambda *arguments: 1)
    for providers in (attention.PROVIDERS, attention.BACKWARD_PROVIDERS):
        for name in providers:
            monkeypatch.setitem(providers, name, no_kernel)
    names = [provider.name for provider in attention.make_case(job(PACKS[0], device=GPU), direction).make()]
    assert names == [*attention.PROVIDERS, *(["illada deterministic"] if direction != "fwd" else [])]


def test_the_deterministic_provider(monkeypatch):
    assert error(attention.BACKWARD_PROVIDERS["illada deterministic"](job(PACKS[1])), job(PACKS[1]), "bwd") < 1e-5
    asked = []
    monkeypatch.setattr(illada, "varlen_attention", lambda *x, deterministic, **more: asked.append(deterministic))
    for name in ("illada", "illada deterministic"):
        attention.BACKWARD_PROVIDERS[name](job(PACKS[1])).attend(*job(PACKS[1]).inputs()[:3])
    assert asked == [False, True]


def flash(seen):
    """A flash_attn_varlen_func as fa3-fwd and flash-attn-4 have it."""

    def function(
        q,
        k,
        v,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        seqused_k=None,
        num_splits=1,
    ):
        seen.append((max_seqlen_q, max_seqlen_k, num_splits))
        out = reference.varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k)
        return (out, None) if len(seen) % 2 else out

    return function


@pytest.mark.parametrize("pack", PACKS, ids=lambda pack: pack.name)
@pytest.mark.parametrize("name,module", [("fa3", "fa3_fwd_interface"), ("fa4", "flash_attn.cute")])
def test_flash_packages(monkeypatch, pack, name, module):
    seen = []
    monkeypatch.setitem(sys.modules, module.split(".")[0], SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(flash_attn_varlen_func=flash(seen)))
    for _ in range(2):  # with and without lse
        assert error(attention.PROVIDERS[name](job(pack)), job(pack)) < 1e-5
    splits = 0 if name == "fa3" and pack.used else 1
    assert seen == [(max(pack.lengths), max(pack.keys), splits)] * 2


@pytest.mark.parametrize("pack", PACKS, ids=lambda pack: pack.name)
def test_torch_varlen(monkeypatch, pack):
    def early(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        assert (max_q, max_k) == (max(pack.lengths), max(pack.keys)) and len(key) == sum(pack.keys)
        return reference.varlen_attention(query, key, value, cu_seq_q, cu_seqlens_k=cu_seq_k)

    def late(*args, enable_gqa=False, **kwargs):
        assert enable_gqa
        return early(*args, **kwargs)

    for function in (early, late):
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=function))
        assert error(attention_providers.varlen_attn_provider(job(pack)), job(pack)) < 1e-5

    def cudnn(q, k, v, bias, cu_q, cu_k, max_q, max_k, lse, dropout, causal, debug):
        assert bias is None and lse and not (dropout or causal or debug)
        return early(q, k, v, cu_q, cu_k, max_q, max_k), None

    monkeypatch.setattr(torch.ops.aten, "_cudnn_attention_forward", cudnn)
    assert error(attention_providers.cudnn_varlen_provider(job(pack)), job(pack)) < 1e-5


@pytest.mark.parametrize("pack", PACKS, ids=lambda pack: pack.name)
def test_flex(monkeypatch, pack):
    monkeypatch.setattr(attention_providers, "compiled", lambda function: function)  # eager is the same, on small masks
    attention_providers._compiled_flex.cache_clear()
    assert error(attention_providers.flex_provider(job(pack)), job(pack)) < 1e-5
    attention_providers._compiled_flex.cache_clear()


# ------------------------------------------------------------------------------------------------------- goals, GPU


def test_goals():
    def record(case, provider, ms, tera=1.1, longest=8192, **changes):
        values = {"case": case, "provider": provider, "median_ms": ms, "flops": tera * 1e12, "timing": "events"}
        return {**dict.fromkeys(runner.KEYS), **values, "counts": {"longest": longest}, **changes}

    long, short, plan = "fwd 1x8192 32/8 D128", "fwd 8x1024 32/8 D128", "plan 1x8192 32/8 D128"
    records = [
        record(long, "illada", 1.7), record(long, "sdpa cudnn", 1.75), record(long, "fa3", 1.8),
        record(long, "illada raw", 1.6), record(long, "fa3", 0.1, timing="graph"),
        record(short, "illada", 0.30, 0.137, 1024), record(short, "fa3", 0.33, 0.137, 1024),
        record("bwd 16x512 32/8 D128", "illada", 0.4, 0.172, 512), record("bwd 16x512 32/8 D128", "fa4", 0.8, 0.172, 512),
        record(plan, "illada", 0.01, flops=None), record("fwd alone", "illada", 1.0),
    ]  # fmt: skip
    assert [(goal.text, goal.met) for goal in attention.goals(records)] == [
        (f"{long}: 647 TFLOP/s (goal 640)", True),
        (f"{long}: 647 TFLOP/s, 1.03x the best peer, sdpa cudnn (goal 1x)", True),
        (f"{short}: 457 TFLOP/s, 1.10x the best peer, fa3 (goal 1.15x)", False),
        ("bwd 16x512 32/8 D128: 430 TFLOP/s, 2.00x the best peer, fa4 (goal 1.5x)", True),
    ]


def test_launches_are_counted_on_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(timing, "launches", lambda call: 3)
    assert attention.count(job(PACKS[1]), lambda: None) == {"sequences": 3, "longest": 9}
    on_gpu = SimpleNamespace(pack=PACKS[1], device=GPU)
    assert attention.count(on_gpu, lambda: None) == {"sequences": 3, "longest": 9, "launches": 3}
    monkeypatch.setattr(timing, "launches", lambda call: None)
    assert attention.count(on_gpu, lambda: None) == {"sequences": 3, "longest": 9}
