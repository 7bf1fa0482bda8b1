"""The one reader of text and JSON."""

import gzip
import io
import os

import pytest

from illada.text.files import check_text, decode_lines, decode_text, parse_json, read_json, read_lines, read_text

BAD_FILES = {
    "latin1": (b"one\ntw\xf6\n", r", line 2 is not UTF-8 text: byte 0xf6; it looks like a one-byte encoding"),
    "cut": (b"one\n\xe2\x82", r", line 2 is not UTF-8 text: byte 0xe2$"),
    "utf16": ("one\n".encode("utf-16"), r" is not UTF-8 text: it looks like UTF-16; convert it"),
    "utf16-le": ("one\n".encode("utf-16-le"), r"it looks like UTF-16 without a byte order mark"),
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
