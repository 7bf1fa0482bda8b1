"""The data of training: weights of sources, and batches that a thread makes ahead."""

import itertools
import json
import threading
import time
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from illada.data.corpus import prepare
from illada.data.dataset import TokenDataset
from illada.diffusion import shares
from illada.train import load_config, loop, train
from illada.train.loop import micro_batches
from illada.train.prefetch import Prefetch


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for name, letters in (("few", "abc"), ("many", "xyz")):
        texts = [f"{letters} {i} " * (20 if name == "few" else 60) for i in range(40)]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    names = [f"jsonl:{folder}/{name}.jsonl" for name in ("few", "many")]
    prepare(names, folder / "c", vocab_size=300, validation_fraction=0.2, shard_bytes=1024)
    return folder / "c"


def settings(corpus, out, **more):
    values = {
        "model.preset": '"tiny"', "model.hidden_size": 32, "model.intermediate_size": 48, "model.num_hidden_layers": 1,
        "model.num_attention_heads": 4, "data.path": f'"{corpus}"', "data.window": 32, "train.out_dir": f'"{out}"',
        "train.steps": 4, "train.windows_per_step": 4, "train.windows_per_micro_batch": 2, "train.log_every": 1,
        "train.save_every": 2, "validation.every": 100, "validation.windows": 4, "validation.strata": 2, **more,
    }  # fmt: skip
    return [f"--{key}={value}" for key, value in values.items()]


def weighted(corpus, few, many=None):
    names = TokenDataset(corpus).sources
    given = {names[0]: few} | ({} if many is None else {names[1]: many})
    return {"data.weights": "{" + ", ".join(f'"{name}" = {weight}' for name, weight in given.items()) + "}"}


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "illada-prefetch"]


def test_weights_choose_sources(corpus, tmp_path):
    data = TokenDataset(corpus)
    few, many = data.windows_of_sources(32)
    windows = data.windows(np.arange(few + many), 32).astype(np.int64)
    of_few, of_many = ({row.tobytes() for row in rows} for rows in (windows[:few], windows[few:]))
    assert not of_few & of_many

    def share(**options):
        config = load_config(None, settings(corpus, tmp_path, **options))
        drawn = [batch.targets.view(-1, 32) for step in range(60) for batch in micro_batches(data, step, config, 5)]
        return np.mean([row.numpy().tobytes() in of_few for row in torch.cat(drawn)])

    assert share() == pytest.approx(few / (few + many), abs=0.05)
    assert share(**weighted(corpus, 3.0)) == pytest.approx(3 * few / (3 * few + many), abs=0.02)
    assert share(**weighted(corpus, 1.0, 0.0)) == 1
    assert share(**weighted(corpus, 0.0)) == 0


def test_equal_weights_change_nothing(corpus, tmp_path):
    data = TokenDataset(corpus)
    plain = load_config(None, settings(corpus, tmp_path))
    equal = load_config(None, settings(corpus, tmp_path, **weighted(corpus, 2.0, 2.0)))
    for step in range(30):
        for one, other in zip(micro_batches(data, step, plain, 5), micro_batches(data, step, equal, 5), strict=True):
            assert torch.equal(one.tokens, other.tokens) and torch.equal(one.cu_seqlens, other.cu_seqlens)


def test_weights_of_no_source_and_of_none(corpus, tmp_path):
    for weights, match in (
        ("{web = 2.0}", r"data.weights has 'web'; the sources of .* are jsonl:.*few.jsonl, jsonl:.*many.jsonl"),
        (weighted(corpus, 0, 0)["data.weights"], "data.weights leaves nothing of .*: no source has a weight above 0"),
    ):
        with pytest.raises(ValueError, match=match):
            train(load_config(None, settings(corpus, tmp_path / "run", **{"data.weights": weights})), progress=False)
    for weights, match in (
        ("{web = -1.0}", "data.weights.web must not be negative"),
        ("{web = inf}", "data.weights.web must be finite"),
        ("3", "data.weights must be an object"),
    ):
        with pytest.raises(ValueError, match=match):
            load_config(None, [f"--data.weights={weights}"])


def test_a_weighted_source_without_a_window(corpus, tmp_path):
    (tmp_path / "short.txt").write_text("abc 1 abc 2")
    (tmp_path / "long.txt").write_text("abc 1 " * 2000)
    names = [f"file:{tmp_path}/{name}.txt" for name in ("short", "long")]
    prepare(names, tmp_path / "c", tokenizer=corpus / "tokenizer.json", validation_fraction=0.2)
    weights = {"data.weights": f'{{"{names[0]}" = 3.0}}'}
    with pytest.raises(ValueError, match=r"data.weights has 'file:.*short.txt', .* less than one window of 32 tokens"):
        train(load_config(None, settings(tmp_path / "c", tmp_path / "run", **weights)), progress=False)


def test_shares_are_those_of_the_definition():
    """Against the definition, one draw at a time, and fast for many sources."""
    chance = np.random.default_rng(0)
    for count in (1, 2, 3, 7, 40):
        windows = [int(n) for n in chance.integers(0, 10_000, count)]
        windows[0] = 5
        weights = [float(w) for w in chance.choice([0.0, 0.001, 0.5, 1.0, 3.0], count)]
        weights[0] = 1.0
        assert shares(windows, weights) == _shares_by_definition(windows, weights)
    began = time.monotonic()
    assert sum(shares([int(n) for n in chance.integers(1, 10_000, 1000)], list(chance.random(1000)))) == 65536
    assert time.monotonic() - began < 5


