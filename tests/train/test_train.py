"""The trainer: learning, exact resumption, signals, kills, full disks, and configurations that cannot be."""

import dataclasses
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import change, metrics, same, settings, weights

from illada import cli
from illada.checkpoints.weights import load_pretrained
from illada.config import ModelConfig
from illada.data.corpus import prepare
from illada.data.dataset import TokenDataset
from illada.files import write_text
from illada.ops import capabilities
from illada.train import evaluate, load_config, loop, train
from illada.train import state as train_state
from illada.train.config import TrainConfig
from illada.train.log import Log
from illada.train.pace import Pace


def test_learns_and_leaves_its_files(config, corpus, capsys):
    config = change(config, train={"steps": 60, "log_every": 10, "save_every": 25, "keep_last": 2})
    result = train(config, progress=False)
    assert result.finished and result.step == 60 and result.tokens_seen == 60 * 4 * 32
    bounds = [r["bound"] for r in metrics(config) if r["kind"] == "validation"]
    assert len(bounds) == 20 and bounds[-1] < bounds[0] - 0.5 and bounds[-1] < 0.6 * math.log(300)
    out = result.checkpoint.parent.parent
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-000050", "step-000060"]
    assert result.plot == out / "loss.png" and result.plot.stat().st_size > 1000
    records = metrics(config)
    assert [r["step"] for r in records if r["kind"] == "train"] == [10, 20, 30, 40, 50, 60]
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_second", "tokens_seen", "seconds"} <= set(records[-2])
    assert records[-1]["bound"] == result.validation_bound
    printed = capsys.readouterr().out
    assert "unigram entropy" in printed and "step     60/60" in printed and str(result.checkpoint) in printed
    # The checkpoint is a model that anyone can load, with its tokenizer.
    model = load_pretrained(result.checkpoint)
    assert evaluate(model, TokenDataset(corpus, "validation"), config) == result.validation_bound
    assert load_config(out / "config.toml") == config


@pytest.mark.parametrize("busy", [True, False], ids=["busy", "quiet"])
def test_a_shared_cpu_is_said_once(config, capsys, monkeypatch, busy):
    """By steps that vary; what training itself takes is made even, for the tests' own machine may be busy."""
    config = change(config, train={"steps": 44, "log_every": 22, "save_every": 100}, validation={"every": 22})
    clock, steps = iter(range(10**9)), []
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(clock) * 0.01 + sum(steps))
    validated = []
    train(
        config,
        should_stop=lambda: steps.append(0.3 if busy and len(steps) % 4 == 0 else 0) or False,
        on_validation=lambda step, model: validated.append((step, model.config.hidden_size)),
        progress=False,
    )
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step times vary")]
    assert len(said) == busy and all("load " in line and f"{torch.get_num_threads()} threads" in line for line in said)
    assert validated == [(22, 32), (44, 32)]


@pytest.mark.parametrize(
    ("policy", "threads", "advice"),
    [("", 2, "OMP_WAIT_POLICY=passive"), ("PASSIVE", 4, "OMP_NUM_THREADS=2"), ("", 1, None)],
)
def test_what_helps_on_a_shared_cpu(monkeypatch, policy, threads, advice):
    monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    pace = Pace()
    for seconds in (0.1, 0.3) * 10:
        pace.add(seconds)
    said = pace.hint(threads)
    assert said is not None and (advice in said if advice else "OMP" not in said)


def test_gradient_that_is_not_finite_stops_the_run(config, tmp_path):
    train(change(config, train={"steps": 2}), progress=False)
    hot = change(config, optimizer={"learning_rate": 1e30, "clip_norm": 0.0})
    with pytest.raises(
        ArithmeticError, match=r"gradient norm is (nan|inf) at step .* the last checkpoint is .*step-0000"
    ):
        train(hot, progress=False)
    newest = train_state.newest(tmp_path / "run" / "checkpoints")
    assert all(w.isfinite().all() for w in weights(newest).values())


@pytest.mark.parametrize("stop_after", [1, 4, 7])  # micro-batches; a step is two: mid-accumulation and between steps
def test_stopped_and_resumed_is_bit_exact(config, corpus, tmp_path, stop_after):
    config = change(config, train={"log_every": 2})  # a line averages over the interruption, too
    whole = train(config, progress=False)
    interrupted = change(config, train={"out_dir": str(tmp_path / "other")})
    seen = []

    def stop():
        seen.append(1)
        return len(seen) == stop_after

    first = train(interrupted, should_stop=stop, progress=False)
    assert not first.finished and first.step == (stop_after - 1) // 2 and first.validation_bound is None
    second = train(interrupted, progress=False)
    assert second.finished and second.step == 6
    assert same(weights(whole.checkpoint), weights(second.checkpoint))
    keep = ("kind", "step", "loss", "grad_norm", "bound", "learning_rate", "tokens_seen")
    trimmed = [[{k: r[k] for k in keep if k in r} for r in metrics(c)] for c in (config, interrupted)]
    assert trimmed[0] == trimmed[1]
    assert second.validation_bound == whole.validation_bound


