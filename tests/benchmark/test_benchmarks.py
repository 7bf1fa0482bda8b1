"""The benchmarks on tiny inputs: the same code, the JSON that machines read, providers that agree."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if importlib.util.find_spec("benchmarks") is None:
    sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import ceiling, environment, published, remask, report, runner, score, timing, train_step  # noqa: E402
from benchmarks.weights import random_model  # noqa: E402
from illada.config import ModelConfig  # noqa: E402
from illada.model import MaskedDiffusionModel  # noqa: E402

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def record(**changes):
    """A record with every key."""
    values = {"bench": "remask", "case": "c", "provider": "illada", "median_ms": 2.0, "p20_ms": 1.0, "p80_ms": 3.0}
    return {**dict.fromkeys(runner.KEYS), **values, "device": "d", "timing": "events", **changes}


# ---------------------------------------------------------------------------------------------------------- command


def test_remask_records(tmp_path, monkeypatch):
    tiny = [remask.step_case(32, 501, t) for t in (0.0, 1.0)]
    monkeypatch.setattr(remask, "cases", lambda device: tiny)
    monkeypatch.setattr(ceiling, "COPY_BYTES", {"cpu": 1 << 16})
    out, plot = tmp_path / "o.jsonl", tmp_path / "o.png"
    options = ["--provider", "illada", "--provider", "published", "--json", str(out), "--plot", str(plot)]
    assert command.main(["remask", "--device", "cpu", *options, "--repeats", "3"]) == 0
    lines = report.read_json(out)
    assert [list(line) for line in lines] == [list(runner.KEYS)] * 5
    copy = lines.pop(0)
    assert (copy["bench"], copy["case"], copy["provider"]) == ("ceiling", "copy 0.0625 MiB", "copy")
    assert copy["bytes"] == 2 << 16 and copy["n"] == 3
    assert {line["provider"] for line in lines} == {"illada", "published"}
    for line in lines:
        assert line["p20_ms"] <= line["median_ms"] <= line["p80_ms"] and line["bytes"] == 32 * 501 * 2
        assert line["peak_memory_bytes"] is None and line["error"] < (1e-5 if line["provider"] == "illada" else 0.02)
        assert line["timing"] == "clock" and line["date"].endswith("+00:00")
        assert (
            line["n"] == (3 if line["provider"] == "illada" else 1)
            and line["threads"] == torch.get_num_threads()
            and line["load"] >= 0
        )
        assert line["cpu"] == line["device"] and line["gpu"] is line["driver"] is line["cuda"] is line["power"] is None
    assert plot.stat().st_size > 1000
    assert runner.ratio(lines, "32x501 T=0", "published") > 0
    assert runner.ratio(lines, "32x501 T=0", "compile") is None


def test_json_is_kept_when_a_later_case_fails(tmp_path, monkeypatch):
    def fail():
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(ceiling, "cases", lambda cases, device: [])
    broken = runner.Case("broken", lambda: [runner.Provider("illada", fail)])
    monkeypatch.setattr(remask, "cases", lambda device: [remask.step_case(8, 64, 0.0), broken])
    with pytest.raises(RuntimeError, match="the device is gone"):
        command.main(["remask", "--device", "cpu", "--provider", "illada", "--json", str(tmp_path / "o.jsonl")])
    assert [r["case"] for r in report.read_json(tmp_path / "o.jsonl")] == ["8x64 T=0"]


def test_check_fails_when_a_goal_is_missed(monkeypatch):
    monkeypatch.setattr(ceiling, "cases", lambda cases, device: [])
    monkeypatch.setattr(remask, "cases", lambda device: [remask.step_case(8, 64, 0.0)])
    monkeypatch.setattr(remask, "goals", lambda records: [runner.Goal("impossible", False)])
    options = ["--device", "cpu", "--provider", "illada", "--repeats", "1"]
    assert command.main(["remask", *options, "--check"]) == 1
    assert command.main(["remask", *options]) == 0


def test_list_names_the_cases(capsys):
    assert command.main(["remask", "--device", "cpu", "--only", "256x", "--list"]) == 0
    listed = capsys.readouterr().out.partition("cases of remask on cpu:\n")[2]
    assert listed.split() == ["256x126464", "T=0", "256x126464", "T=1"]


def test_bad_usage(capsys):
    with pytest.raises(SystemExit):
        command.main(["remask", "--device", "cpu", "--only", "nothing like it"])
    assert "no case of remask contains" in capsys.readouterr().err


def test_a_bench_of_one_device(monkeypatch, capsys):
    monkeypatch.setattr(score, "DEVICES", ("cpu",))
    with pytest.raises(SystemExit):
        command.main(["score", "--device", "cuda"])
    assert "this bench runs on cpu, not on cuda" in capsys.readouterr().err


@pytest.mark.parametrize("bench", ["train-step", "score"])
def test_no_gpu(bench, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        command.main([bench, "--device", "cuda"])
    assert "--device cuda: torch sees no GPU" in capsys.readouterr().err


def test_choose_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.choose_device(("cpu", "cuda")) == command.choose_device(("cpu",), "cpu") == CPU
    with pytest.raises(ValueError, match="torch sees no GPU"):
        command.choose_device(("cpu", "cuda"), "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("illada._native.has_cuda", lambda: False)
    assert command.choose_device(("cpu", "cuda")) == CPU
    with pytest.raises(ValueError, match="without CUDA kernels"):
        command.choose_device(("cpu", "cuda"), "cuda")
    monkeypatch.setattr("illada._native.has_cuda", lambda: True)
    assert command.choose_device(("cpu", "cuda")) == torch.device("cuda", 0)
    assert command.choose_device(("cpu", "cuda"), "cpu") == command.choose_device(("cpu",)) == CPU


# ------------------------------------------------------------------------------------------------- providers agree


@pytest.mark.parametrize("rows", [1, 12, 32])
def test_step_providers_find_the_same(rows):
    providers = remask.step_case(rows, 501, 0.0, torch.float32).make()
    assert [p.name for p in providers] == ["illada", "published", "compile"]
    for a, b in zip(providers[0].call(), providers[1].call(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rows", [1, 3, 32])
def test_sample_case(rows):
    (provider,) = remask.sample_case(rows, 501, 1.0).make()
    assert provider.error(provider.call()) < 1e-5


def test_linear_providers_agree():
    providers = {p.name: p for p in remask.linear_case(40, 64, 501, 0.0, torch.float32).make()}
    assert list(providers) == ["illada", "mm+illada", "mm+published", "mm+compile"]
    results = {name: providers[name].call() for name in ("illada", "mm+illada", "mm+published")}
    for name, result in results.items():
        assert torch.equal(result[0], results["illada"][0]), name
        assert providers[name].error(result) < 1e-4, name
    token, confidence = results["illada"]
    assert providers["illada"].error((token, 2 * confidence)) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("rule", ["quota", "threshold"])
@pytest.mark.parametrize("sequences,rows", [(1, 32), (5, 7)])
def test_commit_providers_agree(sequences, rows, rule):
    ours, theirs = remask.commit_case(sequences, rows, rule).make()
    assert ours.error(ours.call()) == theirs.error(theirs.call()) == 0
    committed = (theirs.call() != remask.MASK_ID).sum(1)
    assert (committed == remask.COMMIT).all() if rule == "quota" else (committed >= 1).all()


def test_published_commit():
    canvas = torch.tensor([[5, 5, 9, 5], [5, 5, 5, 9]])
    token = torch.tensor([10, 11, 12, 13, 14, 15, 16, 17])
    confidence = torch.tensor([0.2, 0.95, 0.99, 0.9, 0.1, 0.3, 0.2, 0.99])
    canvas2 = canvas.clone()
    published.commit(canvas, token, confidence, 5, quota=1)
    assert canvas.tolist() == [[5, 11, 9, 5], [5, 15, 5, 9]]
    published.commit(canvas2, token, confidence, 5, threshold=0.9)
    assert canvas2.tolist() == [[5, 11, 9, 13], [5, 15, 5, 9]]  # the second row's surest, though below the threshold


def test_published_linear_sample(generator):
    hidden, weight = torch.randn(3, 8, generator=generator), torch.randn(50, 8, generator=generator)
    token, confidence = published.linear_sample(hidden, weight, 0.0)
    best = (hidden @ weight.t()).softmax(-1).max(-1)
    assert torch.equal(token, best.indices) and torch.allclose(confidence, best.values)


def test_train_step_providers_agree():
    case = train_step.make_case(train_step.CPU_JOBS["tiny 2x64"])
    records = runner.run("train-step", [case], repeats=1)
    errors = {r["provider"]: r["error"] for r in records}
    assert errors["padded"] == 0 and errors["illada"] < 1e-5
    assert all(r["peak_memory_bytes"] >= 0 for r in records)
    assert [goal.text.split(":")[0] for goal in train_step.goals(records)] == ["tiny 2x64"] * 2


def tiny_model(seed=0, **options):
    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = ModelConfig.preset("tiny", num_key_value_heads=2, vocab_size=301, **sizes, **options)
    return random_model(config, CPU, torch.float32, seed)


@pytest.mark.parametrize("lengths", [[40], [9, 31]])
def test_train_step_recomputed(lengths):
    """The padded loop with and without padding, layers kept and recomputed."""
    model, batches = tiny_model(), []
    batch = train_step.one_window(lengths, model.config)
    error = train_step.GradientError(model, batch)
    names = [name for name, _ in model.named_parameters()]
    assert [names[i].split(".layers.1.")[0] for i in error.reference] == [n for n in names if "layers.1." not in n]
    forward = published.forward

    def seen(model, tokens, key_mask):
        batches.append((tokens.shape, key_mask is None))
        return forward(model, tokens, key_mask)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "forward", seen)
        for model.activation_checkpointing in (False, True):
            for bind in train_step.LOSSES.values():
                result = train_step.gradients(model, bind(model, batch))
                assert error(result) < 1e-5 and all(p.grad is None for p in model.parameters())
    assert batches == [((len(lengths), max(lengths)), len(lengths) == 1)] * 2
    result[-1] = result[-1] * 1.5
    assert error(result) > 1e-3


def test_train_step_window():
    config = ModelConfig.preset("illada_8b")
    (whole, split), tokens = (train_step.one_window(n, config) for n in ([8192], [5120, 3072])), 8192
    assert torch.equal(whole.tokens, split.tokens) and torch.equal(whole.rows, split.rows)
    assert whole.cu_seqlens.tolist() == [0, tokens] and split.cu_seqlens.tolist() == [0, 5120, tokens]
    assert split.position_ids[[5119, 5120, 8191]].tolist() == [5119, 0, 3071]
    assert len(whole.rows) / tokens == pytest.approx(0.5, abs=0.01)
    assert whole.token_weights[whole.rows.long()].unique().tolist() == pytest.approx([1 / 0.5005])


def test_train_step_flops_by_hand():
    config = ModelConfig.preset("illada_8b")
    batch = train_step.one_window([5120, 3072], config)
    layer = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336 + 2 * 4096
    pairs = 12 * 32 * 128 * (5120**2 + 3072**2)
    want = 6 * 8192 * (32 * layer + 4096) + 6 * len(batch.rows) * 4096 * 155136 + 32 * pairs
    assert train_step.flops(config, batch) == want
    untied = ModelConfig.preset("illada_8b", tie_word_embeddings=False)
    assert train_step.flops(untied, batch) == want


def test_random_model():
    model, again, other = tiny_model(), tiny_model(), tiny_model(1)
    drawn = MaskedDiffusionModel(model.config)
    assert [(n, p.shape) for n, p in model.named_parameters()] == [(n, p.shape) for n, p in drawn.named_parameters()]
    assert not list(model.buffers()) and model.head_weight.data_ptr() == model.embed_tokens.weight.data_ptr()
    state = torch.get_rng_state()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
        else:
            assert not torch.equal(parameter, other.get_parameter(name))
            assert float(parameter.detach().std()) == pytest.approx(model.config.initializer_range, rel=0.1), name
    tiny_model()
    assert torch.equal(state, torch.get_rng_state())
    biased = tiny_model(qkv_bias=True, tie_word_embeddings=False)
    assert not biased.layers[0].self_attn.qkv_proj.bias.any() and biased.lm_head.weight.std() > 0


def test_score_records_and_goals(tmp_path, monkeypatch):
    text = " ".join(f"word{i % 37} of {i}" for i in range(400))
    sources = [f'"""{text[i:]}"""\n' for i in range(9)] + ["def broken("]
    monkeypatch.setattr(score, "read_source", lambda source: iter(sources))
    score.passages.cache_clear()
    config = ModelConfig.preset("tiny", hidden_size=32, intermediate_size=48, num_attention_heads=4, vocab_size=300)
    monkeypatch.setattr(score, "cases", lambda device: [score.make_case("tiny", config, 2)])
    out = tmp_path / "o.jsonl"
    assert command.main(["score", "--device", "cpu", "--json", str(out), "--repeats", "1"]) == 0
    score.passages.cache_clear()
    lines = report.read_json(out)
    assert [line["provider"] for line in lines] == ["illada", "one by one"] and lines[0]["error"] < 1e-4
    assert lines[1]["error"] == 0
    slow, wrong = dict(lines[1], median_ms=6e4), dict(lines[0], median_ms=1e4, error=float("inf"))
    assert [(g.text, g.met) for g in score.goals([wrong, slow])] == [
        ("tiny 2 questions: 6.0x faster than one by one (goal 5x)", True),
        ("tiny 2 questions: DIFFERENT answers, scores within inf", False),
    ]
    on_gpu = [dict(r, case="4 layers 20 questions", timing="events") for r in (dict(lines[0], error=0.05), slow)]
    on_gpu[0]["median_ms"] = 2e4
    assert [(g.text, g.met) for g in score.goals(on_gpu)] == [
        ("4 layers 20 questions: 3.0x faster than one by one (goal 4x)", False),
        ("4 layers 20 questions: same answers, scores within 5.0e-02", True),
    ]


def test_score_difference():
    want = [1.0, 2, 3, 4]
    assert score.difference([1.0, 2, 3, 4.5], want, 0.1) == 0.5
    assert score.difference([1.0, 2, 5, 4], want, 0.1) == float("inf")
    assert score.difference([1.0, 2, 4.25, 4], want, 1.5) == 1.25  # another answer, as good as the true one
    assert score.difference([1.0, 2, float("nan"), 4], want, 1.5) == float("inf")
    assert score.difference([*want, 1.0, 0, 0, 0], [*want, 1.0, 3, 0, 0], 0.1) == float("inf")


def test_confidence_error_looks_at_every_row(generator):
    logits = torch.randn(300, 20, generator=generator)
    best = logits.double().softmax(-1).max(-1)
    confidence = best.values.clone()
    assert remask.confidence_error(logits, (best.indices, confidence)) < 1e-12
    confidence[299] *= 1.5
    assert remask.confidence_error(logits, (best.indices, confidence)) == pytest.approx(0.5)


def test_random_logits_are_the_same_every_time():
    a, b, c = (remask.random_logits(4, 100, torch.bfloat16, CPU, seed) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and 1.5 < a.float().std() < 2.5


# ----------------------------------------------------------------------------------------------- runner and timing


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


def test_too_little_memory_leaves_any_provider_out(capsys, monkeypatch):
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")

    providers = [runner.Provider(*p) for p in (("illada", fail), ("padded", fail), ("other", lambda: 1))]
    after = []
    records = runner.run("b", [runner.Case("c", lambda: providers)], repeats=1, after_case=after.extend)
    assert [r["provider"] for r in records] == ["other"]
    why = "OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB."
    assert {r["provider"]: r["error"] for r in after if r["median_ms"] is None} == {"illada": why, "padded": why}
    assert f"c: illada left out: {why}\n" in capsys.readouterr().err
    # nor a model, nor what it is compared with
    job = train_step.CPU_JOBS["tiny 2x64"]
    with monkeypatch.context() as patch:
        patch.setattr(train_step, "GradientError", lambda *arguments: fail())
        assert [(p.unavailable, p.error) for p in train_step.make_case(job).make()] == [(None, None)] * 2
    monkeypatch.setattr(train_step.Job, "model", lambda job: fail())
    assert [(p.name, p.unavailable) for p in train_step.make_case(job).make()] == [("illada", why), ("padded", why)]


def test_slow_providers_are_called_a_third_as_often():
    calls = []
    providers = [runner.Provider(name, lambda name=name: calls.append(name)) for name in ("illada", "peer")]
    runner.run("b", [runner.Case("c", lambda: providers, repeats=6, slow={"peer"})])
    assert calls.count("illada") == 1 + 6 and calls.count("peer") == 1 + 2


def test_ratio_by_timing():
    peer, peer_graph = record(provider="p", median_ms=6.0), record(provider="p", timing="graph", median_ms=2.5)
    records = [record(), record(timing="graph", median_ms=1.25), peer, peer_graph]
    assert runner.ratio(records, "c", "p") == 3 and runner.ratio(records, "c", "p", timing="graph") == 2


def test_rows_that_vary_or_were_timed_once_are_marked():
    steady = record(median_ms=10.0, p20_ms=9.5, p80_ms=11.4, n=7)
    assert runner.marks(steady) == "" == runner.marks({k: v for k, v in steady.items() if k != "n"})
    assert runner.marks(record(median_ms=10.0, p20_ms=9.0, p80_ms=11.5, n=7)) == "varies 25%"
    assert runner.marks(record(median_ms=10.0, p20_ms=10.0, p80_ms=10.0, n=1)) == "timed once"
    assert runner.marks(record(median_ms=None)) == ""


def test_what_nvidia_smi_says(monkeypatch):
    asked = []

    def said(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="570.1, 1755, 2619, 1980, 432.10, [N/A]\n")

    monkeypatch.setattr(subprocess, "run", said)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    about = environment.machine(GPU, "a GPU") | environment.state(GPU)
    assert asked[0][:2] == ["nvidia-smi", "--id=3"]
    assert about["driver"] == "570.1" and about["gpu"] == "a GPU" and about["cuda"] == torch.version.cuda
    assert about["clocks"] == {"sm": 1755, "memory": 2619, "sm max": 1980} and about["power"] == {"draw": 432.1}
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError("nvidia-smi")))
    about = environment.machine(GPU, "a GPU") | environment.state(GPU)
    assert about["driver"] is about["clocks"] is about["power"] is None and about["load"] >= 0
    assert set(about) == set(runner.KEYS[runner.KEYS.index("n") + 1 :])


def test_commit_from_the_environment(monkeypatch):
    def no_git(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    monkeypatch.delenv("ILLADA_COMMIT", raising=False)
    assert runner.commit() is None
    monkeypatch.setenv("ILLADA_COMMIT", "abc123")
    assert runner.commit() == "abc123"


def test_generator_is_seeded():
    assert torch.equal(*(torch.rand(3, generator=runner.generator(CPU, 4)) for _ in range(2)))


def test_clock():
    clock = timing.timer(CPU)
    readings = [clock.measure(lambda: sum(range(1000))) for _ in range(2)]
    assert clock.timing == "clock" and all(ms > 0 for ms in clock.milliseconds(readings))
    assert timing.device_name() and timing.input_sets(1, CPU) == 1


def test_input_sets_are_larger_than_the_cache(monkeypatch):
    properties = type("Properties", (), {"L2_cache_size": 50 << 20})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    gpu = torch.device("cuda", 0)
    assert timing.cold_bytes(gpu) == 256 << 20
    assert timing.input_sets(40 << 20, gpu) == 3
    assert timing.input_sets(1 << 30, gpu) == 2 and timing.input_sets(1, gpu) == 512


# ------------------------------------------------------------------------------------------------- cases and goals


def test_cases_of_a_gpu(monkeypatch):
    names = [case.name for case in remask.cases(torch.device("cuda", 0))]
    assert len(set(names)) == len(names)
    kinds = [name.split()[0] for name in names]
    assert {kind: kinds.count(kind) for kind in kinds} == {"sample": 12, "linear": 5, "commit": 8, "step": 12}
    assert {case.name for case in remask.cases()} == {
        f"{shape} T={t}" for shape in ("256x126464", "128x155136", "32x155136") for t in (0, 1)
    }


def test_cases_of_train_step_and_score():
    jobs = train_step.gpu_jobs(GPU)
    assert [case.name for case in train_step.cases(GPU)] == [job.name for job in jobs]
    assert [(job.name, job.config.num_hidden_layers, job.recompute) for job in jobs] == [
        ("8b 8192", 32, True), ("8b 5120+3072", 32, True), ("4 layers 8192", 4, True), ("8b 8192 kept", 32, False),
    ]  # fmt: skip
    assert all(job.device == GPU and job.config.head_size == 128 for job in jobs)
    assert [case.name for case in train_step.cases()] == ["small 8x1024"]
    assert [case.name for case in score.cases(GPU)] == ["small 20 questions", "4 layers 20 questions"]
    assert [case.name for case in score.cases()] == ["tiny 200 questions", "small 20 questions"]
    for timing_of, device in (("events", GPU), ("clock", CPU)):
        assert {case.name.rsplit(" ", 2)[0] for case in score.cases(device)} == set(score.GOALS[timing_of])


@pytest.mark.parametrize("device,peak", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L4", None),
])  # fmt: skip
def test_goals_of_a_train_step_on_a_gpu(device, peak):
    def step(case, ms, provider="illada"):
        return record(case=case, provider=provider, median_ms=ms, flops=4e14, device=device)

    records = [
        step("8b 8192", 1000.0), step("8b 8192", 1200.0, "padded"), step("8b 8192 kept", 500.0),
        step("4 layers 8192", 200.0), step("4 layers 8192", 180.0, "padded"),
    ]  # fmt: skip
    shares = {989: ("40%", "81%"), 756: ("53%", "106%"), 312: ("128%", "256%")}.get(peak)
    want = [("8b 8192: 1.20x as fast as padded (goal 1x)", True)]
    if shares:
        want.insert(0, (f"8b 8192: {shares[0]} of {peak} TFLOP/s (goal 50%)", peak != 989))
        want.append((f"8b 8192 kept: {shares[1]} of {peak} TFLOP/s (goal 50%)", True))
    want.append(("4 layers 8192: 0.90x as fast as padded (goal 1x)", False))
    assert [(goal.text, goal.met) for goal in train_step.goals(records)] == want


def test_goals_of_a_gpu():
    def graph(case, ms, provider="illada", size=None):
        return record(case=case, median_ms=ms, provider=provider, timing="graph", bytes=size)

    records = [
        record(case="copy", provider="copy", bytes=2e9, median_ms=1.0),
        graph("sample 1024x155136 T=0", 1.0, size=1.9e9), graph("sample 4096x155136 T=0", 1.0, size=1.7e9),
        graph("sample 128x155136 T=0", 1.0, size=1e9),
        graph("step 128x155136 T=0", 0.020), graph("step 128x155136 T=1", 0.030),
        graph("linear 128x4096x155136 T=1", 0.440), graph("linear 256x4096x155136 T=1", 0.9),
        graph("linear 128x4096x155136 T=1", 0.7, provider="mm+illada"),
        record(case="step 1024x155136 T=1", median_ms=1.0),
        record(case="step 1024x155136 T=1", provider="published", median_ms=40.0),
        record(case="step 1024x155136 T=1", provider="compile", median_ms=2.0),
    ]  # fmt: skip
    assert [(goal.text, goal.met) for goal in remask.goals(records)] == [
        ("sample 1024x155136 T=0: 95% of copy bandwidth (goal 90%)", True),
        ("sample 4096x155136 T=0: 85% of copy bandwidth (goal 90%)", False),
        ("step 128x155136 T=0: 20.0 us (goal 25 us)", True),
        ("step 128x155136 T=1: 30.0 us (goal 25 us)", False),
        ("linear 128x4096x155136 T=1: 440 us (goal 450 us)", True),
        ("step 1024x155136 T=1: 40.0x faster than published (goal 30x)", True),
        ("step 1024x155136 T=1: 2.0x faster than compile (goal 3x)", False),
    ]


def test_goals_of_a_cpu():
    case = "256x126464 T=0"
    records = [
        record(case=case, provider=p, median_ms=ms, timing="clock") for p, ms in (("illada", 1.0), ("published", 9.0))
    ]
    assert [(goal.text, goal.met) for goal in remask.goals(records)] == [
        (f"{case}: 9.0x faster than published (goal 8x)", True)
    ]


# ----------------------------------------------------------------------------------------------------------- report


def test_table_and_markdown(capsys):
    records = [
        record(bytes=1e6, flops=4e6, peak_memory_bytes=3 << 20, error=0.5),
        record(timing="graph"), record(provider="peer", median_ms=5.0),
        record(case="copy", provider="copy", bytes=2e6, median_ms=1.0),
    ]  # fmt: skip
    report.print_table(records)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "d" and len({len(line) for line in lines[1:]}) == 1
    for cell in ("2.0000", "100% ", "0.5 ", "25%", "3.0", "5.0e-01", "1.00x", "varies 100%"):
        assert cell in lines[3], cell
    assert "2.50x" in lines[5] and "matmul" not in lines[1]  # columns that say nothing are left out
    table = report.markdown(records).splitlines()
    assert len(table) == 2 + len(records) and len({line.count("|") for line in table}) == 1
    assert report.markdown([]) == ""
    report.print_table([])
    assert "nothing ran" in capsys.readouterr().out
