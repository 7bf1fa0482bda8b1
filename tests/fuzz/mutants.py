"""Damaged files, made of valid ones: keys and values of JSON and TOML, templates by their grammar, numbers, bytes."""

import json
import struct
import tomllib

import numpy as np
from hypothesis import strategies as st


class Raw(str):
    """Text that is written into a JSON or TOML file as it is."""


def _deep(begin, end, middle=""):
    return st.sampled_from([3, 100, 3000, 100_000]).map(lambda n: Raw(begin * n + middle + end * n))


ODD_NUMBERS = [
    "0", "-1", "1", "2", "0.0", "-0.0", "0.5", "1e3", "1e308", "-1e308", "1e400", "4096", "65536", "2147483647", "2147483648",
    "4294967295", "4294967296", "9223372036854775807", "9223372036854775808", "18446744073709551615", "18446744073709551616",
    "-9223372036854775808", "1000000000", "1000000000000", "1e-320", "1" + "0" * 400, "1" * 4400,
]  # fmt: skip
ODD_TEXTS = [
    "",
    "a",
    "0",
    "-1",
    "../x",
    "/etc/passwd",
    "model.safetensors",
    "\x00",
    "\ud83d",
    "é" * 300,
    "%d %s {}",
    "a\nb",
    "None",
    "F64",
]
ODD_JSON = (
    st.sampled_from(
        [
            Raw(n)
            for n in (
                *ODD_NUMBERS,
                "NaN",
                "Infinity",
                "-Infinity",
                "null",
                "true",
                "false",
                "[]",
                "{}",
                "[[]]",
                "[null]",
                '{"a": 1}',
                "",
            )
        ]
    )
    | st.sampled_from(ODD_TEXTS)
    | st.integers(-300, 300)
    | _deep("[", "]")
    | _deep('{"a":', "}", "1")
)
ODD_TOML = (
    st.sampled_from([Raw(n) for n in (*ODD_NUMBERS, "nan", "-inf", "inf", "true", "false", "[]", "{}", "[[]]", "{a = 1}", "", "1979-05-27", "07:32:00", "1979-05-27T07:32:00Z", "0x10", "'cpu'", '"""a\nb"""', "cosine", "1 # a", "1, 2")])
    | st.sampled_from([text for text in ODD_TEXTS if text.isprintable()])
    | st.integers(-300, 300)
    | _deep("[", "]")
    | _deep("{a=", "}", "1")
)  # fmt: skip


