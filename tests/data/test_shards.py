"""Shards of a corpus: tokens and documents are those of the whole, however they are cut."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest

from illada.data import corpus
from illada.data.corpus import prepare
from illada.data.dataset import TokenDataset
from illada.data.shards import ShardWriter
from illada.text.training import train_tokenizer

EOS = 2
#: Tokens of documents, eos apart: none, one, many, and none at both ends.
LENGTHS = [0, 1, 5, 0, 0, 13, 2, 40, 1, 0]


def documents_of(source):
    """Return documents whose tokens tell their source and place."""
    return [[6 + (source * 100 + 31 * i + j) % 250 for j in range(n)] + [EOS] for i, n in enumerate(LENGTHS)]


def write_corpus(path, shard_tokens, *, sources=1, version=2, batch=7, validation=True):
    """Write a corpus of `documents_of` by hand, with tokens given to the writer `batch` at a time."""
    path.mkdir(parents=True)
    train_tokenizer(["a"], 262).save(str(path / "tokenizer.json"))
    from illada.text.training import tokenizer_sha256

    splits = {}
    for split in ("train", "validation"):
        documents = [documents_of(source) for source in range(sources)]
        tokens = [np.array(sum(of, []), np.uint16) for of in documents]
        starts = [np.cumsum([0, *map(len, of)]) for of in documents]
        splits[split] = {"documents": len(LENGTHS) * sources, "tokens": sum(map(len, tokens)), "bytes": 1}
        if version == 1:
            tokens[0].tofile(path / f"{split}.bin")
            starts[0].astype(np.uint64).tofile(path / f"{split}.idx")
            continue
        with ShardWriter(path, split, "uint16", shard_tokens) as writer:
            for ids, begins in zip(tokens, starts, strict=True):
                for at in range(0, len(ids), batch):
                    here = begins[(begins >= at) & (begins < min(at + batch, len(ids)))] - at
                    writer.write(ids[at : at + batch], here)
                writer.end_source()
        splits[split]["shards"] = [
            {"name": one.name, "source": f"s{one.source}", "tokens": one.tokens, "documents": one.documents}
            for one in writer.shards
        ]
    header = {
        "format": "illada-corpus", "version": version, "dtype": "uint16", "vocab_size": 262, "bos_token_id": 0,
        "pad_token_id": 1, "eos_token_id": EOS, "mask_token_id": 5, "tokenizer_sha256": tokenizer_sha256(path),
        "splits": splits, "validation_unigram_entropy": 1.0,
        **({"source": "stdlib"} if version == 1 else {"sources": [{"name": f"s{i}"} for i in range(sources)]}),
    }  # fmt: skip
    (path / "corpus.json").write_text(json.dumps(header))
    return path


@pytest.mark.parametrize("batch", [1, 7, 1000])
@pytest.mark.parametrize("shard_tokens", [1, 2, 7, 10, 71, 72, 73, 1000])
def test_shards_hold_what_one_file_held(tmp_path, shard_tokens, batch):
    one = TokenDataset(write_corpus(tmp_path / "one", 0, version=1))
    many = TokenDataset(write_corpus(tmp_path / "many", shard_tokens, batch=batch))
    assert len(many.shards) == -(-one.num_tokens // shard_tokens) and one.num_tokens == sum(LENGTHS) + len(LENGTHS)
    assert all(shard.tokens == shard_tokens for shard in many.shards[:-1])
    np.testing.assert_array_equal(many.read(0, many.num_tokens), one.read(0, one.num_tokens))
    assert [ids.tolist() for ids in many.documents()] == [ids.tolist() for ids in one.documents()] == documents_of(0)
    for length in (1, 3, 16, one.num_tokens):
        indices = np.arange(one.num_windows(length))[::-1]
        np.testing.assert_array_equal(many.windows(indices, length), one.windows(indices, length))
    assert (one.sources, many.sources) == (["stdlib"], ["s0"])


def test_no_window_or_shard_has_tokens_of_two_sources(tmp_path):
    data = TokenDataset(write_corpus(tmp_path / "c", 10, sources=3))
    size = sum(LENGTHS) + len(LENGTHS)
    assert data.windows_of_sources(16) == [size // 16] * 3 and data.num_windows(16) == 3 * (size // 16)
    flat = [sum(documents_of(source), []) for source in range(3)]
    expected = [tokens[i * 16 : i * 16 + 16] for tokens in flat for i in range(size // 16)]
    assert data.windows(np.arange(data.num_windows(16)), 16).tolist() == expected
    assert [ids.tolist() for ids in data.documents()] == sum((documents_of(source) for source in range(3)), [])
    with pytest.raises(IndexError, match=f"window {len(expected)} of {len(expected)}"):
        data.windows(np.array([len(expected)]), 16)


def test_sources_that_are_all_shorter_than_a_window(tmp_path):
    data = TokenDataset(write_corpus(tmp_path / "c", 16, sources=3))
    length = data.num_tokens // 3 + 1
    with pytest.raises(ValueError, match=rf"tokens in 3 sources, each less than one window of {length}; prepare"):
        data.num_windows(length)
    assert data.num_windows(length - 1) == 3


def test_files_of_another_shard_are_noticed(tmp_path):
    write_corpus(tmp_path / "c", 10)
    files = [tmp_path / "c" / f"train-0000{i}.idx" for i in (1, 2)]
    swapped = [file.read_bytes() for file in reversed(files)]
    for file, data in zip(files, swapped, strict=True):
        file.write_bytes(data)
    with pytest.raises(ValueError, match=r"train-00001\.idx (does not belong to train-00001\.bin|is damaged)"):
        TokenDataset(tmp_path / "c")


def test_damaged_corpora_of_version_1(tmp_path):
    path = write_corpus(tmp_path / "c", 0, version=1)
    good = np.fromfile(path / "train.idx", np.uint64)
    for at, value, match in (
        (-1, 5, "train.idx does not belong to train.bin"),
        (0, 1, "train.idx does not belong to train.bin"),
        (3, 0, "train.idx is damaged: documents must start in ascending order"),
        (3, 2**60, "train.idx is damaged: documents must start within train.bin"),
    ):
        starts = good.copy()
        starts[at] = value
        starts.tofile(path / "train.idx")
        with pytest.raises(ValueError, match=match):
            list(TokenDataset(path).documents())
    (path / "train.idx").write_bytes(b"")
    with pytest.raises(ValueError, match="train.idx is damaged: 0 bytes, expected 88"):
        TokenDataset(path)


def test_opening_reads_and_maps_no_tokens(tmp_path):
    data = TokenDataset(write_corpus(tmp_path / "c", 10))
    assert not data._maps
    data.windows(np.array([0]), 8)
    assert list(data._maps) == ["train-00000.bin"]


def test_many_shards_are_not_mapped_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("illada.data.dataset._MOST_MAPS", 3)
    data = TokenDataset(write_corpus(tmp_path / "c", 2))
    assert [ids.tolist() for ids in data.documents()] == documents_of(0)
    assert len(data.shards) > 30 and len(data._maps) == 3


def test_a_corpus_that_is_replaced_while_it_is_read(tmp_path):
    """No window mixes the old text and the new one: what was mapped stays, the next file is refused."""
    texts = [[f"{word} {i} " * 30 for i in range(30)] for word in ("old", "new")]
    for name, lines in zip(("a", "b"), texts, strict=True):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in lines))
    prepare(f"jsonl:{tmp_path}/a.jsonl", tmp_path / "c", vocab_size=300, shard_bytes=512)
    data = TokenDataset(tmp_path / "c")
    assert len(data.shards) > 2
    before = data.windows(np.array([0]), 32)
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_bytes((tmp_path / "c" / "tokenizer.json").read_bytes())
    prepare(f"jsonl:{tmp_path}/b.jsonl", tmp_path / "c", tokenizer=tokenizer, shard_bytes=512, overwrite=True)
    assert np.array_equal(data.windows(np.array([0]), 32), before)
    with pytest.raises(RuntimeError, match="c was replaced or removed while it was read; start again"):
        data.windows(np.arange(data.num_windows(32)), 32)
    for file in (tmp_path / "c").iterdir():
        file.unlink()
    with pytest.raises(RuntimeError, match="was replaced or removed"):
        data.windows(np.arange(data.num_windows(32)), 32)
    assert TokenDataset(write_corpus(tmp_path / "d", 16)).num_tokens  # another one is read as ever


def test_a_copy_for_another_process_reads_the_same(tmp_path):
    data = TokenDataset(write_corpus(tmp_path / "c", 16))
    windows = data.windows(np.arange(2), 16)
    assert np.array_equal(pickle.loads(pickle.dumps(data)).windows(np.arange(2), 16), windows)


def test_the_fingerprint_follows_sources_and_sizes(tmp_path):
    first = TokenDataset(write_corpus(tmp_path / "a", 16, sources=2))
    assert first.fingerprint() == TokenDataset(write_corpus(tmp_path / "b", 16, sources=2)).fingerprint()
    others = [write_corpus(tmp_path / "c", 16), write_corpus(tmp_path / "d", 20, sources=2)]
    assert len({first.fingerprint(), *(TokenDataset(path).fingerprint() for path in others)}) == 3


def test_prepared_shards_and_sources(tmp_path):
    texts = {"a": [f"line {i} of a\n" * 30 for i in range(40)], "b": [f"{i} b " * 90 for i in range(40)]}
    for name, of in texts.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in of))
    names = [f"jsonl:{tmp_path}/{name}.jsonl" for name in texts]
    options = {"vocab_size": 300, "validation_fraction": 0.2}
    header = prepare(names, tmp_path / "c", shard_bytes=1000, **options)
    prepare(names, tmp_path / "whole", **options)
    assert [source["name"] for source in header["sources"]] == names
    assert [source["documents"] for source in header["sources"]] == [40, 40]
    for split, sizes in header["splits"].items():
        data, whole = TokenDataset(tmp_path / "c", split), TokenDataset(tmp_path / "whole", split)
        assert len(whole.shards) == 2 < len(data.shards) and data.sources == names
        assert all(shard.tokens <= 500 for shard in data.shards)
        np.testing.assert_array_equal(data.read(0, data.num_tokens), whole.read(0, whole.num_tokens))
        assert len(list(data.documents())) == data.num_documents == sizes["documents"]
    for key in ("documents", "tokens", "bytes"):
        total = sum(sizes[key] for sizes in header["splits"].values())
        assert sum(source[key] for source in header["sources"]) == total
    assert header["sources"][0]["bytes"] == sum(map(len, texts["a"]))
    with pytest.raises(ValueError, match="once more; data.weights"):
        prepare(names[:1] * 2, tmp_path / "twice", **options)
    with pytest.raises(ValueError, match="shard_bytes must be at least 4, got 3"):
        prepare(names, tmp_path / "small", shard_bytes=3, **options)


def jsonl(file, texts):
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return f"jsonl:{file}"


def test_a_tokenizer_learns_from_a_sample_of_long_text(tmp_path, monkeypatch):
    """Every k-th stretch of all sources, the same each time, of documents of any length."""
    monkeypatch.setattr(corpus, "PIECE", 1000)
    monkeypatch.setattr(corpus, "SAMPLE", 20_000)
    monkeypatch.setattr("illada.data.encoding.PIECE", 1000)
    given, train = [], corpus.train_tokenizer

    def keep(texts, *args, **kwargs):
        given.append(list(texts))
        return train(given[-1], *args, **kwargs)

    monkeypatch.setattr(corpus, "train_tokenizer", keep)
    short = [f"short {i:04} " * (i % 9 + 1) for i in range(1500)]  # 90 kB
    long = [f"word {i:05} " * 1 for i in range(10_000)]  # in one document of 110 kB
    sources = [jsonl(tmp_path / "short.jsonl", short), jsonl(tmp_path / "long.jsonl", ["".join(long)])]
    for out in ("a", "b"):
        prepare(sources, tmp_path / out, vocab_size=300)
    assert given[0] == given[1]
    assert 15_000 < sum(map(len, given[0])) < 25_000
    of_short = [text for text in given[0] if text.startswith("short")]
    assert set(of_short) < set(short) and 6_000 < sum(map(len, of_short)) < 12_000
    rest = "".join(given[0][len(of_short) :])
    assert len({int(word) for word in rest.split() if word.isdigit()}) == pytest.approx(900, abs=200)
    places = [int(word) for text in given[0][len(of_short) :] for word in text.split() if word.isdigit()]
    assert places == sorted(places) and places[-1] > 9000 and places[0] < 1500
    monkeypatch.setattr(corpus, "SAMPLE", 10**6)
    prepare(sources, tmp_path / "whole", vocab_size=300)
    assert "".join(given[2]) == "".join(short + long)


def memory_of(script, *arguments):
    """Return what a script prints, and the most memory that it had in MiB."""
    # Not ru_maxrss, which begins at the size of the process that started this one.
    script += "; import re; print(int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]) // 1024)"
    run = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    *said, memory = run.stdout.split()
    return said, int(memory)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_documents(tmp_path):
    script = (
        "import sys; from illada.data import corpus; corpus.SAMPLE = 1 << 21;"
        "corpus.prepare(sys.argv[1], sys.argv[2], vocab_size=1000, shard_bytes=1 << 20)"
    )
    memory = []
    for megabytes in (8, 64):
        texts = (f"{i} words {i * i % 99991} of {i * 7 % 65537} text " * (i % 30) for i in range(megabytes * 2000))
        memory.append(memory_of(script, jsonl(tmp_path / "a.jsonl", texts), tmp_path / f"{megabytes}")[1])
    assert memory[1] < memory[0] + 25 and memory[1] < 250


@pytest.mark.slow
def test_windows_of_ten_gigabytes(tmp_path):
    """Of sparse files, in memory that does not grow. A GPU trains an 8B model on one or two windows a second."""
    shards, tokens = 40, 1 << 26
    write_corpus(tmp_path / "c", 1000)
    header = json.loads((tmp_path / "c" / "corpus.json").read_text())
    with ShardWriter(tmp_path / "c", "train", "uint32", tokens) as writer:
        for _ in range(shards):
            writer.write(np.array([7], np.uint32), np.array([0]))
            for file in writer._files:
                file.flush()
            writer._files[0].truncate(tokens * 4)
            writer._tokens = tokens
            writer._close()
    header["dtype"] = "uint32"
    header["splits"]["train"] = {
        "documents": shards,
        "tokens": shards * tokens,
        "shards": [{"name": one.name, "source": "s0", "tokens": tokens, "documents": 1} for one in writer.shards],
    }
    (tmp_path / "c" / "corpus.json").write_text(json.dumps(header))
    script = (
        "import sys, time; import numpy as np; from illada.data.dataset import TokenDataset;"
        "began = time.perf_counter(); data = TokenDataset(sys.argv[1]); print(time.perf_counter() - began);"
        "count = data.num_windows(8192); number = int(sys.argv[2]); rng = np.random.default_rng(0);"
        "began = time.process_time();"  # others may use the machine
        "sum(len(data.windows(rng.integers(0, count, 32), 8192)) for _ in range(number // 32));"
        "print(number / (time.process_time() - began))"
    )
    (_, few), (said, many) = (memory_of(script, tmp_path / "c", number) for number in (320, 9_600))
    opened, rate = map(float, said)
    print(f"opened in {opened:.3f} s, {rate:,.0f} windows of 8192 tokens in a CPU second, {few} and {many} MiB")
    assert many < few + 20 and opened < 2 and rate > 500
