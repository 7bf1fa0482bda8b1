"""Sources of text: every kind, compressed or not, and what is said of files that are left out."""

import csv
import gzip
import json
import os
import shutil
import subprocess
import sys
import warnings

import pytest

from illada import cli
from illada.data.corpus import prepare
from illada.data.sources import PIECE, open_sources, read_source

TEXTS = ["one, with a comma\nand a line", 'two "quoted" é', "three " * 9, "x" * (2 * PIECE + 7)]


def write_parquet(path, rows, **options):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(rows), path, **options)


def write_csv(path, rows, **options):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), **options)
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


WRITERS = {"jsonl": write_jsonl, "csv": write_csv, "parquet": write_parquet}


def pack(path, suffix):
    """Replace a file by a compressed one."""
    packed = path.with_name(path.name + suffix)
    data = path.read_bytes()
    packed.write_bytes(gzip.compress(data) if suffix == ".gz" else pytest.importorskip("zstandard").compress(data))
    path.unlink()
    return packed


def read(source, **options):
    """Return (documents, what is said of files that are left out)."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        (one,) = open_sources([source], **options)
        texts = ["".join(pieces) for pieces in one.documents()]
    assert one.count == len(texts) and one.name == source
    return texts, [str(warning.message).removeprefix(f"{source}: ") for warning in said]


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", WRITERS)
def test_records(kind, packed, tmp_path):
    """By their kind, by the suffix of a file in any case, and in a folder; blank ones are left out."""
    rows = [{"id": str(i), "text": text, "body": f"body {i}"} for i, text in enumerate([*TEXTS, "", " \n"])]
    file = tmp_path / f"A.{kind.upper()}"
    WRITERS[kind](file, rows)
    if packed:
        file = pack(file, packed)
    for source in (f"{kind}:{file}", f"file:{file}", str(file), f"dir:{tmp_path}", str(tmp_path)):
        assert read(source) == (TEXTS, [])
    assert read(f"{kind}:{file}", text_column="body")[0] == [f"body {i}" for i in range(6)]
    assert list(read_source(str(file))) == TEXTS
    with pytest.raises(ValueError, match=r'expected .*"words".*; there is id, text, body \(--text-column NAME'):
        open_sources(["stdlib", f"{kind}:{file}"], text_column="words")  # before the first source is read
    with pytest.raises(FileNotFoundError, match="is not a file; dir:.* reads the files of a folder"):
        open_sources([f"{kind}:{tmp_path}"])
    with pytest.raises(FileNotFoundError, match="is not a folder; file:.* reads one file"):
        open_sources([f"dir:{file}"])


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.txt", "A.MD", "b.Rst", "no suffix", "a.log"])
def test_text_files(name, packed, tmp_path):
    file = tmp_path / name
    file.write_text(TEXTS[3] + TEXTS[0])
    if packed:
        file = pack(file, packed)
    assert read(str(file)) == read(f"file:{file}") == ([TEXTS[3] + TEXTS[0]], [])
    known = name in ("a.txt", "A.MD", "b.Rst")
    texts, said = read(str(tmp_path))
    assert len(texts) == known
    label = {"a.log": f"log{packed}", "no suffix": packed[1:] or "without a suffix"}.get(name)
    assert said == ([] if known else [f"1 of 1 files left out: 1 {label}"])


def test_a_home_folder_and_relative_paths(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "a:b.txt").write_text("two")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for source in ("~/a.txt", "file:~/a.txt", "a.txt", "./a.txt"):
        assert read(source)[0] == ["one"]
    assert read("a:b.txt")[0] == ["two"]
    assert read(".")[0] == ["one", "two"]


def test_what_is_left_out_is_counted_by_reason(tmp_path):
    folder = tmp_path / "in"
    for i in range(5):
        (folder / f"sub{i}").mkdir(parents=True)
        (folder / f"sub{i}" / "a.txt").write_text(f"text {i}")
        (folder / f"sub{i}" / "paper.PDF").write_bytes(b"%PDF \xff\x00")
    (folder / "latin.md").write_bytes(b"ca\xf1on")
    (folder / "old.txt").write_bytes(b"fine " * 100_000 + b"\xff")
    (folder / "wide.txt").write_bytes("text".encode("utf-16"))
    (folder / "pointer.txt").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (folder / "cut.txt.gz").write_bytes(gzip.compress(b"text" * 999)[:-9])
    (folder / "a.tar.gz").write_bytes(gzip.compress(b"\x00"))
    (folder / "meta.jsonl").write_text('{"name": "x"}\n')
    (folder / "broken.jsonl").write_text('{"text": "x"}\n{"text": ')
    (folder / "README").write_text("text")
    (folder / "empty.txt").write_text(" \n")
    (folder / ".git").mkdir()
    (folder / ".git" / "config.txt").write_text("text")
    (folder / ".hidden.txt").write_text("text")
    (folder / "loop").symlink_to(folder)
    (folder / "broken.txt").symlink_to(tmp_path / "no")
    os.mkfifo(folder / "pipe.txt")
    texts, (said,) = read(f"dir:{folder}")
    assert texts == [f"text {i}" for i in range(5)]  # and of a damaged file no part
    assert said.startswith("17 of 23 files left out: 5 pdf, 2 damaged (first: ") and "\n" not in said
    assert said.endswith("; 2 hidden files and folders not looked at")
    for part in (
        f"2 not UTF-8 (first: {folder}/latin.md, line 1 is not UTF-8 text: byte 0xf1 at position 2; it looks like",
        "2 not files (first: ",
        "1 UTF-16 (first: ",
        "1 Git LFS pointers (first: ",
        '1 without a column "text" (first: ',
        "1 tar.gz, ",
        "1 links to folders (first: ",
    ):
        assert part in said, said
    (one,) = open_sources([f"dir:{folder}"])
    with pytest.warns(UserWarning):
        assert len(list(one.documents())) == 5
    assert one.left_out.files == 23 and one.left_out.reasons["pdf"] == 5
    assert read(f"dir:{folder}", text_column="name")[0][0] == "x"


def test_many_reasons_make_one_line(tmp_path):
    for i in range(30):
        (tmp_path / f"a.{i:02}x").write_text("")
    ((said,),) = read(str(tmp_path))[1:]
    assert said.startswith("30 of 30 files left out: 1 00x, 1 01x,") and said.endswith("1 11x, 18 of other kinds")


def test_hidden_files_alone_are_no_news(tmp_path):
    (tmp_path / ".DS_Store").write_text("")
    (tmp_path / "a.txt").write_text("text")
    assert read(str(tmp_path)) == (["text"], [])


@pytest.mark.parametrize(
    "name, data, match",
    [
        ("a.txt", b"one\n\xff", r"a.txt, line 2 is not UTF-8 text: byte 0xff at position 4"),
        ("a.pdf", b"%PDF-1.7 \x00\xff", r"a.pdf, line 1 is not UTF-8 text: byte 0xff"),
        ("a.txt", "one".encode("utf-16"), r"a.txt is not UTF-8 text: it looks like UTF-16; convert .* iconv -f UTF-16"),
        ("a.csv", "text\none\n".encode("utf-16"), r"a.csv is not UTF-8 text: it looks like UTF-16; convert it"),
        ("a.jsonl", b'{"text": "one"}\n["text"]', 'a.jsonl, line 2: expected a JSON object with a "text" field$'),
        ("a.jsonl", b'{"text": null}', 'a.jsonl, line 1: "text" must be a string, got NoneType'),
        ("a.csv", b"a,b\n1,2", 'a.csv, line 1: expected a column "text"; there is a, b'),
        ("a.csv", b"a;b\n1;2", 'a.csv, line 1: expected a column "text"; there is a, b'),
        ("a.csv", b"id,text\n1,two\n3,four, five", "a.csv, line 3: 3 fields, but line 1 names 2 columns"),
        ("a.csv", b'id,text\n1,"two\n\n\n3,"four"\n', "a.csv, line 2 begins a record that is not csv"),
        ("a.csv", b'id,text\n1,"two\n\n\n3', "a.csv, line 2 begins a record that is not csv"),
        ("a.csv", b'"text\n"', "a.csv, line 1: expected a column"),
        ("a.csv", b"text\none\n\xff", "a.csv, line 3 is not UTF-8 text: byte 0xff at position 9"),
        ("a.parquet", b"PAR1", r"a.parquet is damaged, or no parquet file: "),
        ("a.parquet", b"text", r"a.parquet is damaged, or no parquet file: "),
        ("a.parquet.gz", gzip.compress(b"text" * 99)[:-5], r"a.parquet.gz is damaged or cut \(gzip\)"),
        ("a.txt.xz", b"\xfd7zXZ\x00", r"a.txt.xz is compressed \(xz\), not text; unpack it first"),
    ],
)  # fmt: skip
def test_a_file_that_is_named_must_be_right(name, data, match, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=match):
        list(read_source(str(tmp_path / name)))


def test_csv_as_programs_write_it(tmp_path):
    rows = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    for options in ({"delimiter": ";"}, {"delimiter": "\t"}, {"quoting": csv.QUOTE_ALL, "delimiter": ";"}):
        write_csv(tmp_path / "a.csv", rows, **options)
        assert read(str(tmp_path / "a.csv"))[0] == TEXTS
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbf"text",id\r\n\r\n"a\r\nb",1\r\nc,2')
    assert read(str(tmp_path / "a.csv"))[0] == ["a\nb", "c"]
    limit = csv.field_size_limit()
    assert limit < len(TEXTS[3]) and csv.field_size_limit() == limit  # what a process has set is left
    (tmp_path / "a.csv").write_text("\n")
    assert read(str(tmp_path / "a.csv")) == ([], [])


def test_columns_of_parquet(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    texts = [text for text in TEXTS for _ in range(20)]
    for kind in (arrow.string(), arrow.large_string(), arrow.binary()):
        column = arrow.array([None, *(texts if kind != arrow.binary() else map(str.encode, texts))], kind)
        parquet.write_table(arrow.table({"text": column}), file, row_group_size=7)
        assert read(str(file))[0] == texts
    parquet.write_table(arrow.table({"text": arrow.array(texts).dictionary_encode()}), file)
    assert read(str(file))[0] == texts
    parquet.write_table(arrow.table({"text": arrow.array([b"one", b"a\xff"])}), file)
    with pytest.raises(ValueError, match=r"a.parquet, row 2 is not UTF-8 text: byte 0xff at position 1"):
        list(read_source(str(file)))
    write_parquet(file, [{"text": 3}])
    with pytest.raises(ValueError, match='a.parquet: column "text" must hold strings, it holds int64'):
        list(read_source(str(file)))
    write_parquet(file, [{"text": text} for text in texts])
    whole = file.read_bytes()
    file.write_bytes(whole[:100] + b"\x00" * (len(whole) - 2000) + whole[len(whole) - 1900 :])
    with pytest.raises(ValueError, match="a.parquet is damaged"):
        list(read_source(str(file)))
    assert read(str(tmp_path))[1][0].startswith("1 of 1 files left out: 1 damaged (first: ")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    root = tmp_path_factory.mktemp("saved")
    one = datasets.Dataset.from_dict({"id": list(range(6)), "text": [*TEXTS, None, ""]})
    one.save_to_disk(root / "one")
    other = datasets.Dataset.from_dict({"text": ["held out"], "body": ["body"]})
    datasets.DatasetDict({"train": one, "test": other}).save_to_disk(root / "splits")
    datasets.DatasetDict({"a": other, "b": other}).save_to_disk(root / "no train")
    one.select([2, 0]).save_to_disk(root / "order", num_shards=2)
    return root


def test_saved_datasets(saved, tmp_path):
    for source in (
        f"hf:{saved}/one",
        f"{saved}/one",
        f"hf:{saved}/splits",
        f"{saved}/splits",
        f"hf:{saved}/splits#train",
    ):
        assert read(source) == (TEXTS, [])
    assert read(f"hf:{saved}/splits#test") == (["held out"], [])
    assert read(f"hf:{saved}/splits#test", text_column="body") == (["body"], [])
    assert read(f"hf:{saved}/order") == ([TEXTS[2], TEXTS[0]], [])
    shutil.copytree(saved / "one", tmp_path / "one#two")
    assert read(f"hf:{tmp_path}/one#two") == (TEXTS, [])
    (tmp_path / "one#two" / "data-00000-of-00001.arrow").write_bytes(b"junk" * 99)
    for source, error, match in (
        (f"dir:{saved}/one", ValueError, f"one is a saved dataset: hf:{saved}/one reads it"),
        (f"dir:{saved}/splits", ValueError, f"splits is a saved dataset: hf:{saved}/splits reads it"),
        (f"hf:{saved}/splits#dev", ValueError, r"has no split dev; there is train, test \(hf:PATH#SPLIT\)"),
        (f"hf:{saved}/no train", ValueError, r"has no split train; there is a, b"),
        (f"hf:{saved}/one#train", ValueError, "one is one split, which has no name: leave out #train"),
        ("hf:wikitext", FileNotFoundError, r"wikitext is not a folder; hf:PATH reads what datasets\.load_dataset"),
        (f"hf:{saved}", ValueError, "is no dataset of save_to_disk; dir:PATH reads parquet, csv and jsonl"),
        (f"hf:{tmp_path}/one#two", ValueError, "one#two is damaged: "),
    ):
        with pytest.raises(error, match=match):
            open_sources([source])
    with pytest.raises(ValueError, match='one: expected a column "body"; there is id, text'):
        open_sources([f"hf:{saved}/one"], text_column="body")
    with pytest.raises(ValueError, match='one: column "id" must hold strings, it holds int64'):
        open_sources([f"hf:{saved}/one"], text_column="id")
    shutil.copytree(saved / "one", tmp_path / "in" / "one")
    (tmp_path / "in" / "a.txt").write_text("text")
    texts, (said,) = read(f"dir:{tmp_path}/in")
    assert texts == ["text"]
    assert (
        said == f"3 of 4 files left out: 3 in a saved dataset (first: {tmp_path}/in/one: hf:{tmp_path}/in/one reads it)"
    )


def test_folders_that_are_no_text(tmp_path):
    kinds = {
        "a prepared corpus": ("corpus.json", "tokenizer.json", "train.bin"),
        "a checkpoint": ("config.json", "model.safetensors", "tokenizer.json"),
        "a tokenizer": ("tokenizer.json", "special_tokens_map.json", "README.md"),
    }
    for kind, names in kinds.items():
        folder = tmp_path / kind.split()[-1]
        folder.mkdir()
        for name in names:
            (folder / name).write_text("{}")
        for source in (f"dir:{folder}", str(folder)):
            with pytest.raises(ValueError, match=f"{folder.name} is {kind}, "):
                open_sources([source])
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "tokenizer.json").write_text("{}")
    texts, (said,) = read(str(tmp_path))
    assert texts == ["text", "{}"]  # a file like another beside text
    assert said.startswith("9 of 11 files left out: 3 in a checkpoint (first: ")


@pytest.mark.parametrize(
    "module, source", [("pyarrow", "a.parquet"), ("datasets", "saved"), ("zstandard", "a.txt.zst")]
)
def test_missing_packages_name_the_extra(module, source, tmp_path, saved, monkeypatch):
    write_parquet(tmp_path / "a.parquet", [{"text": "one"}])
    (tmp_path / "a.txt").write_text("text")
    pack(tmp_path / "a.txt", ".zst")
    shutil.copytree(saved / "one", tmp_path / "saved")
    monkeypatch.setitem(sys.modules, module, None)
    for name in [tmp_path / source] if module == "datasets" else [tmp_path / source, tmp_path]:
        with pytest.raises(ImportError, match=r"pip install 'illada\[data\]'"):
            list(read_source(str(name)))


def test_several_sources_make_one_corpus(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for i in range(20):
        (tmp_path / "in" / f"{i}.MD").write_text(f"document {i} of the first source " * 9)
    write_csv(tmp_path / "b.csv", [{"body": f"row {i} of the second " * 9} for i in range(20)])
    pack(tmp_path / "b.csv", ".gz")
    names = [f"dir:{tmp_path}/in", f"csv:{tmp_path}/b.csv.gz"]
    header = prepare(names, tmp_path / "c", vocab_size=300, text_column="body", validation_fraction=0.3, progress=False)
    assert [source["name"] for source in header["sources"]] == names
    assert sum(source["documents"] for source in header["sources"]) >= 40
    options = [option for name in names for option in ("--source", name)]
    options += ["--out", str(tmp_path / "e"), "--vocab-size", "300", "--validation-fraction", "0.3"]
    assert cli.main(["prepare", *options, "--text-column", "body"]) == 0
    said = capsys.readouterr().out
    assert all(f"documents of {name}\n" in said for name in names)
    assert json.loads((tmp_path / "e" / "corpus.json").read_text()) == header
    assert cli.main(["prepare", *options, "--overwrite"]) == 2
    assert "(--text-column NAME chooses one)" in capsys.readouterr().err
    with pytest.raises(ValueError, match='b.csv.gz, line 1: expected a column "text"; there is body'):
        prepare(names, tmp_path / "d", vocab_size=300)
    with pytest.raises(ValueError, match="has 1 documents, too little text"):
        (tmp_path / "one.txt").write_text("a")
        prepare([str(tmp_path / "one.txt")], tmp_path / "d", vocab_size=300)
    assert not (tmp_path / "d").exists()


@pytest.mark.slow
@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["txt", *WRITERS])
def test_memory_does_not_grow_with_a_file(kind, packed, tmp_path):
    """Of 200 MB in a file, in records of 10 KB: parquet in one group of rows."""
    line = "".join(f"{i * i % 9973} words of line {i}, " for i in range(40_000))
    file = tmp_path / f"a.{kind}"
    rows = [{"text": f"{i} {line[i * 40 : i * 40 + 10_000]}"} for i in range(20_000)]
    if kind == "parquet":
        write_parquet(file, rows, row_group_size=len(rows), use_dictionary=False, compression="none")
    elif kind == "txt":
        file.write_text("\n".join(row["text"] for row in rows))
    else:
        WRITERS[kind](file, rows)
    if packed:
        file = pack(file, packed)
    script = (
        "import re, sys; from illada.data.sources import open_sources\n"
        "def most(): return int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]) // 1024\n"
        "(one,) = open_sources([sys.argv[1]]); documents = one.documents(); next(documents); start = most()\n"
        "size = sum(len(piece) for document in documents for piece in document)\n"
        "print(one.count, size > 1.9e8 or one.count == 1, most() - start)"
    )
    run = subprocess.run([sys.executable, "-c", script, str(file)], capture_output=True, text=True, check=True)
    count, whole, grown = run.stdout.split()
    assert (count, whole) == ("1" if kind == "txt" else "20000", "True") and int(grown) < 50, run.stdout


def test_a_source_that_is_given_twice(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path)
    for again in (str(tmp_path) + "/", f"dir:{tmp_path}", str(tmp_path / "link")):
        with pytest.raises(ValueError, match="is '.*' once more"):
            open_sources([str(tmp_path), again])
    with pytest.raises(ValueError, match="source 'stdlib' is 'stdlib' once more"):
        open_sources(["stdlib", "stdlib"])
