"""Commands that are killed, told to end, cut off from their readers, or out of disk: nothing lost, no litter."""

import gc
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from strikes import spread, strike

from illada import cli, files
from illada.checkpoints.weights import load_pretrained
from illada.data.dataset import TokenDataset
from illada.train import state as train_state

pytestmark = pytest.mark.slow
HELPERS = str(Path(__file__).resolve().parents[1] / "helpers")


def start(*arguments, killed_at=None, **kwargs):
    """The command in a process of its own, which kills itself at the n-th event of `strike`."""
    code = "import os, signal, sys\nfrom illada.cli import main\n"
    if killed_at is not None:
        code += f"sys.path.insert(0, {HELPERS!r})\nimport strikes\n"
        code += "def kill():\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        code += f"with strikes.strike({str(killed_at[0])!r}, {killed_at[1]}, kill, {killed_at[2:]!r} or strikes._EVENTS):\n    "
    code += "sys.exit(main(sys.argv[1:]))"
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
    assert cli.main(["prepare", "--out", str(root / "corpus"), "--tasks", "cloze", "--questions", "20"]) == 0
    (root / "corpus" / "tasks").rename(root / "tasks")  # preparing the corpus again would remove it
    return root


def prepare(root):
    source = f"jsonl:{root}/text.jsonl"
    return ["prepare", "--source", source, "--out", str(root / "corpus"), "--vocab-size", "300", "--overwrite"]


COMMANDS = ["prepare", "convert", "generate", "eval"]


def command(root, name):
    """Return a command's arguments, and how the paths begin that it writes."""
    if name == "prepare":
        return prepare(root), root / ".corpus"
    if name == "convert":
        return ["convert", str(root / "run"), str(root / "copy"), "--overwrite"], root / ".copy"
    if name == "generate":
        options = ["--prompt", "one", "--gen-length", "8", "--block-length", "8", "--steps", "2", "--json"]
        return ["generate", str(root / "copy"), *options, "--output", str(root / "text.json")], root / ".text.json"
    pytest.importorskip("lm_eval")
    tasks = [
        "--tasks",
        "cloze",
        "--include-path",
        str(root / "tasks"),
        "--model-args",
        "chunk_size=1,llh=mc,mc_num=1",
        "--limit",
        "3",
    ]
    return ["eval", str(root / "copy"), *tasks, "--output", str(root / "result.json"), "--resume"], root / "result.json"


def check(root, name):
    """Check that what a command has written, or what was there before, is complete."""
    if name == "prepare":
        TokenDataset(root / "corpus", "train").windows([0], 32)
    elif name == "convert":
        load_pretrained(root / "copy")
    else:
        file = root / ("text.json" if name == "generate" else "result.json")
        assert json.loads(file.read_text())


def finish(root, name, capsys):
    """The next run goes through and leaves no litter."""
    gc.collect()  # a journal's lock goes with its model
    assert cli.main(command(root, name)[0]) == 0, capsys.readouterr().err
    check(root, name)
    assert hidden(root) == [] and not list(root.glob("*.journal*"))


def hidden(root):
    return [path.name for path in root.glob(".*")]


@pytest.mark.parametrize("name", COMMANDS)
def test_signals_at_any_moment_of_writing(world, name, capsys):
    """The old one or the new one is there, at once and complete."""
    arguments, begin = command(world, name)
    with strike(begin, 0, None) as events:
        finish(world, name, capsys)
    moments = spread(events.count, 4 if name == "prepare" else 9)
    if name == "eval":  # what is resumed has fewer of them, from one to the next
        moments = [(2, number) for _, number in moments[:3]]
    for at, number in moments:
        gc.collect()
        with strike(begin, at, lambda number=number: signal.raise_signal(number)):
            assert cli.main(arguments) == 128 + number, at
        assert "Traceback" not in capsys.readouterr().err
        check(world, name)
    finish(world, name, capsys)


@pytest.mark.parametrize("name", COMMANDS)
def test_full_disk_keeps_what_was_there(world, name, capsys):
    finish(world, name, capsys)
    arguments, begin = command(world, name)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for at in (1, 2):
        gc.collect()
        try:
            with strike(begin, at, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))):
                assert cli.main(arguments) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        error = capsys.readouterr().err
        assert "illada: error: " in error and str(begin.name).lstrip(".") in error and "Traceback" not in error
        check(world, name)
        gc.collect()
        assert hidden(world) == []
    finish(world, name, capsys)


@pytest.mark.parametrize(
    "name, where",
    [("prepare", (5,)), ("prepare", (1, "os.rename")), ("convert", (5,)), ("convert", (1, "os.rename")),
     ("generate", (1, "os.rename")), ("eval", (5,))],
)  # fmt: skip
def test_kills_while_writing(world, name, where, capsys):
    """Whatever is left of a kill, also between the two renames, is gone after the next run, and nothing is lost."""
    arguments, begin = command(world, name)
    process = start(*arguments, killed_at=(begin, *where))
    _, error = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, error
    assert hidden(world)
    if name in ("prepare", "convert"):
        files.recover(world / ("corpus" if name == "prepare" else "copy"))
        check(world, name)
    finish(world, name, capsys)


def test_modes_of_all_that_is_written_follow_the_umask(world):
    """Of every command, which all write below this folder."""
    before = os.umask(0o027)
    try:
        out = world / "modes"
        arguments = {name: command(world, name)[0] for name in COMMANDS}
        arguments["prepare"][4] = str(out / "corpus")
        arguments["convert"][2] = str(out / "copy")
        for name, file in (("generate", "text.json"), ("eval", "result.json")):
            at = arguments[name].index("--output") + 1
            arguments[name][at] = str(out / file)
        arguments["eval"].append("--log-samples")
        tasks = ["prepare", "--out", str(out / "corpus"), "--tasks", "cloze", "--questions", "20"]
        training = ["train", str(world / "run.toml"), f"--train.out_dir={out}/run"]
        for one in (*arguments.values(), tasks, training):
            assert cli.main(one) == 0
    finally:
        os.umask(before)
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in out.rglob("*")}
    names = {path.name for path in found}
    assert {"model.safetensors", "optimizer.safetensors", "metrics.jsonl", "config.toml", "train-00000.bin", "cloze.jsonl",
            "tokenizer.json", "text.json", "result.json", "result.cloze.jsonl"} <= names, names  # fmt: skip
    wrong = {str(path): oct(mode) for path, mode in found.items() if mode != (0o750 if path.is_dir() else 0o640)}
    assert not wrong


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
    assert process.returncode == 129 and error == "illada: SIGHUP, saving\n" and train_state.newest(folder)
    process, folder = train(world, "head")
    read_until(process, "step      3")
    process.stdout.close()
    assert process.wait(timeout=60) == 141 and process.stderr.read() == "" and train_state.newest(folder)


def test_a_validation_is_stopped_and_made_up_for(world):
    process, folder = train(world, "validation", "--validation.every=3", "--validation.strata=10000000")
    read_until(process, "step      3")
    time.sleep(1)
    began = time.monotonic()
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143 and time.monotonic() - began < 20
    assert train_state.read_state(train_state.newest(folder))["step"] == 3
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
def test_signals_while_torch_is_imported(number, status):
    process = start("info")
    deadline = time.monotonic() + 30
    while "libtorch" not in _maps(process.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in error


def _maps(pid):
    with open(f"/proc/{pid}/maps", encoding="utf-8") as file:
        return file.read()
