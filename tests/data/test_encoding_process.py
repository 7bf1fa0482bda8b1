"""Encoding in several processes: in order, the same tokens, and errors that say what happened."""

import os
import signal

import numpy as np
import pytest

from illada.data import encoding_process
from illada.data.corpus import prepare
from illada.data.encoding import TextEncoder
from illada.data.encoding_process import EncoderProcesses, processes_for
from illada.text.training import train_tokenizer

TEXTS = [f"def function_{i}(x): return 'ünïcode <[MASK]>' * {i}\n" * (i % 5) for i in range(40)]


@pytest.fixture(scope="module")
def encoder():
    tokenizer = train_tokenizer(TEXTS, 320)
    tokenizer.encode_special_tokens = True
    return TextEncoder(tokenizer, {2: "<[end▁of▁sentence]>", 5: "<[MASK]>"}, "uint16")


def batches():
    return [(TEXTS[i : i + 3], i) for i in range(0, len(TEXTS), 3)] + [(["x" * 300_000] * 4, -1), ([""], -2)]


@pytest.mark.parametrize("count", [1, 3])
def test_batches_come_in_order_with_the_same_tokens(encoder, count):
    with EncoderProcesses(encoder, count) as processes:
        found = list(processes.encode_batches(batches()))
    for (rest, arrays), (expected, wanted) in zip(found, encoder.encode_batches(batches()), strict=True):
        assert rest == expected and all(map(np.array_equal, arrays, wanted))
    assert all(process.returncode is not None for process in processes._processes)


def test_a_text_that_cannot_be_encoded(encoder):
    bad = TextEncoder(encoder.tokenizer, {encoder.tokenizer.token_to_id("f"): "f"}, "uint16")
    with EncoderProcesses(bad, 2) as processes, pytest.raises(ValueError, match="makes its control token 'f'"):
        list(processes.encode_batches([(["f"], 0), (["x"], 1)]))


def test_a_process_that_ends(encoder):
    with EncoderProcesses(encoder, 2) as processes:
        os.kill(processes._processes[0].pid, signal.SIGKILL)
        processes._processes[0].wait()
        with pytest.raises(RuntimeError, match=r"a process that encodes text has ended \(SIGKILL\)"):
            list(processes.encode_batches(batches()))
    assert all(process.returncode is not None for process in processes._processes)


def test_how_many(encoder, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64), raising=False)
    assert processes_for(encoder, 1 << 30) == 4 and processes_for(encoder, 1 << 20) == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(3), raising=False)
    assert processes_for(encoder, 1 << 30) == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(1), raising=False)
    assert processes_for(encoder, 1 << 30) == 0


def test_a_corpus_does_not_depend_on_processes(tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{i:02}.txt").write_text(text or "x")
    for least in (1 << 30, 1):
        monkeypatch.setattr(encoding_process, "_LEAST", least)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(2), raising=False)
        prepare(f"dir:{tmp_path}/texts", tmp_path / "out" / str(least), vocab_size=300, validation_fraction=0.3)
    one, two = (
        {file.name: file.read_bytes() for file in (tmp_path / "out" / name).iterdir()} for name in (str(1 << 30), "1")
    )
    assert one == two and "train-00000.bin" in one


def test_what_start_up_files_print_is_no_answer(encoder, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("print('Welcome')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with EncoderProcesses(encoder, 1) as processes:
        found = list(processes.encode_batches(batches()))
    assert len(found) == len(batches())


def test_a_process_that_answers_nonsense(encoder, monkeypatch):
    with EncoderProcesses(encoder, 1) as processes:
        monkeypatch.setattr(encoding_process.pickle, "load", _unreadable)
        with pytest.raises(RuntimeError, match=r"has ended \(SIGKILL\)"):
            list(processes.encode_batches(batches()))


def _unreadable(stream):
    raise encoding_process.pickle.UnpicklingError("nonsense")