def dump(value):
    """Return a value as JSON, with `Raw` as it is."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {dump(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dump, value)) + "]"
    return json.dumps(value)


@st.composite
def changed(draw, value, odd):
    """A tree of objects and lists with one place changed."""
    if isinstance(value, dict | list) and value and draw(st.integers(0, 5)):
        value = value.copy()
        key = draw(st.sampled_from(list(value))) if isinstance(value, dict) else draw(st.integers(0, len(value) - 1))
        what = draw(st.sampled_from(["into", "into", "into", "drop", "rename", "double"]))
        if what == "into":
            value[key] = draw(changed(value[key], odd))
        elif what == "drop":
            del value[key]
        elif isinstance(value, list):
            value.insert(draw(st.integers(0, len(value))), draw(odd) if what == "rename" else value[key])
        else:
            other = draw(st.sampled_from([*value, "model_type", "x"]))
            value[other] = value.pop(key) if what == "rename" else value[key]
        return value
    how = draw(st.sampled_from(["odd", "odd", "odd", "list", "object", "text", "more"]))
    if how == "list":
        return [value]
    if how == "object":
        return {"a": value}
    if how == "text" and not isinstance(value, dict | list):
        return str(value)
    if how == "more" and isinstance(value, int | float | str) and not isinstance(value, bool | Raw):
        return value * draw(st.sampled_from([-1, 2, 1000] if isinstance(value, int | float) else [0, 2, 1000]))
    return draw(odd)


@st.composite
def changed_often(draw, value, odd):
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        value = draw(changed(value, odd))
    return value


@st.composite
def damaged(draw, data):
    """Return bytes that are cut, flipped, doubled, or of another encoding or kind."""
    how = draw(st.sampled_from(["cut", "flip", "insert", "double", "none", "utf-16", "bom", "gzip", "random"]))
    at = draw(st.integers(0, len(data)))
    if how == "cut":
        return data[:at]
    if how == "flip":
        return data[:at] + draw(st.binary(min_size=1, max_size=4)) + data[at + 1 :]
    if how == "insert":
        odd = [b"\x00", b"\xff", b"\n", b"\r", b'"', b"{", b"[", b"\\ud83d", b"\xed\xa0\x80", b"%}", b"\xe2\x80\xa8"]
        return data[:at] + draw(st.sampled_from(odd)) + data[at:]
    if how == "double":
        return data[:at] + data[draw(st.integers(0, at)) :]
    if how == "utf-16":
        return data.decode(errors="replace").encode("utf-16")
    if how == "random":
        return draw(st.binary(max_size=40))
    return {"none": b"", "bom": b"\xef\xbb\xbf" + data, "gzip": b"\x1f\x8b" + data}[how]


@st.composite
def json_file(draw, data):
    """A JSON file: its tree changed in five of six, else its bytes."""
    if draw(st.integers(0, 5)):
        return dump(draw(changed_often(json.loads(data), ODD_JSON))).encode(errors="surrogatepass")
    return draw(damaged(data))


@st.composite
def jsonl_file(draw, data):
    """Return lines of JSON, with one of them or their order changed."""
    lines = data.split(b"\n")
    at = draw(st.integers(0, len(lines) - 1))
    how = draw(st.sampled_from(["line", "line", "line", "drop", "double", "join", "bytes"]))
    if how == "line":
        lines[at] = draw(json_file(lines[at] or b"{}"))
    elif how == "drop":
        del lines[at]
    elif how == "double":
        lines.insert(draw(st.integers(0, len(lines))), lines[at])
    elif how == "bytes":
        return draw(damaged(data))
    return draw(st.sampled_from([b"\n", b"\n", b"\r\n", b"\n\n", b"\x00"] if how != "join" else [b"", b" "])).join(
        lines
    )


def lines_of(data, pieces):
    """Return lines of fields between spaces, some of them changed."""

    @st.composite
    def strategy(draw):
        lines = data.decode().split("\n")
        for _ in range(draw(st.integers(1, 3))):
            at = draw(st.integers(0, len(lines) - 1))
            fields = lines[at].split(" ")
            place = draw(st.integers(0, len(fields) - 1))
            how = draw(st.sampled_from(["set", "drop", "swap", "line"]))
            if how == "set":
                fields[place] = draw(pieces)
            elif how == "drop":
                del fields[place]
            elif how == "swap":
                fields.append(fields.pop(place))
            lines[at] = draw(st.sampled_from(lines)) if how == "line" else " ".join(fields)
        return "\n".join(lines).encode(errors="surrogatepass")

    return strategy() | damaged(data)


@st.composite
def toml_file(draw, data):
    """A TOML file."""
    if not draw(st.integers(0, 5)):
        return draw(damaged(data))
    values = draw(changed_often(tomllib.loads(data.decode()), ODD_TOML))
    if not isinstance(values, dict):
        return dump(values).encode(errors="surrogatepass")
    lines = []
    for section, keys in values.items():
        if isinstance(keys, dict):
            lines.append(f"[{section}]")
            lines += [f"{key} = {_toml(value)}" for key, value in keys.items()]
        else:
            lines.insert(0, f"{section} = {_toml(keys)}")
    return "\n".join(lines).encode(errors="surrogatepass")


def _toml(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(part)}" for key, part in value.items()) + "}"
    return "[" + ", ".join(map(_toml, value)) + "]" if isinstance(value, list) else dump(value)


@st.composite
def settings_lines(draw, data):
    """Return lines of --section.key=value."""
    lines = data.decode().split("\n")
    names = [line.partition("=")[0] for line in lines] + [
        "--train.steps", "--train.out_dir", "--train.seed", "--optimizer.clip_norm", "--optimizer.beta1", "--schedule.decay",
        "--diffusion.x", "--model.preset", "--model.head_dim", "--model.model_type", "--model.mask_token_id", "--train.device",
        "--validation.every", "--data.window", "--data.path", "--model.tie_word_embeddings", "--model.rope_theta", "--a.b.c", "--=", "",
    ]  # fmt: skip
    for _ in range(draw(st.integers(1, 3))):
        value = draw(ODD_TOML | st.text(max_size=5))
        lines.append(
            f"{draw(st.sampled_from(names))}={_toml(value) if draw(st.booleans()) else value}".replace("\n", " ")
        )
    return "\n".join(lines).encode(errors="surrogatepass")


@st.composite
def safetensors_file(draw, data):
    """A safetensors file: its header's length, its tree, or its bytes changed."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    how = draw(st.sampled_from(["header", "header", "header", "length", "body", "bytes", "layout", "numbers"]))
    if how == "bytes":
        return draw(damaged(data))
    if how == "body":
        body = draw(damaged(body))
    if how == "numbers":  # values that no run leaves: NaN, infinite, huge, negative
        at = draw(st.integers(0, len(body) // 4 - 1)) * 4
        odd = draw(st.sampled_from([float("nan"), float("inf"), 3e38, -3e38, 1e-45, -1.0]))
        body = body[:at] + struct.pack("<f", odd) + body[at + 4 :]
    names = [name for name in header if name != "__metadata__"]
    if how == "layout":  # consistent, and another shape or dtype
        name = draw(st.sampled_from(names))
        begin, end = header[name]["data_offsets"]
        dtype, width = draw(st.sampled_from([("F32", 4), ("F16", 2), ("BF16", 2), ("I32", 4), ("U8", 1), ("F8_E4M3", 1), ("F64", 8), ("BOOL", 1)]))  # fmt: skip
        count = (end - begin) // width
        shape = draw(
            st.sampled_from(
                [[count], [1, count], [count, 1], [2, count // 2], [], [count, 0], header[name]["shape"][::-1]]
            )
        )
        header[name] = {**header[name], "dtype": dtype, "shape": shape}
    text = dump(draw(changed_often(header, ODD_JSON)) if how == "header" else header).encode(errors="surrogatepass")
    length = len(text)
    if how == "length":
        length = draw(
            st.sampled_from([0, 1, length - 1, length + 1, len(data), 1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1])
        )
    return struct.pack("<Q", length) + text + body


def numbers_file(data, dtype):
    """An array of numbers: entries set, moved, doubled or lost."""

    @st.composite
    def strategy(draw):
        values = np.frombuffer(data, dtype).copy()
        top = np.iinfo(dtype).max
        for _ in range(draw(st.integers(1, 3))):
            at = draw(st.integers(0, len(values) - 1))
            values[at] = draw(
                st.sampled_from([0, 1, 5, 261, 262, top // 2, top - 1, top, int(values[at]) + 1 & top, int(values[-1])])
            )
        if draw(st.booleans()):
            other = draw(st.integers(0, len(values) - 1))
            values[at], values[other] = values[other], values[at]
        return values.tobytes()

    return strategy() | damaged(data)


# ------------------------------------------------------------------------------------------------------------- templates

_NAMES = st.sampled_from(["messages", "message", "messages[0]", "message.content", "loop", "x", "m", "namespace()", "range(9)",
                          "loop.index0", "bos_token", "tools", "strftime_now", "raise_exception", "dict(a=1)", "lipsum()", "cycler('a', 'b')",
                          "joiner()", "none", "true", "self", "caller", "''.__class__", "(messages | list)", "x.y.z", "namespace"])  # fmt: skip
_LITERALS = st.sampled_from(["0", "1", "-1", "3", "1.5", "1e308", "100000", "1000000000", "10**9", "9**9**9", "1000000000000000000000", "'a'",
                             "'é '", "'%d'", "'%1000000000d'", "'%*d'", "'{:1000000000}'", "'{0:{1}}'", "'%s'", "[]", "[1, 2]", "{}", "{'a': 1}",
                             "'{}'", "''", "(1, 2)", "'a' * 100000", "[0] * 100000", "'\\ud83d'", "'%Y' * 1000"])  # fmt: skip
_FILTERS = ["abs", "attr", "batch", "capitalize", "center", "count", "default", "dictsort", "e", "escape", "filesizeformat", "first", "float",
            "forceescape", "format", "groupby", "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "pprint",
            "random", "reject", "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "slice", "sort", "string",
            "striptags", "sum", "title", "tojson", "trim", "truncate", "unique", "upper", "urlencode", "urlize", "wordcount", "wordwrap", "xmlattr"]  # fmt: skip
_METHODS = ["format", "split", "strip", "replace", "join", "ljust", "rjust", "zfill", "center", "items", "get", "keys", "upper", "startswith",
            "append", "encode", "expandtabs", "translate", "format_map", "splitlines", "update", "to_bytes", "bit_length", "rsplit", "copy"]  # fmt: skip
_OPERATORS = ["+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "not in", "and", "or", "is", "|"]


def _longer(inner):
    arguments = st.lists(inner, max_size=3).map(", ".join)
    return st.one_of(
        st.tuples(inner, st.sampled_from(_OPERATORS), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        st.tuples(inner, st.sampled_from(_FILTERS), arguments).map(lambda t: f"({t[0]} | {t[1]}({t[2]}))"),
        st.tuples(inner, st.sampled_from(_METHODS), arguments).map(lambda t: f"{t[0]}.{t[1]}({t[2]})"),
        st.tuples(inner, inner).map(lambda t: f"{t[0]}[{t[1]}]"),
        st.tuples(inner, inner, inner).map(lambda t: f"({t[0]} if {t[1]} else {t[2]})"),
        st.tuples(inner, arguments).map(lambda t: f"{t[0]}({t[1]})"),
        st.tuples(inner, inner).map(lambda t: f"{t[0]}[{t[1]}:]"),
        inner.map(lambda e: f"({e} is none)"),
        inner.map(lambda e: f"(-{e})"),
    )


EXPRESSIONS = st.recursive(_NAMES | _LITERALS, _longer, max_leaves=6)


def _blocks(inner):
    e = EXPRESSIONS
    return st.one_of(
        st.tuples(e, inner).map(lambda t: f"{{% for x in {t[0]} %}}{t[1]}{{% endfor %}}"),
        st.tuples(e, inner, inner).map(lambda t: f"{{% if {t[0]} %}}{t[1]}{{% else %}}{t[2]}{{% endif %}}"),
        st.tuples(inner, e).map(lambda t: f"{{% macro m(x) %}}{t[0]}{{% endmacro %}}{{{{ m({t[1]}) }}}}"),
        inner.map(lambda t: f"{{% set x %}}{t}{{% endset %}}{{{{ x }}}}"),
        inner.map(lambda t: f"{{% for x in range(9) %}}{t}{{% endfor %}}"),
        inner.map(lambda t: f"{{% for x in messages recursive %}}{t}{{{{ loop([1]) }}}}{{% endfor %}}"),
        inner.map(lambda t: f"{{% generation %}}{t}{{% endgeneration %}}"),
        st.tuples(st.sampled_from(_FILTERS), inner).map(lambda t: f"{{% filter {t[0]} %}}{t[1]}{{% endfilter %}}"),
        st.tuples(inner, inner).map("".join),
    )


_SIMPLE = st.one_of(
    EXPRESSIONS.map(lambda e: f"{{{{ {e} }}}}"),
    EXPRESSIONS.map(lambda e: f"{{% set x = {e} %}}"),
    EXPRESSIONS.map(lambda e: f"{{% set ns.x = {e} %}}"),
    st.sampled_from(["text\n", "{% break %}", "{% continue %}", "{{ m(x) }}", "{{", "{%", "{#", "{% raw %}", "{% include 'a' %}",
                     "{% extends 'a' %}", "{% import 'a' as b %}", "{% block a %}", "{% call m(1) %}a{% endcall %}", "{{ self.a() }}",
                     "{% set x = x ~ x %}", "{% set x = x + x %}",
                     "{{ '" + "(" * 500 + "' }}", "{{ " + "(" * 500 + "1" + ")" * 500 + " }}", "{{ " + "-" * 5000 + "1 }}"]),
)  # fmt: skip
_STATEMENTS = st.recursive(_SIMPLE, _blocks, max_leaves=5)


@st.composite
def template_file(draw, data):
    """A chat template with some of the grammar in it, or its bytes damaged."""
    if not draw(st.integers(0, 3)):
        return draw(damaged(data))
    text = data.decode()
    at = draw(st.sampled_from([0, text.index("{% endfor %}"), len(text)]))
    return (text[:at] + draw(_STATEMENTS) + text[at:]).encode(errors="surrogatepass")


def new_template(data):
    """A chat template of the grammar alone."""
    return _STATEMENTS.map(lambda text: text.encode(errors="surrogatepass"))


@st.composite
def tokenizer_file(draw, data):
    """A tokenizer.json, its parts of other kinds, too, than a trained one has."""
    tree = json.loads(data)
    parts = {
        "normalizer": [None, {"type": "NFC"}, {"type": "Sequence", "normalizers": []}, {"type": "Prepend", "prepend": ""},
                       {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}, {"type": "Precompiled", "precompiled_charsmap": "AAAA"}],
        "pre_tokenizer": [None, {"type": "Whitespace"}, {"type": "Digits", "individual_digits": True}, {"type": "FixedLength", "length": 0},
                          {"type": "Split", "pattern": {"Regex": "(?=)"}, "behavior": "Isolated", "invert": False}],
        "post_processor": [None, {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "pair": [], "special_tokens": {}},
                           {"type": "BertProcessing", "sep": ["x", 1 << 31], "cls": ["y", 0]}, {"type": "RobertaProcessing", "sep": ["x", 1], "cls": ["y", 2], "trim_offsets": True, "add_prefix_space": False}],
        "decoder": [None, {"type": "Strip", "content": " ", "start": 1 << 40, "stop": 1}, {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True}, {"type": "WordPiece", "prefix": "", "cleanup": True}],
        "truncation": [{"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 9}],
        "padding": [{"strategy": {"Fixed": 1 << 30}, "direction": "Left", "pad_to_multiple_of": 8, "pad_id": 1 << 31, "pad_type_id": 0, "pad_token": "x"}],
        "model": [{"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}, {"type": "Unigram", "unk_id": 9, "vocab": [["a", -1.0]], "byte_fallback": False},
                  {"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0], ["", -1.0]], "byte_fallback": True},
                  {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "b", "continuing_subword_prefix": "##", "max_input_chars_per_word": 0},
                  {"type": "BPE", "vocab": {"a": 4294967295, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
                  {"type": "BPE", "vocab": {"a": 0}, "merges": [], "dropout": 2.0, "unk_token": "x", "fuse_unk": True, "byte_fallback": True}],
    }  # fmt: skip
    if draw(st.booleans()):
        name = draw(st.sampled_from(list(parts)))
        tree[name] = draw(st.sampled_from(parts[name]))
        if draw(st.booleans()):
            return dump(tree).encode()
    return draw(json_file(dump(tree).encode()))
