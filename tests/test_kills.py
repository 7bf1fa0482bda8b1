"""Commands that are killed, told to end, cut off from their readers, or out of disk: nothing lost, no litter."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from illada import cli
from illada.checkpoint import load_pretrained
from illada.data import TokenDataset
from illada.train import checkpoint

pytestmark = pytest.mark.slow


def start(*arguments, limit=None, **kwargs):
    code = "import resource, signal, sys\n"
    if limit is not None:
        code += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        code += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    code += "from illada.cli import main\nsys.exit(main(sys.argv[1:]))"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **kwargs}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], **streams)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    lines = [json.dumps({"text": f"one two three four {i} " * 60}) for i in range(300)]
    (root / "text.jsonl").write_text("\n".join(lines))
    (root / "run.toml").write_text(
        '[model]\npreset = "tiny"\nhidden_size = 32\nintermediate_size = 48\nnum_hidden_layers = 1\n'
        f'num_attention_heads = 4\n[data]\npath = "{root}/corpus"\nwindow = 32\n[train]\nout_dir = "{root}/run"\n'
        "steps = 4\nwindows_per_step = 4\nwindows_per_micro_batch = 4\nlog_every = 1\n[validation]\nwindows = 4\nstrata = 2\n"
    )
    assert cli.main(prepare(root)) == 0
    assert cli.main(["train", str(root / "run.toml")]) == 0
    assert cli.main(["convert", str(root / "run"), str(root / "copy")]) == 0
    return root


def prepare(root):
    source = f"jsonl:{root}/text.jsonl"
    return ["prepare", "--source", source, "--out", str(root / "corpus"), "--vocab-size", "300", "--overwrite"]


def commands(root):
    return {"prepare": prepare(root), "convert": ["convert", str(root / "run"), str(root / "copy"), "--overwrite"]}


def check(root, name):
    if name == "prepare":
        TokenDataset(root / "corpus", "train").windows([0], 32)
    else:
        load_pretrained(root / "copy")


def hidden(root):
    return [path.name for path in root.glob(".*")]


@pytest.mark.parametrize("name", ["prepare", "convert"])
def test_kills_of_writers(world, name):
    """The old folder or the new one is there, or comes back; what kills leave is gone after the next run."""
    chance, arguments = random.Random(0), commands(world)[name]
    began = time.monotonic()
    assert start(*arguments).wait() == 0
    seconds = time.monotonic() - began
    for number in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM):
        process = start(*arguments)
        time.sleep(seconds * (0.5 + 0.5 * chance.random()))
        process.send_signal(number)
        _, error = process.communicate()
        assert process.returncode in (0, -number, 128 + number) and "Traceback" not in error
        if not (world / ("corpus" if name == "prepare" else "copy")).exists():
            assert number == signal.SIGKILL
            continue
        check(world, name)
    assert start(*arguments).wait() == 0
    check(world, name)
    assert hidden(world) == []


@pytest.mark.parametrize("name", ["prepare", "convert"])
def test_full_disk_keeps_what_was_there(world, name):
    process = start(*commands(world)[name], limit=9000)
    _, error = process.communicate()
    assert process.returncode == 2 and "Traceback" not in error and error.startswith("illada: error: ")
    check(world, name)
    assert hidden(world) == []


def train(root, name, *settings, **kwargs):
    out = root / name
    process = start("train", root / "run.toml", "--train.steps=1000000", f"--train.out_dir={out}", *settings, **kwargs)
    return process, out / "checkpoints"


def read_until(process, begin):
    for line in process.stdout:
        if line.startswith(begin):
            return
    raise AssertionError(process.stderr.read())


def test_training_is_saved_when_its_terminal_or_reader_goes(world):
    process, folder = train(world, "hangup")
    read_until(process, "step      3")
    process.send_signal(signal.SIGHUP)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 129 and error == "illada: SIGHUP, saving\n" and checkpoint.newest(folder)
    process, folder = train(world, "head")
    read_until(process, "step      3")
    process.stdout.close()
    assert process.wait(timeout=60) == 141 and process.stderr.read() == "" and checkpoint.newest(folder)


def test_a_validation_is_stopped_and_made_up_for(world):
    process, folder = train(world, "validation", "--validation.every=3", "--validation.strata=10000000")
    read_until(process, "step      3")
    time.sleep(1)
    began = time.monotonic()
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143 and time.monotonic() - began < 20
    assert checkpoint.read_state(checkpoint.newest(folder))["step"] == 3
    resume = [
        "train",
        world / "run.toml",
        "--train.steps=4",
        f"--train.out_dir={folder.parent}",
        "--validation.every=3",
    ]
    assert start(*resume).wait(timeout=60) == 0
    records = [json.loads(line) for line in (folder.parent / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "validation"] == [3, 4]


def test_a_second_trainer_is_refused(world):
    first, folder = train(world, "two")
    read_until(first, "step      1")
    second, _ = train(world, "two")
    _, error = second.communicate(timeout=60)
    assert second.returncode == 2 and f"two is in use by another process (pid {first.pid} on " in error
    first.kill()
    first.communicate()
    resume = ["train", world / "run.toml", "--train.steps=4", f"--train.out_dir={folder.parent}"]
    assert start(*resume).wait(timeout=60) == 0
    assert hidden(folder.parent) == hidden(folder) == []


def test_a_reader_of_generated_text_goes(world):
    process = start("generate", world / "copy", "--prompt", "one two", "--gen-length", 8)
    process.stdout.close()
    assert process.wait(timeout=60) == 141 and "rror" not in process.stderr.read()


@pytest.mark.parametrize("number,status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_while_torch_is_imported(number, status, tmp_path):
    process = start("convert", tmp_path / "none", tmp_path / "x")
    deadline = time.monotonic() + 30
    while "libtorch" not in _maps(process.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in error


def _maps(pid):
    with open(f"/proc/{pid}/maps", encoding="utf-8") as file:
        return file.read()


def test_kills_of_an_evaluation(world):
    pytest.importorskip("lm_eval")
    tasks = ["prepare", "--out", str(world / "corpus"), "--tasks", "cloze", "--questions", "20", "--overwrite"]
    assert cli.main(tasks) == 0
    output = world / "result.json"
    arguments = ["eval", world / "copy", "--tasks", "cloze", "--include-path", world / "corpus" / "tasks",
                 "--output", output, "--resume"]  # fmt: skip
    process = start(*arguments, "--model-args", "chunk_size=1")
    deadline = time.monotonic() + 60
    while not os.path.exists(f"{output}.journal") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    done = start(*arguments, "--model-args", "chunk_size=1")
    _, error = done.communicate(timeout=120)
    assert done.returncode == 0, error
    assert "results" in json.loads(output.read_text())
    assert hidden(world) == [] and not list(world.glob("result.json.*"))