def test_small_files_are_replaced_whole(tmp_path, monkeypatch):
    file = tmp_path / "config.toml"
    write_text(file, "old")
    monkeypatch.setattr("os.replace", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_text(file, "new")
    assert file.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["config.toml"]


def test_resuming_from_a_path_cuts_the_log(config, tmp_path):
    train(change(config, train={"steps": 4}), progress=False)
    run = tmp_path / "run"
    with pytest.raises(FileExistsError, match="step-000004 is newer than .*step-000002"):
        train(config, resume=str(run / "checkpoints" / "step-000002"), progress=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 5, "loss": 1.0}\n{"kind": "tr')  # of a lost run, and one cut short
    result = train(config, progress=False)
    assert result.step == 6
    assert [r["step"] for r in metrics(config) if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    again = train(config, progress=False)  # finished already: nothing to do, but the bound is told
    assert again.step == 6 and again.validation_bound == result.validation_bound
    with pytest.raises(FileExistsError, match="exists; resume it"):
        train(config, resume="never", progress=False)


@pytest.mark.parametrize(
    "line", ['"step"', '{"step": 1}', '{"kind": "train", "step": 1.5}', '{"kind": "train", "step": 1}']
)
def test_a_log_of_something_else_is_refused(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"kind": "train", "step": 1, "loss": 2.0}}\n{line}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2"):
        Log(tmp_path, step=1, steps=2, progress=False)
    assert line in (tmp_path / "metrics.jsonl").read_text()


def test_accumulation_does_not_change_the_gradient(config, tmp_path):
    one = train(change(config, train={"steps": 3}), progress=False)
    other = change(config, train={"steps": 3, "windows_per_micro_batch": 4, "out_dir": str(tmp_path / "b")})
    two = weights(train(other, progress=False).checkpoint)
    for name, tensor in weights(one.checkpoint).items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"activation_checkpointing": True}])
def test_options_of_the_computation(config, options):
    result = train(change(config, train={**options, "steps": 2}), progress=False)
    assert result.finished and all(w.dtype == torch.float32 for w in weights(result.checkpoint).values())


def run_cli(*arguments, **kwargs):
    return subprocess.Popen([sys.executable, "-m", "illada", "train", *arguments], text=True, **kwargs)


@pytest.fixture
def toml(config, tmp_path):
    file = tmp_path / "config.toml"
    file.write_text(config.to_toml())
    return file


