"""Corpora: preparing, reading back, and refusing what is damaged or foreign."""

import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
from tokenizers import normalizers

from illada.data.corpus import Documents, HeldOut, prepare
from illada.data.dataset import TokenDataset
from illada.data.sources import PIECE, read_source
from illada.text.tokenizer_files import load_tokenizer
from illada.text.training import SPECIAL_TOKENS, parse_special, special_ids, tokenizer_sha256, train_tokenizer

TEXTS = ["a text that spells <[MASK]> and <[end▁of▁sentence]>"] + [
    f"def function_{i}(x):\n    return x + {i}  # ünïcode {'word ' * (i % 7)}\n" for i in range(59)
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text files")
    for i, text in enumerate(TEXTS):
        (folder / f"{i:02}.txt").write_text(text, encoding="utf-8")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "empty.txt").write_text("\n")
    (folder / "image.png").write_bytes(b"x")
    return folder


@pytest.fixture(scope="module")
def corpus(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("corpus") / "c"
    prepare(f"dir:{texts}", out, vocab_size=300, validation_fraction=0.2)
    return out


def tokens_of(data):
    return data.read(0, data.num_tokens)


def test_round_trip(corpus):
    tokenizer = load_tokenizer(corpus)
    seen = []
    for split in ("train", "validation"):
        data = TokenDataset(corpus, split)
        for ids in data.documents():
            assert ids[-1] == 2
            seen.append(tokenizer.decode(ids[:-1].tolist()))
    assert sorted(seen) == sorted(TEXTS)


def test_header_and_special_ids(corpus):
    header = TokenDataset(corpus).header
    assert header["dtype"] == "uint16" and header["vocab_size"] == 300
    assert [header[f"{n}_token_id"] for n in ("bos", "pad", "eos", "mask")] == [0, 1, 2, 5]
    assert header["tokenizer_sha256"] == tokenizer_sha256(corpus)
    splits = header["splits"]
    assert splits["train"]["documents"] + splits["validation"]["documents"] == 60
    assert 3 <= splits["validation"]["documents"] <= 25
    assert sum(s["bytes"] for s in splits.values()) == sum(len(t.encode()) for t in TEXTS)
    held_out = TokenDataset(corpus, "validation")
    p = np.bincount(tokens_of(held_out)) / held_out.num_tokens
    assert held_out.unigram_entropy() == pytest.approx(-(p[p > 0] * np.log(p[p > 0])).sum())


def test_windows(corpus):
    data = TokenDataset(corpus)
    count = data.num_windows(100)
    assert count == data.num_tokens // 100
    np.testing.assert_array_equal(data.windows(np.array([count - 1, 0]), 100)[1], tokens_of(data)[:100])
    with pytest.raises(ValueError, match="train split of .* less than one window of 1000000; prepare more text, or"):
        data.num_windows(10**6)
    with pytest.raises(ValueError, match="validation split of .* or hold out more of it"):
        TokenDataset(corpus, "validation").num_windows(10**6)


def test_split_does_not_depend_on_order(texts, corpus, tmp_path):
    lines = [json.dumps({"text": text, "other": 1}) for text in reversed(TEXTS)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    prepare(f"jsonl:{tmp_path / 'a.jsonl'}", tmp_path / "c", vocab_size=300, validation_fraction=0.2)

    def held_out(path):
        data, tokenizer = TokenDataset(path, "validation"), load_tokenizer(path)
        return sorted(tokenizer.decode(ids.tolist()) for ids in data.documents())

    assert held_out(tmp_path / "c") == held_out(corpus)


def shared_out(texts, fraction, folder):
    """Return ({split: texts}, what is held out)."""
    with Documents(folder) as documents:
        for text in texts:
            documents.add([text[:1000], text[1000:]])
        held_out = HeldOut(documents, fraction)
        parts = {"train": [], "validation": []}
        for document in documents:
            start = held_out.start(document)
            parts["train"].append("".join(documents.pieces(document, 0, start)))
            parts["validation"].append("".join(documents.pieces(document, start)))
    return {split: [text for text in texts if text] for split, texts in parts.items()}, held_out.what


def test_few_or_unequal_documents_lose_their_ends(tmp_path):
    book = "".join(f"line {i} of a long bóok\n" for i in range(1000))
    for documents in ([book], [book, "a note", "another"], [book, book.upper()], [book * 9]):
        parts, what = shared_out(documents, 0.1, tmp_path)
        assert what == "ends"
        assert all(text.endswith("\n") for text in parts["train"] if "\n" in text)  # cut between lines
        share = sum(map(len, parts["validation"])) / sum(map(len, documents))
        assert 0.09 < share < 0.11
        assert sorted("".join(parts["train"] + parts["validation"])) == sorted("".join(documents))
    for text in ("title\n" + "x" * 10_000, "a title\n" + "word " * 2000):  # the only newline is far from the end
        parts, _ = shared_out([text], 0.1, tmp_path)
        assert 0.08 < len(parts["validation"][0]) / len(text) < 0.12
    assert shared_out([f"document {i} " * 9 for i in range(300)], 0.1, tmp_path)[1] == "documents"
    (tmp_path / "book.txt").write_text(book)
    header = prepare(f"dir:{tmp_path}", tmp_path / "c", vocab_size=300, validation_fraction=0.1)
    assert header["sources"][0]["held_out"] == "ends" and header["splits"]["validation"]["documents"] == 1
    tokenizer, tokens = load_tokenizer(tmp_path / "c"), tokens_of(TokenDataset(tmp_path / "c", "validation"))
    assert book.endswith(tokenizer.decode(tokens[:-1].tolist()))


def test_given_tokenizer_and_wide_ids(texts, corpus, tmp_path):
    header = prepare(f"dir:{texts}", tmp_path / "same", tokenizer=corpus / "tokenizer.json")
    assert header["tokenizer_sha256"] == tokenizer_sha256(corpus)
    foreign = train_tokenizer(TEXTS, 280)
    foreign.add_tokens([f"<extra_{i}>" for i in range(1 << 16)])
    foreign.save(str(tmp_path / "wide.json"))
    wide = prepare(f"dir:{texts}", tmp_path / "wide", tokenizer=tmp_path / "wide.json", special={"mask": 7})
    assert wide["dtype"] == "uint32" and wide["mask_token_id"] == 7
    assert tokens_of(TokenDataset(tmp_path / "wide")).dtype == np.uint32


@pytest.mark.parametrize("largest", [1000, 1 << 16, 1 << 22])
def test_ids_that_a_tokenizer_leaves_out_count(largest, texts, corpus, tmp_path):
    values = json.loads((corpus / "tokenizer.json").read_text())
    values["model"]["vocab"]["a"] = largest
    values["model"]["merges"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    if largest == 1 << 22:
        with pytest.raises(ValueError, match="the tokenizer's ids must be below 4194304, got 4194304"):
            prepare(f"dir:{texts}", tmp_path / "c", tokenizer=tmp_path / "tokenizer.json")
        return
    header = prepare(f"dir:{texts}", tmp_path / "c", tokenizer=tmp_path / "tokenizer.json")
    assert header["vocab_size"] == largest + 1
    tokens = TokenDataset(tmp_path / "c").windows(np.arange(4), 64)
    assert tokens.max() == largest and tokens.dtype == (np.uint16 if largest == 1000 else np.uint32)


def test_a_saved_tokenizer_s_settings_change_no_corpus(texts, corpus, tmp_path):
    """Truncation, padding, and control tokens that are not called special."""
    values = json.loads((corpus / "tokenizer.json").read_text())
    values["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    for token in values["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    prepare(f"dir:{texts}", tmp_path / "c", tokenizer=tmp_path / "tokenizer.json", validation_fraction=0.2)
    for name in ("train-00000.bin", "train-00000.idx", "validation-00000.bin"):
        assert (tmp_path / "c" / name).read_bytes() == (corpus / name).read_bytes()


def test_stdlib_source():
    documents = read_source("stdlib")
    first = next(documents)
    assert isinstance(first, str) and len(first) > 0


def test_nothing_is_left_of_a_failed_prepare(texts, tmp_path, monkeypatch):
    monkeypatch.setattr("illada.data.corpus._entropy", lambda counts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(f"dir:{texts}", tmp_path / "c", vocab_size=300)
    assert not list(tmp_path.iterdir())


def test_overwriting(texts, corpus, tmp_path):
    out = tmp_path / "c"
    prepare(f"dir:{texts}", out, vocab_size=300)
    with pytest.raises(FileExistsError, match="exists; overwrite it with"):
        prepare(f"dir:{texts}", out, vocab_size=300)
    assert prepare(f"dir:{texts}", out, vocab_size=290, overwrite=True)["vocab_size"] == 290
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    with pytest.raises(FileExistsError, match="is not a corpus"):
        prepare(f"dir:{texts}", texts, vocab_size=300, overwrite=True)


def test_bad_sources_and_arguments(texts, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"txt": 1}\n')
    (tmp_path / "number.jsonl").write_text('{"text": 3}\n')
    (tmp_path / "one.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "deep.jsonl").write_text('\n{"text": ' + "[" * 100_000)
    (tmp_path / "half.jsonl").write_text('{"text": "\\ud83d"}\n')
    (tmp_path / "latin.jsonl").write_bytes('{"text": "ö"}\n'.encode() + '{"text": "öl"}\n'.encode("latin-1"))
    out = tmp_path / "out"
    wrong = [
        (ValueError, "source must be stdlib, .* got 'web', which is no path that exists", "web", {}),
        (FileNotFoundError, "is not a folder", f"dir:{tmp_path}/no", {}),
        (FileNotFoundError, "is not a file", f"jsonl:{tmp_path}/no", {}),
        (ValueError, 'line 2: expected a JSON object with a "text" field', f"jsonl:{tmp_path}/bad.jsonl", {}),
        (ValueError, '"text" must be a string, got int', f"jsonl:{tmp_path}/number.jsonl", {}),
        (ValueError, "has 1 documents, too little text to hold any of it out", f"jsonl:{tmp_path}/one.jsonl", {}),
        (ValueError, "has 0 documents, too little text", f"dir:{empty}", {}),
        (ValueError, "there is no source; must be stdlib", [], {}),
        (ValueError, "vocab_size must be at least 262", f"dir:{texts}", {"vocab_size": 100}),
        (ValueError, r"validation_fraction must be in \(0, 1\)", f"dir:{texts}", {"validation_fraction": 0}),
        (ValueError, "deep.jsonl, line 2 is not JSON that can be read: it is", f"jsonl:{tmp_path}/deep.jsonl", {}),
        (ValueError, "half.jsonl, line 1 holds half of a surrogate pair", f"jsonl:{tmp_path}/half.jsonl", {}),
        (ValueError, "latin.jsonl, line 2 is not UTF-8 text: byte 0xf6", f"jsonl:{tmp_path}/latin.jsonl", {}),
        (FileNotFoundError, "no tokenizer at", f"dir:{texts}", {"tokenizer": tmp_path / "none.json"}),
        (
            ValueError,
            "bad.jsonl is not JSON: Extra data: line 2",
            f"dir:{texts}",
            {"tokenizer": tmp_path / "bad.jsonl"},
        ),
    ]
    for error, match, source, options in wrong:
        with pytest.raises(error, match=match):
            prepare(source, out, **options)
    assert not out.exists()


def test_a_mark_is_no_text_and_what_is_left_out_is_counted(tmp_path):
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree")
    (tmp_path / "marked.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}')
    assert list(read_source(f"jsonl:{tmp_path}/marked.jsonl")) == ["one", "two"]
    assert list(read_source(f"dir:{tmp_path}")) == ["one", "two", "one\ntwo\rthree"]
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_bytes("text".encode("utf-16"))
    with pytest.warns(
        UserWarning, match=r"2 of 4 files left out: 2 UTF-16 \(first: .*a\.txt .* iconv -f UTF-16 -t UTF-8"
    ):
        assert list(read_source(f"dir:{tmp_path}")) == ["one", "two", "one\ntwo\rthree"]


def test_special_ids():
    tokenizer = train_tokenizer(TEXTS, 280)
    assert special_ids(tokenizer) == {"bos": 0, "pad": 1, "eos": 2, "mask": 5}
    assert list(SPECIAL_TOKENS).index("mask") == 5
    from tokenizers import Tokenizer, models

    bare = Tokenizer(models.BPE())
    bare.add_tokens(["a", "b"])
    with pytest.raises(ValueError, match="for pad, eos, mask; give their ids, as in --special pad=ID"):
        special_ids(bare, {"bos": 0})
    with pytest.raises(ValueError, match="mask=9 is outside of the vocabulary of 2"):
        special_ids(bare, {"bos": 0, "pad": 0, "eos": 0, "mask": 9})
    with pytest.raises(ValueError, match="got msk"):
        special_ids(bare, {"msk": 0})
    assert parse_special("eos=2, mask=5") == {"eos": 2, "mask": 5}
    with pytest.raises(ValueError, match="must look like eos=2,mask=5"):
        parse_special("eos")


def test_damaged_and_foreign_corpora(texts, tmp_path):
    out = tmp_path / "c"
    prepare(f"dir:{texts}", out, vocab_size=300)
    names = ("train-00000.bin", "train-00000.idx", "corpus.json", "tokenizer.json")
    good = {name: (out / name).read_bytes() for name in names}
    header, index = json.loads(good["corpus.json"]), good["train-00000.idx"]

    def broken(match, error=ValueError, **files):
        for name, content in files.items():
            (out / names[["bin", "idx", "corpus", "tokenizer"].index(name)]).write_bytes(content)
        with pytest.raises(error, match=match):
            data = TokenDataset(out)
            data.windows(np.array([0]), 50)
            list(data.documents())
        for name, content in good.items():
            (out / name).write_bytes(content)

    def changed_index(at, value):
        words = np.frombuffer(index, np.uint64).copy()
        words[at] = value
        return words.tobytes()

    broken("train-00000.bin is damaged: .* bytes, expected", bin=good["train-00000.bin"][:-1])
    broken("train-00000.idx is damaged: 0 bytes, expected", idx=b"")
    broken("train-00000.idx is damaged: it does not begin as the index of a shard", idx=changed_index(0, 0))
    broken("train-00000.idx has format version 7, this is 1", idx=changed_index(1, 7 | 2 << 32))
    broken(
        "idx does not belong to train-00000.bin: its bytes of a token is 4, expected 2",
        idx=changed_index(1, 1 | 4 << 32),
    )
    broken("idx does not belong to train-00000.bin: its number is 3, expected 0", idx=changed_index(2, 3))
    broken("idx does not belong to train-00000.bin: its tokens is 9, expected", idx=changed_index(3, 9))
    broken("idx is damaged: the first document must start at 0", idx=changed_index(5, 1))
    broken("idx is damaged: documents must start in ascending order", idx=changed_index(7, 1))
    broken("idx is damaged: documents must start within train-00000.bin", idx=changed_index(7, 2**63))
    shards = header["splits"]["train"]["shards"]
    for change, match in (
        ({"dtype": "int16"}, "dtype must be uint16 or uint32, got 'int16'"),
        ({"vocab_size": 300.0}, r"vocab_size must be int, got 300\.0"),
        ({"vocab_size": 2**63 - 1}, "vocab_size must be at most"),
        ({"eos_token_id": 300}, "token id 300 is outside of the vocabulary of 300"),
        ({"splits": {}}, "splits, train must hold a JSON object"),
        ({"splits": {"train": {"documents": 1}}}, "splits, train lacks tokens"),
        ({"splits": {"train": {"documents": 1, "tokens": 9}}}, "splits, train lacks shards"),
        ({"sources": header["sources"] * 2}, "sources must have different names"),
        ({"sources": []}, r"shards\[0\]: there is no source 'dir:"),
    ):
        broken(match, corpus=json.dumps({**header, **change}).encode())
    for change, match in (
        ({"name": "../train-00000"}, r"shards\[0\]: name must be train-00000, got '\.\./train"),
        ({"tokens": 0}, r"shards\[0\]: tokens must be positive"),
        ({"documents": 1}, "splits, train: its shards hold 1 documents, not"),
        ({"source": 3}, r"shards\[0\]: source must be str"),
    ):
        train = {**header["splits"]["train"], "shards": [{**shards[0], **change}]}
        broken(match, corpus=json.dumps({**header, "splits": {"train": train}}).encode())
    broken(r"corpus\.json lacks dtype, vocab_size", corpus=b'{"format": "illada-corpus", "version": 1}')
    broken("is not the header of an illada-corpus", corpus=b"{}")
    broken("is not the header of an illada-corpus", corpus=b"[1]")
    broken(r"corpus\.json is not JSON", corpus=b"[1")
    broken(r"corpus\.json is a Git LFS pointer", corpus=b"version https://git-lfs.github.com/spec/v1\n")
    broken("has format version 9, this is 2", corpus=json.dumps({**header, "version": 9}).encode())
    broken("has format version None, this is 2", corpus=b'{"format": "illada-corpus"}')
    broken("is not the tokenizer that this corpus was made with", tokenizer=good["tokenizer.json"] + b" ")
    broken("holds token id 65535, outside of its vocabulary", bin=b"\xff" * len(good["train-00000.bin"]))
    (out / "train-00000.idx").unlink()
    broken("train-00000.idx is missing")
    with pytest.raises(ValueError, match="split must be train or validation, got 'test'"):
        TokenDataset(out, "test")
    with pytest.raises(FileNotFoundError, match="make one with `illada prepare --source SOURCE --out "):
        TokenDataset(tmp_path)


def long_text(characters):
    """Return words, numbers, punctuation, Chinese without spaces, mixed line ends and combining marks."""
    parts = [
        "don't",
        " stop",
        "   at\n\n",
        "12345",
        ";\r\n",
        "，字。字",
        " e\u0301t",
        "_x_",
        "\U0001f600",
        " <[MASK]>",
        "'s ",
    ]
    return "".join(parts[i * i % 97 % len(parts)] for i in range(characters))[:characters]


@pytest.mark.parametrize("kind", ["byte level", "a beginning"])
def test_long_documents_have_the_tokens_of_the_whole(tmp_path, kind):
    text = long_text(3 * PIECE)
    whole = train_tokenizer([text[:20_000]], 300)
    if kind == "a beginning":  # that each text is given: no cut is without effect
        whole.normalizer = normalizers.Prepend("x")
    whole.save(str(tmp_path / "tokenizer.json"))
    whole.encode_special_tokens = True
    lines = [json.dumps({"text": one}) for one in (text, "short", text[::-1])]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        prepare(f"jsonl:{tmp_path}/a.jsonl", tmp_path / "c", tokenizer=tmp_path, validation_fraction=1e-5)
    first = next(TokenDataset(tmp_path / "c").documents())[:-1].tolist()
    train = shared_out([text, "short", text[::-1]], 1e-5, tmp_path)[0]["train"][0]
    assert (first == whole.encode(train, add_special_tokens=False).ids) == (kind == "byte level")
    assert ["cuts this tokenizer may give other tokens" in str(one.message) for one in said] == [True] * (
        kind != "byte level"
    )


def test_a_tokenizer_learns_of_a_long_document_what_it_learns_of_the_whole(tmp_path):
    text = long_text(3 * PIECE)
    (tmp_path / "book.txt").write_bytes(text.encode())
    prepare(f"dir:{tmp_path}", tmp_path / "c", vocab_size=320)
    assert load_tokenizer(tmp_path / "c").to_str() == train_tokenizer([text.replace("\r\n", "\n")], 320).to_str()


@pytest.mark.slow
@pytest.mark.parametrize("source", ["one line of a file", "one line of JSON", "several files"])
def test_memory_does_not_grow_with_documents(tmp_path, source):
    """Of 20 MB, five in a file or all in one line. It took 30 to 65 bytes a character."""
    megabyte = "".join(f"{i * i % 9973} words of line {i}, " for i in range(45_000))[: 1 << 20]
    (tmp_path / "files").mkdir()
    if source == "several files":
        for i in range(4):
            (tmp_path / "files" / f"{i}.txt").write_text(f"{megabyte}\n" * 5)
    else:
        line = megabyte * 20
        (tmp_path / "files" / "a.txt").write_text(
            line if source == "one line of a file" else json.dumps({"text": line})
        )
    what = f"jsonl:{tmp_path}/files/a.txt" if source == "one line of JSON" else f"dir:{tmp_path}/files"
    script = (
        "import re, sys; from illada.data.corpus import prepare; prepare(sys.argv[1], sys.argv[2], vocab_size=300);"
        # Not ru_maxrss, which begins at the size of the process that started this one.
        "print(int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]) // 1024)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, what, str(tmp_path / "c")], capture_output=True, text=True, check=True
    )
    # Without the library's own 100 MiB: batches, and of a line of JSON two copies.
    assert int(run.stdout) < 100 + 200 + (2.2 * 20 if source == "one line of JSON" else 0)
