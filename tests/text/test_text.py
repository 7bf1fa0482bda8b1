"""The one reader of text and JSON."""

import gzip
import io
import os
import sys

import pytest

from illada.text.files import (
    InputError,
    check_text,
    decode_lines,
    decode_text,
    parse_json,
    read_json,
    read_lines,
    read_pieces,
    read_text,
)

BAD_FILES = {
    "latin1": (
        b"one\ntw\xf6\n",
        r", line 2 is not UTF-8 text: byte 0xf6 at position 6; it looks like a one-byte encoding",
    ),
    "cut": (b"one\n\xe2\x82", r", line 2 is not UTF-8 text: byte 0xe2 at position 4$"),
    "utf16": (
        "one\n".encode("utf-16"),
        r" is not UTF-8 text: it looks like UTF-16; convert it to UTF-8, .*iconv -f UTF-16 -t UTF-8",
    ),
    "utf16-le": ("one\n".encode("utf-16-le"), r"it looks like UTF-16 without a byte order mark; .* -f UTF-16LE "),
    "utf32": ("one\n".encode("utf-32"), r"it looks like UTF-32"),
    "gzip": (gzip.compress(b"one\n"), r"is compressed \(gzip\), not text; unpack it first"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:01\n", r"is a Git LFS pointer, not the file"),
    "zstd": (b"\x28\xb5\x2f\xfd\x00\x00", r"is compressed \(zstd\)"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_what_is_not_utf8_names_the_file_and_what_it_looks_like(kind, tmp_path):
    data, match = BAD_FILES[kind]
    (tmp_path / "input").write_bytes(data)
    for read in (read_text, lambda path: list(read_lines(path))):
        with pytest.raises(ValueError, match=r"input" + ".*" + match):
            read(tmp_path / "input")


def test_marks_and_ends_of_lines(tmp_path):
    file = tmp_path / "input"
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rtwo\x0c\xe2\x80\xa8two\n\n\xef\xbb\xbffour")
    assert read_text(file) == "one\ntwo\rtwo\x0c\u2028two\n\n\ufefffour"
    lines = list(read_lines(file))
    assert [text for _, text in lines] == ["one", "two\rtwo\x0c\u2028two", "", "\ufefffour"]
    assert lines[1][0] == f"{file}, line 2"
    assert decode_text(b"", "x") == "" and list(decode_lines(io.BytesIO(b""), "x")) == []
    assert decode_text(b"a\x00b", "x") == "a\x00b"  # one NUL is odd text, but text


def test_lines_of_a_pipe():
    """As of --prompt-file <(command)."""
    reader, writer = os.pipe()
    try:
        os.write(writer, b"\xef\xbb\xbfone\ntwo\n")
        os.close(writer)
        assert [text for _, text in read_lines(f"/dev/fd/{reader}")] == ["one", "two"]
    finally:
        os.close(reader)


@pytest.mark.parametrize("text, match", [
    ("[" * 100_000, "nested too deeply"),
    ('{"a":' * 100_000, "nested too deeply"),
    ('{"a": "\\ud83d"}', r"half of a surrogate pair \(\\ud83d\)"),
    ('["\\uDE00\\uD83D"]', r"half of a surrogate pair \(\\ude00\)"),
    ("{", "is not JSON: "),
    ("9" * 5000, "is not JSON: Exceeds the limit"),
])  # fmt: skip
def test_json_that_cannot_be_read_names_its_place(text, match, tmp_path):
    with pytest.raises(ValueError, match="f.jsonl, line 3 .*" + match):
        parse_json(text, "f.jsonl, line 3")
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="x.json .*" + match):
        read_json(tmp_path / "x.json")


def test_json_that_can_be_read():
    assert parse_json('{"a": ["\\ud83d\\ude00", "\\\\ud83d"]}', "x") == {"a": ["\U0001f600", "\\ud83d"]}


def test_lone_surrogates():
    assert check_text("é\U0001f600", "--prompt") == "é\U0001f600"
    with pytest.raises(ValueError, match="--prompt is not UTF-8 text: byte 0xff at character 1"):
        check_text("a" + b"\xff".decode("utf-8", "surrogateescape"), "--prompt")
    with pytest.raises(ValueError, match=r"half of a surrogate pair, \\ud83d at character 0"):
        check_text("\ud83d", "--prompt")


def zstd(*frames):
    packer = pytest.importorskip("zstandard").ZstdCompressor()
    return b"".join(packer.compress(frame) for frame in frames)


@pytest.mark.parametrize("pack", [gzip.compress, zstd], ids=["gzip", "zstd"])
def test_compressed_text_is_read_where_it_is_asked_for(pack, tmp_path):
    file, lines = tmp_path / "input", [f"line {i} é" for i in range(50_000)]
    text = "\n".join(lines)
    file.write_bytes(pack(text[:99_999].encode()) + pack(text[99_999:].encode()))  # one after the other, as cat makes
    assert "".join(read_pieces(file, unpack=True)) == text
    assert [line for _, line in read_lines(file, unpack=True)] == lines
    assert next(read_lines(file, unpack=True)) == (f"{file}, line 1", lines[0])  # and closes what it leaves
    whole = pack(text.encode())
    for damaged in (whole[:-3], whole[: len(whole) // 2], whole + b"junk"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"input is (damaged|cut)"):
            "".join(read_pieces(file, unpack=True))
    file.write_bytes(pack(b"ab\xff"))
    with pytest.raises(ValueError, match="input, line 1 is not UTF-8 text: byte 0xff at position 2"):
        list(read_lines(file, unpack=True))
    file.write_bytes(pack(pack(b"text")))
    with pytest.raises(ValueError, match=r"input is compressed \((gzip|zstd)\), not text; unpack it first"):
        list(read_lines(file, unpack=True))
    file.write_bytes(pack(b""))
    assert list(read_lines(file, unpack=True)) == [] == list(read_pieces(file, unpack=True))


def test_frames_of_zstd_that_hold_no_text(tmp_path):
    skipped = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    (tmp_path / "input").write_bytes(skipped + zstd(b"one ") + skipped + zstd(b"two"))
    assert "".join(read_pieces(tmp_path / "input", unpack=True)) == "one two"


def test_zstd_without_its_package_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "input").write_bytes(zstd(b"one"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ImportError, match=r"input is compressed with zstd: pip install 'illada\[data\]'"):
        list(read_lines(tmp_path / "input", unpack=True))


def test_positions_are_in_the_file(tmp_path):
    """Beyond a block, after a mark, and within a character that two blocks share."""
    for text in (b"a" * (1 << 16), b"a" * ((1 << 16) - 1), b"\xef\xbb\xbf" + b"b\n" * 40_000):
        for bad in (b"\xff", b"\xe2\x82a"):
            (tmp_path / "input").write_bytes(text + bad)
            for read in (read_pieces, read_lines):
                with pytest.raises(InputError, match=f" at position {len(text)}(;|$)") as error:
                    list(read(tmp_path / "input"))
                assert error.value.reason == "not UTF-8"