def _shares_by_definition(windows, weights):
    parts = [Fraction(weight) * count for weight, count in zip(weights, windows, strict=True)]
    drawn = [i for i, part in enumerate(parts) if part]
    found = [max(1, int(part * 65536 / sum(parts))) if part else 0 for part in parts]
    while (missing := 65536 - sum(found)) != 0:
        if missing > 0:
            found[max(drawn, key=lambda i: parts[i] * 65536 / sum(parts) - found[i])] += 1
        else:
            found[max(drawn, key=lambda i: found[i])] -= 1
    return found


def test_a_run_on_other_text_says_so(corpus, tmp_path, capsys):
    other = tmp_path / "other"
    texts = [f"xyz {i} " * 50 for i in range(60)]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    prepare(f"jsonl:{tmp_path}/t.jsonl", other, tokenizer=corpus / "tokenizer.json", validation_fraction=0.2)
    train(load_config(None, settings(corpus, tmp_path / "run")), progress=False)
    capsys.readouterr()
    train(load_config(None, settings(corpus, tmp_path / "run", **{"train.steps": 5})), progress=False)
    assert "is not that of the checkpoint" not in capsys.readouterr().out
    train(load_config(None, settings(other, tmp_path / "run", **{"train.steps": 6})), progress=False)
    assert "other is not that of the checkpoint" in capsys.readouterr().out


def test_weights_are_written_and_belong_to_the_run(corpus, tmp_path):
    config = load_config(None, settings(corpus, tmp_path / "run", **weighted(corpus, 3.0)))
    for commented in (True, False):
        (tmp_path / "a.toml").write_text(config.to_toml(commented=commented))
        assert load_config(tmp_path / "a.toml") == config
    train(config, progress=False)
    with pytest.raises(ValueError, match=r"belongs to another run: data.weights was \{'jsonl:.*, is \{\};"):
        train(load_config(None, settings(corpus, tmp_path / "run", **{"train.steps": 6})), progress=False)


def test_a_weighted_run_resumes_with_the_same_bits(corpus, tmp_path):
    def run(out, steps):
        options = {**weighted(corpus, 3.0), "train.steps": steps, "schedule.decay": '"none"'}
        return train(load_config(None, settings(corpus, tmp_path / out, **options)), progress=False).checkpoint

    whole = load_file(run("whole", 4) / "model.safetensors")
    run("parts", 3)
    parts = load_file(run("parts", 4) / "model.safetensors")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_prefetched_items_are_those_of_the_iterator():
    with Prefetch(iter(range(100))) as items:
        assert list(items) == list(range(100))
        with pytest.raises(StopIteration):
            next(items)
    assert not threads()


def test_only_so_many_items_are_ready():
    made = []
    with Prefetch((made.append(i) or i for i in itertools.count()), ahead=3) as items:
        for expected in range(5):
            assert next(items) == expected
            deadline = time.monotonic() + 10
            while len(made) < expected + 5 and time.monotonic() < deadline:  # three ready, one in hand
                time.sleep(0.001)
            time.sleep(0.01)
            assert len(made) == expected + 5
    assert not threads()
    with pytest.raises(ValueError, match="ahead must be at least 1"):
        Prefetch([], ahead=0)


def test_waiting_is_measured():
    def slow():
        for i in range(3):
            time.sleep(0.05)
            yield i

    with Prefetch(slow()) as items:
        assert list(items) == [0, 1, 2]
        assert 0.1 < items.waited < 5


def test_errors_of_the_loader_come_after_the_items_before_them():
    def fails():
        yield 1
        raise ArithmeticError("no more")

    with Prefetch(fails()) as items:
        assert next(items) == 1
        for _ in range(2):
            with pytest.raises(ArithmeticError, match="no more"):
                next(items)
    assert not threads()


def test_a_run_ends_with_the_error_of_its_loader(corpus, tmp_path, monkeypatch):
    read = TokenDataset.windows
    calls = []

    def windows(self, indices, length):
        calls.append(threading.current_thread().name)
        if len(calls) == 6:
            raise OSError("the disk is gone")
        return read(self, indices, length)

    monkeypatch.setattr(TokenDataset, "windows", windows)
    with pytest.raises(OSError, match="the disk is gone"):
        train(load_config(None, settings(corpus, tmp_path / "run")), progress=False)
    assert not threads() and set(calls) == {"illada-prefetch"}


@pytest.mark.parametrize("end", ["stop", "error", "done"])
def test_a_run_leaves_no_thread_and_logs_its_wait(corpus, tmp_path, end, capsys):
    config = load_config(None, settings(corpus, tmp_path / "run"))
    seen = []

    def stop():
        seen.append(len(threads()))
        if end == "error" and len(seen) == 3:
            raise KeyError("in the training thread")
        return end == "stop" and len(seen) == 3

    try:
        train(config, should_stop=stop, progress=False)
    except KeyError:
        assert end == "error"
    assert not threads() and seen[0] == 1
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    waits = [line["data_wait"] for line in lines if line["kind"] == "train"]
    assert len(waits) == (4 if end == "done" else 1) and all(wait >= 0 for wait in waits)
    assert "data_wait 0." in capsys.readouterr().out


def test_a_resumed_run_does_not_make_the_batches_before(corpus, tmp_path, monkeypatch):
    made = []
    make = loop.micro_batches
    monkeypatch.setattr(
        loop, "micro_batches", lambda corpus, step, *rest: made.append(step) or make(corpus, step, *rest)
    )
    for steps, first in ((2, 0), (4, 2)):
        made.clear()
        train(load_config(None, settings(corpus, tmp_path / "run", **{"train.steps": steps})), progress=False)
        assert made[0] == first and made == sorted(made) and steps - 1 in made