@pytest.mark.parametrize("number,status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_exit(toml, tmp_path, number, status):
    process = run_cli(str(toml), "--train.steps=100000", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for line in process.stdout:
        if line.startswith("step      3"):
            process.send_signal(number)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert "run the same command again to go on" in out and "Traceback" not in err
    newest = train_state.newest(tmp_path / "run" / "checkpoints")
    assert train_state.read_state(newest)["step"] >= 3


def test_a_kill_while_an_old_checkpoint_is_removed(config, tmp_path, monkeypatch):
    def killed(path, ignore_errors=False):
        (path / "trainer.json").unlink()  # one file is gone, then the process is
        raise KeyboardInterrupt

    folder = tmp_path / "run" / "checkpoints"
    keep_one = change(config, train={"keep_last": 1, "save_every": 1, "steps": 3})
    with monkeypatch.context() as patch:
        patch.setattr("illada.files.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            train(keep_one, progress=False)
    assert [train_state.read_state(path)["step"] for path in train_state.all_checkpoints(folder)] == [2]
    assert list(folder.glob(".*"))  # what is left of step 1, hidden
    assert train(keep_one, progress=False).step == 3
    assert [path.name for path in folder.iterdir()] == ["step-000003"]


@pytest.mark.slow
def test_kills_at_any_moment_leave_readable_checkpoints(toml, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    chance = random.Random(0)
    steps = []
    for _ in range(8):
        process = run_cli(
            str(toml), "--train.steps=100000", "--train.save_every=1", "--train.keep_last=2", "--validation.every=9999",
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for line in process.stdout:
            if line.startswith("step"):
                break
        time.sleep(chance.random() * 0.5)
        process.kill()
        process.communicate()
        found = train_state.all_checkpoints(folder)
        assert found
        for path in found:
            state = train_state.read_state(path)
            config = TrainConfig.from_dict(state["config"])
            from illada.model import MaskedDiffusionModel
            from illada.train.loop import _optimizer

            model = MaskedDiffusionModel(load_pretrained(path).config)
            train_state.restore(path, model, _optimizer(model, config))
        steps.append(train_state.read_state(found[-1])["step"])
    assert steps == sorted(steps) and steps[-1] > steps[0]
    train(load_config(toml, [f"--train.steps={steps[-1] + 1}"]), progress=False)
    assert not list(folder.glob(".*"))  # what the kills left hidden is gone


def test_full_disk_keeps_the_last_checkpoint(toml, tmp_path):
    code = (
        "import resource, signal, sys; from illada.train import *\n"
        f"config = load_config({str(toml)!r}, ['--train.steps=2']); train(config, progress=False)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        f"train(load_config({str(toml)!r}, ['--train.steps=4']), progress=False)"
    )
    assert resource.RLIMIT_FSIZE is not None
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    folder = tmp_path / "run" / "checkpoints"
    assert "could not save" in done.stderr and "the last complete checkpoint is" in done.stderr
    assert [p.name for p in folder.iterdir()] == ["step-000002"]
    load_pretrained(folder / "step-000002")


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "optimizer.safetensors"])
def test_done_means_that_what_was_saved_loads(toml, tmp_path, monkeypatch, capfd, name):
    """As a command loads it; tokenizers that training itself never reads included."""
    save = train_state.save

    def saves_badly(*arguments, **more):
        path = save(*arguments, **more)
        if name == "model.safetensors":  # loads, but is of another step
            tensors = load_file(path / name)
            save_file({key: value + 1 for key, value in tensors.items()}, path / name)
        else:
            (path / name).write_bytes((path / name).read_bytes()[:-40])
        return path

    monkeypatch.setattr(loop.train_state, "save", saves_badly)
    assert cli.main(["train", str(toml), "--train.steps=2"]) == 1
    out, error = capfd.readouterr()
    assert "step-000002 was saved, but cannot be loaded: " in error and "Traceback" not in error
    assert "done" not in out.splitlines()


def test_other_runs_are_not_resumed(config, corpus, tmp_path):
    result = train(change(config, train={"steps": 2}), progress=False)
    for sections, match in (
        ({"train": {"seed": 1}}, "belongs to another run: train.seed was 0, is 1"),
        ({"data": {"window": 16}}, "data.window was 32, is 16"),
        ({"diffusion": {"eps": 0.01}}, "diffusion.eps was 0.001, is 0.01"),
    ):
        with pytest.raises(ValueError, match=match):
            train(change(config, **sections), progress=False)
    # Settings that may change: the length of the run, the optimizer, the log.
    assert train(change(config, train={"steps": 3}, optimizer={"learning_rate": 1e-3}), progress=False).step == 3
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(30):
        (texts / f"{i}.txt").write_text(f"other words {i} " * 30)
    prepare(f"dir:{texts}", tmp_path / "foreign", vocab_size=300, validation_fraction=0.3)
    with pytest.raises(ValueError, match="was made with another tokenizer than the checkpoint"):
        train(change(config, data={"path": str(tmp_path / "foreign")}), progress=False)
    assert result.checkpoint.exists()


def test_a_checkpoint_from_before_an_option_is_resumed(config):
    """As if the option had had its default; another value is another run."""
    path = train(change(config, train={"steps": 2}), progress=False).checkpoint / "trainer.json"
    state = json.loads(path.read_text())
    del state["config"]["diffusion"]["t_limit"], state["config"]["diffusion"]["t_limit_windows"]
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="diffusion.t_limit was 1.0, is 0.5; diffusion.t_limit_windows was 0, is 8"):
        train(change(config, diffusion={"t_limit": 0.5, "t_limit_windows": 8}), progress=False)
    assert train(change(config, train={"steps": 3}), progress=False).step == 3


def test_damaged_checkpoints(config):
    result = train(change(config, train={"steps": 2}), progress=False)
    for name, match in (
        ("optimizer.safetensors", "optimizer.safetensors is damaged or missing"),
        ("model.safetensors", "model.safetensors is damaged"),
        ("trainer.json", "trainer.json is damaged or from something else"),
    ):
        file = result.checkpoint / name
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=match):
            train(config, progress=False)
        file.write_bytes(content)
    # Moments of three projections, as they were before there was one, are another optimizer's.
    file, name = result.checkpoint / "optimizer.safetensors", "layers.0.self_attn.qkv_proj.weight"
    moments = load_file(file)
    save_file({key.replace("qkv_proj", "q_proj"): tensor for key, tensor in moments.items()}, file)
    with pytest.raises(ValueError, match=f"optimizer.safetensors lacks the state of {name}"):
        train(config, progress=False)
    with pytest.raises(FileNotFoundError, match=r"not a training checkpoint \(no trainer.json\)"):
        train(config, resume=str(result.checkpoint.parent), progress=False)


def test_checkpoints_from_a_stranger(config):
    """Moments that AdamW would read beyond their end or train on, and numbers that are none: refused, by name."""
    result = train(change(config, train={"steps": 2}), progress=False)
    file, name = result.checkpoint / "optimizer.safetensors", "layers.0.self_attn.qkv_proj.weight"
    moments = load_file(file)
    for key, make, match in (
        ("exp_avg", lambda x: x.flatten()[:1].clone(), r"exp_avg is torch.float32 \[1\], expected torch.float32 \["),
        ("exp_avg_sq", lambda x: x.T.contiguous(), r"exp_avg_sq is torch.float32"),
        ("exp_avg", lambda x: x.double(), r"exp_avg is torch.float64"),
        ("exp_avg", lambda x: x.fill_(math.nan), r"exp_avg must be finite, got nan"),
        ("exp_avg_sq", lambda x: x - 1, "exp_avg_sq must be finite and not negative"),
        ("step", lambda x: x.reshape(1), r"step is torch.float32 \[1\], expected torch.float32 \[\]"),
    ):
        wrong = make(moments[f"{name}/{key}"].clone())
        save_file({**moments, f"{name}/{key}": wrong}, file)
        with pytest.raises(ValueError, match=f"optimizer.safetensors: {name}/{match}"):
            train(config, progress=False)
    save_file(moments, file)
    file = result.checkpoint / "trainer.json"
    state = json.loads(file.read_text())
    for key, value, match in (
        ("step", 1e308, "step must be int, got 1e"),
        ("step", 10**400, "step must be at most"),
        ("step", "2", "step must be int, got '2'"),
        ("tokens_seen", -1, "tokens_seen must not be negative"),
        ("unlogged_losses", [math.nan], r"unlogged_losses\[0\] must be finite"),
        ("config", {"model": 3}, r"config\.model must be an object with keys"),
        ("config", None, "config must be an object with keys"),
    ):
        file.write_text(json.dumps({**state, key: value}))
        with pytest.raises(ValueError, match=f"trainer.json is damaged or from something else: .*{match}"):
            train(config, progress=False)
    file.write_text(json.dumps(state))
    assert train(change(config, train={"steps": 3}), progress=False).step == 3


def test_corpora_that_do_not_fit(config):
    for sections, error, match in (
        (
            {"data": {"path": "/nonexistent"}},
            FileNotFoundError,
            "make one with `illada prepare --source SOURCE --out /nonexistent`",
        ),
        ({"data": {"window": 10**6}}, ValueError, "less than one window of 1000000"),
    ):
        with pytest.raises(error, match=match):
            train(change(config, **sections), progress=False)
    with pytest.raises(ValueError, match="longer than model.max_position_embeddings"):
        train(change(config, data={"window": 600}), progress=False)
    small = dataclasses.replace(config, model={**config.model, "vocab_size": 100})
    with pytest.raises(ValueError, match="model.vocab_size is 100, the corpus needs 300"):
        train(small, progress=False)
    other = dataclasses.replace(config, model={**config.model, "mask_token_id": 4})
    with pytest.raises(ValueError, match="model.mask_token_id is 4, the corpus has 5"):
        train(other, progress=False)


def test_devices(config, monkeypatch):
    def device_of(device, dtype, head_dim, heads=2):
        model = ModelConfig.preset("tiny", head_dim=head_dim, num_attention_heads=heads, num_key_value_heads=1)
        return loop._device(dataclasses.replace(config.train, device=device, dtype=dtype), model).type

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("auto", "bfloat16", 64) == "cpu"
    with pytest.raises(ValueError, match="train.device is cuda, but torch sees no CUDA device"):
        train(change(config, train={"device": "cuda"}), progress=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(capabilities, "has_cuda", lambda: False)
    assert device_of("auto", "bfloat16", 64) == "cpu"
    with pytest.raises(ValueError, match="but illada was built without CUDA kernels"):
        device_of("cuda", "bfloat16", 64)
    monkeypatch.setattr(capabilities, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    assert device_of("auto", "bfloat16", 64) == "cpu"
    with pytest.raises(ValueError, match="the kernels need compute capability 8.0, and Tesla T4 has less"):
        device_of("cuda", "bfloat16", 64)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(
        capabilities,
        "_attention_refusal",
        lambda heads, kv_heads, head_dim, _: None if head_dim >= 64 and heads <= 64 * kv_heads else "no kernel",
    )
    assert device_of("cuda", "bfloat16", 128) == device_of("auto", "bfloat16", 64) == "cuda"
    assert (
        device_of("cpu", "bfloat16", 64)
        == device_of("auto", "float32", 64)
        == device_of("auto", "bfloat16", 8)
        == device_of("auto", "bfloat16", 64, heads=128)
        == "cpu"
    )
    for dtype, head_dim, why in (
        ("float32", 64, "takes bfloat16 or float16, got float32"),
        ("bfloat16", 8, "no kernel"),
    ):
        with pytest.raises(ValueError, match=f"train.device is cuda, but .*{why}"):
            device_of("cuda", dtype, head_dim)


def test_more_than_one_process_is_refused(config, monkeypatch):
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="runs in one process"):
        train(config, progress=False)


def test_configuration_errors(tmp_path):
    (tmp_path / "bad.toml").write_text("[train\n")
    with pytest.raises(ValueError, match="is not TOML"):
        load_config(tmp_path / "bad.toml")
    with pytest.raises(FileNotFoundError, match="no configuration file at"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text(f"[train]\nsteps = {'1' * 5000}")
    with pytest.raises(ValueError, match="bad.toml is not TOML: Exceeds the limit"):
        load_config(tmp_path / "bad.toml")
    (tmp_path / "bad.toml").write_text("train = 3")
    with pytest.raises(ValueError, match="train must be a section with keys, got 3"):
        load_config(tmp_path / "bad.toml", ["--train.steps=3"])
    for override, match in (
        ("--train.stepz=3", "unknown key train.stepz; there are train.out_dir"),
        ("--trainer.steps=3", "unknown section 'trainer'; there are"),
        ("--train.steps=many", "train.steps must be int, got 'many'"),
        ("--train.compile=1", "train.compile must be bool, got 1"),
        ("--train.steps", "an override looks like --section.key=value"),
        (f"--train.steps={'1' * 5000}", "train.steps must be int, got '111"),
        ("--train.steps=0", "train.steps must be positive, got 0"),
        ("--train.windows_per_micro_batch=5", r"must be a multiple of train.windows_per_micro_batch \(5\)"),
        ("--train.dtype=float16", "train.dtype must be float32 or bfloat16, got"),
        ("--schedule.warmup_steps=-1", "must not be negative"),
        ("--model.hidden=3", "unknown model options: hidden"),
        ("--model.preset=big", "model.preset must be one of"),
        ("--model.preset={a=1}", "model.preset must be one of"),
        (f"--model.preset={100 * '[{'}", "model.preset must be one of .{,160}$"),
        ("=" * 1000, "an override looks like --section.key=value, got .{80}$"),
        ("--diffusion.eps=2.0", "diffusion.eps must be below 0.5, got 2.0"),
    ):
        with pytest.raises(ValueError, match=match):
            load_config(None, [override])
    assert load_config(None, ["--optimizer.learning_rate=1"]).optimizer.learning_rate == 1.0
    config = load_config(None, ['--train.out_dir="a \\"b\\" c"', "--data.path=plain word"])
    (tmp_path / "written.toml").write_text(config.to_toml(commented=True))
    assert load_config(tmp_path / "written.toml") == config and config.data.path == "plain word"


@pytest.mark.parametrize("name", ["demo", "illada_8b"])
def test_shipped_configurations_load(name):
    from pathlib import Path

    config = load_config(Path(__file__).resolve().parents[2] / "configs" / f"{name}.toml")
    assert config.model["preset"] == ("tiny" if name == "demo" else "illada_8b")


@pytest.mark.parametrize("preset", ["llada_8b", "dream_7b"])
def test_other_layouts_are_trained_saved_and_resumed(preset, corpus, tmp_path):
    sizes = {"model.preset": f'"{preset}"', "model.num_key_value_heads": 2}
    for steps in (2, 4):
        options = settings(corpus, tmp_path / "run", **{**sizes, "train.steps": steps})
        result = train(load_config(None, options), progress=False)
    model = load_pretrained(result.checkpoint)
    assert model.config.model_type == preset.split("_")[0] and model.config.mask_token_id == 5
    assert model.config.eot_token_id is None  # LLaDA's own means another token in this corpus
