"""generate, chat and agreement on the command line."""

import io
import json
from types import SimpleNamespace

import pytest
import torch

from illada import cli
from illada.checkpoints.folders import load
from illada.checkpoints.weights import load_pretrained, save_pretrained
from illada.cli import chat
from illada.cli.devices import parse_device
from illada.cli.sampling import parse_token_ids
from illada.config import ModelConfig
from illada.generation.stopping import settled_text
from illada.model import MaskedDiffusionModel
from illada.score import encode_pair
from illada.text.training import train_tokenizer

TEMPLATE = (
    "{% for m in messages %}<[begin▁of▁sentence]>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A checkpoint with random weights, a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("a model")
    config = ModelConfig.preset(
        "tiny", hidden_size=32, intermediate_size=48, num_attention_heads=4, vocab_size=300, initializer_range=0.3,
        max_position_embeddings=96,
    )  # fmt: skip
    train_tokenizer(["import os\ndef main():\n"] * 9, 300).save(str(folder / "tokenizer.json"))
    save_pretrained(MaskedDiffusionModel(config, seed=4), folder / "m", tokenizer=folder / "tokenizer.json")
    (folder / "m" / "chat_template.jinja").write_text(TEMPLATE)
    return folder / "m"


def run(capsys, *arguments):
    status = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


SHORT = ("--gen-length", 8, "--block-length", 4, "--steps", 4)


@pytest.mark.parametrize("options", [
    (), ("--mode", "fixed", "--steps", 8), ("--rule", "threshold", "--threshold", 0.2), ("--rule", "factor"),
    ("--rule", "entropy_bound", "--entropy-bound", 2), ("--rule", "origin"), ("--schedule", "dream", "--alg-temp", 0.5),
    ("--take-back", 0.3), ("--cfg-scale", 1.0), ("--cache", "prefix"), ("--cache", "block", "--no-cuda-graphs"),
    ("--measure", "margin"), ("--temperature", 1.0, "--seed", 3), ("--stop", "import"), ("--dtype", "bfloat16"),
    ("--end-think", "os", "--end-think-boost", 50, "--end-think-power", 1), ("--apply-chat-template",),
    ("--batch-size", 1), ("--device", "cpu"), ("--delay-tokens", "eos,7"), ("--forbid-tokens", "eos, mask,263"),
    ("--top-p", 0.5, "--temperature", 1), ("--top-k", 2, "--temperature", 1), ("--rule", "origin", "--eps", 0.5),
    ("--confidence-at-temperature", "--temperature", 1), ("--trust-remote-code",),
], ids=lambda o: " ".join(map(str, o)) or "published")  # fmt: skip
def test_generate_takes_every_option(capsys, path, options):
    status, out, _ = run(capsys, "generate", path, "--prompt", "import", "--prompt", "def", "--json", *SHORT, *options)
    records = [json.loads(line) for line in out.splitlines()]
    assert (
        status == 0
        and [r["prompt"] for r in records] == ["import", "def"]
        and all(len(r["tokens"]) <= 8 for r in records)
    )
    plain = run(capsys, "generate", path, "--prompt", "import", "--prompt", "def", "--json", *SHORT)[1]
    if options and options[0] in (
        "--take-back",
        "--cfg-scale",
        "--temperature",
        "--end-think",
        "--apply-chat-template",
    ):
        assert out != plain


def test_forbidden_and_delayed_tokens_are_ids_or_names(capsys, path):
    """LLaDA-Instruct's settings, by the names of this model's ids."""
    arguments = ("generate", path, "--prompt", "import", "--json", *SHORT)
    tokens = json.loads(run(capsys, *arguments)[1])["tokens"]
    status, out, _ = run(capsys, *arguments, "--forbid-tokens", f"eos,{tokens[0]}")
    assert status == 0 and tokens[0] not in json.loads(out)["tokens"]
    model = load_pretrained(path).config
    assert parse_token_ids("eos, 7,mask", model, "delay_tokens") == (2, 7, 5)
    assert parse_token_ids(None, model, "delay_tokens") == parse_token_ids("", model, "delay_tokens") == ()
    for given in ("eot", "</s>", "-1", "eos,", "1.5"):
        status, _, error = run(capsys, *arguments, "--delay-tokens", given)
        word = given.removeprefix("eos,")
        said = f"--delay-tokens takes ids and, of this model, eos (2), bos (0), pad (1), mask (5); got {word!r}"
        assert status == 2 and said in error and error.count("\n") == 1
    assert "holds token id 300, outside of [0, 300)" in run(capsys, *arguments, "--forbid-tokens", "300")[2]


def test_a_short_generation_is_one_block(capsys, path):
    for options in ((), ("--mode", "fixed")):
        status, out, _ = run(capsys, "generate", path, "--prompt", "import", "--json", "--gen-length", 12, *options)
        assert status == 0 and len(json.loads(out)["tokens"]) <= 12
    assert (
        "(48) must be a multiple of block_length (32)"
        in run(capsys, "generate", path, "--prompt", "x", "--gen-length", 48)[2]
    )


def test_options_without_effect_are_errors(capsys, path):
    for options, said in (
        (("--rule", "origin", "--measure", "entropy"), "measure ('entropy') is not used"),
        (("--threshold", "0.5"), "threshold (0.5) is not used: it belongs to rule threshold, got rule 'quota'"),
        (("--end-think-power", "3"), "end_think_power (3.0) is not used: it belongs to end_think_boost above 0"),
        (("--end-think", "foo"), "--end-think ('foo') is not used: it belongs to an --end-think-boost above 0"),
        (("--confidence-at-temperature",), "is not used: it belongs to a --temperature above 0"),
        (("--top-k", "9" * 20), "top_k must be below 2^63"),
    ):
        status, _, error = run(capsys, "generate", path, "--prompt", "x", *options)
        assert status == 2 and said in error


OWN = """
from transformers import PreTrainedTokenizer

class Own(PreTrainedTokenizer):
    def __init__(self, **keywords):
        self.units = [chr(32 + i) for i in range(96)]
        super().__init__(**keywords)

    @property
    def vocab_size(self):
        return 96

    def get_vocab(self):
        return {unit: i for i, unit in enumerate(self.units)}

    def _tokenize(self, text, **keywords):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.units.index(token)

    def _convert_id_to_token(self, index):
        return self.units[index % 96]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)
"""


def test_tokenizer_that_is_code(capsys, path, tmp_path, monkeypatch):
    """Dream's: vocab.json, merges.txt and a class of its own."""
    modules = pytest.importorskip("transformers.dynamic_module_utils")
    monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    save_pretrained(load_pretrained(path), folder)
    (folder / "tokenization_own.py").write_text(OWN)
    (folder / "vocab.json").write_text("{}")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", null]}}'
    )
    arguments = ("generate", folder, "--prompt", "import", *SHORT, "--json")
    status, _, error = run(capsys, *arguments)
    assert status == 2 and "is run only with trust_remote_code (--trust-remote-code)" in error
    assert not (tmp_path / "modules").exists()
    status, out, _ = run(capsys, *arguments, "--trust-remote-code")
    assert status == 0 and json.loads(out)["prompt"] == "import"


def test_generate_fills_masks(capsys, path):
    infill = ("--mode", "infill", "--prompt", "import <[MASK]><[MASK]> def")
    status, out, _ = run(capsys, "generate", path, *infill, "--special-tokens-in-prompt", "--json")
    record = json.loads(out)
    assert status == 0 and record["finish_reason"] == "filled" and record["text"].endswith(" def")
    status, _, err = run(capsys, "generate", path, *infill)  # as text it is no mask
    assert status == 2 and "holds no mask (id 5)" in err


def test_prompts_of_a_file(capsys, path, tmp_path):
    """One a line, which U+2028, a form feed or a lone CR do not end; a byte order mark is no part of it."""
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffim\u2028port\r\n\ndef\x0c\rx\n".encode())
    status, out, _ = run(capsys, "generate", path, "--prompt-file", file, "--json", *SHORT)
    assert status == 0
    assert [json.loads(line)["prompt"] for line in out.split("\n")[:-1]] == ["im\u2028port", "", "def\x0c\rx"]
    for content, match in ((b"", "holds no prompt"), (b"a\n\xff", "prompts.txt, line 2 is not UTF-8 text")):
        file.write_bytes(content)
        status, _, err = run(capsys, "generate", path, "--prompt-file", file, *SHORT)
        assert status == 2 and match in err and err.count("\n") == 1


def piped(data):
    return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")


def test_standard_input(capsys, path, monkeypatch):
    monkeypatch.setattr("sys.stdin", piped(b"\xef\xbb\xbfim\rport\r\n"))
    status, out, _ = run(capsys, "generate", path, "--json", *SHORT)
    assert status == 0 and json.loads(out)["prompt"] == "im\rport\n"
    for command, stdin, match in (
        ("generate", None, "standard input is closed, so there is no prompt"),
        ("agreement", None, "standard input is closed, so there is no prompt"),
        ("generate", piped(b"a\nb\xf6b"), "standard input, line 2 is not UTF-8 text: byte 0xf6"),
        ("agreement", piped("a".encode("utf-16")), "standard input is not UTF-8 text: it looks like UTF-16"),
    ):
        monkeypatch.setattr("sys.stdin", stdin)
        status, _, err = run(capsys, command, path, *SHORT)
        assert status == 2 and match in err and err.count("\n") == 1


def test_questions_that_cannot_be_read(capsys, path, tmp_path):
    file = tmp_path / "questions.jsonl"
    for line, match in (
        (
            b'{"context": ' + b"[" * 100_000,
            "questions.jsonl, line 2 is not JSON that can be read: it is nested too deeply",
        ),
        (b'{"context": "\\ud83d"}', "questions.jsonl, line 2 holds half of a surrogate pair"),
        (b'{"context": "\xf6l"}', "questions.jsonl, line 2 is not UTF-8 text: byte 0xf6"),
        (b"[]", 'questions.jsonl, line 2: expected {"context": '),
    ):
        file.write_bytes(b'\xef\xbb\xbf{"context": "a", "candidates": ["b"]}\n' + line)
        status, _, err = run(capsys, "score", path, "--file", file)
        assert status == 2 and match in err and err.count("\n") == 1, err


def test_score_keeps_the_bos_of_a_context_that_is_too_long(capsys, path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "illada.score.confidence_score",
        lambda model, contexts, *_, **__: seen.extend(contexts) or [SimpleNamespace(score=0.0) for _ in contexts],
    )
    long = ("--context", "import os " * 90, "--candidate", "def", "--truncate-left")
    for option, first in (((), False), (("--add-bos",), True)):
        seen.clear()
        assert run(capsys, "score", path, *long, *option)[0] == 0
        assert (seen[0][0] == 0) == first and 0 not in seen[0][1:] and 90 < len(seen[0]) < 96


def test_a_candidate_that_the_tokenizer_drops_names_its_line(capsys, path, tmp_path, monkeypatch):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"context": "a", "candidates": ["b"]}\n{"context": "a", "candidates": ["\\u0007"]}\n')
    pair = encode_pair
    monkeypatch.setattr(
        "illada.score.encode_pair", lambda t, context, text, **k: pair(t, context, text.strip("\a"), **k)
    )
    status, _, err = run(capsys, "score", path, "--file", file)
    assert status == 2 and f"{file}, line 2: candidate '\\x07' has no score after 'a'" in err


def test_arguments_that_are_not_utf8(capsys, path):
    bad = b"a\xff".decode("utf-8", "surrogateescape")
    for arguments in (
        ("generate", path, "--prompt", bad), ("generate", path, "--prompt", "a", "--stop", bad),
        ("chat", path, "--system", bad), ("score", path, "--candidate", bad),
        ("score", path, "--candidate", "a", "--context", bad),
    ):  # fmt: skip
        status, _, err = run(capsys, *arguments)
        assert status == 2 and f"{arguments[-2]} is not UTF-8 text: byte 0xff at character 1" in err


@pytest.mark.parametrize(
    "encoding, plain, quoted", [("ascii", "\\xefm", "\\u00efm"), ("latin-1", "ïm\\u2028", "\\u00efm")]
)
def test_output_that_is_not_unicode(path, monkeypatch, encoding, plain, quoted):
    """What the terminal lacks is escaped: in JSON, as JSON does."""
    for options, match in (((), plain), (("--json",), quoted)):
        stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr("sys.stdout", stdout)
        status = cli.main(["generate", str(path), "--prompt", "ïm\u2028port", *map(str, SHORT), *options])
        stdout.flush()
        out = stdout.buffer.getvalue().decode(encoding)
        assert status == 0 and match in out
        assert not options or json.loads(out)["prompt"] == "ïm\u2028port"


def test_an_ordinary_token_that_ends_generation_stays_text(path, tmp_path):
    """A checkpoint may stop at an empty line: its prompts may hold one."""
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    word = load(path)[1].encode("import")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, word[-1]]}))
    model, tokenizer = load(tmp_path)
    assert model.stop_token_ids == (2, word[-1]) and word[-1] > 261
    assert tokenizer.encode("import", parse_special_tokens=False) == word


def test_device(capsys, path, monkeypatch):
    """All commands that take a model take it, and say in one line what is wrong with it."""
    arguments = {
        "generate": ("--prompt", "x"), "chat": (), "agreement": ("--prompt", "x"), "score": ("--candidate", "x"),
        "eval": ("--tasks", "any"),
    }  # fmt: skip
    for command, more in arguments.items():
        for device, gpus, match in (
            ("gpu", 0, "--device must be cpu or cuda (cuda:0, ...), got 'gpu'"),
            ("mps", 0, "--device must be cpu or cuda"),
            ("cuda", 0, "finds no GPU here"),
            ("cuda:2", 2, "finds 2 GPUs here"),
        ):
            monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
            status, _, err = run(capsys, command, path, *more, "--device", device)
            assert status == 2 and match in err and err.count("\n") == 1, err
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert parse_device("cuda:1") == torch.device("cuda", 1) and parse_device(None) == torch.device("cpu")


def test_kernels_are_asked_for_before_weights_are_read(capsys, path, monkeypatch):
    """With the dtype of the file, or that of --dtype, and the sizes of the model."""
    asked = []

    def why_not(op, device, dtype, **sizes):
        asked.append((op, str(device), dtype, sizes))
        return "no kernel for it"

    def read_weights(*arguments, **keywords):
        raise AssertionError("weights were read")

    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("illada.ops.why_not", why_not)
    monkeypatch.setattr("illada.checkpoints.weights.read_weights", read_weights)
    for more, dtype in (((), torch.float32), (("--dtype", "bfloat16"), torch.bfloat16)):
        status, _, err = run(capsys, "generate", path, "--prompt", "x", "--device", "cuda", *more)
        assert status == 2 and "--device cuda: no kernel for it" in err and err.count("\n") == 1, err
        sizes = {"head_dim": 8, "num_heads": 4, "num_kv_heads": 2}
        assert asked.pop() == ("varlen_attention", "cuda", dtype, sizes)


def test_chat(capsys, path, monkeypatch):
    options = ("chat", path, "--gen-length", 8, "--block-length", 4, "--steps", 4)

    def talk(*lines, extra=()):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
        return run(capsys, *options, *extra)

    status, out, err = talk("import os")
    first = out
    assert status == 0 and err == "" and out.endswith("\n")
    assert talk("import os", "/reset", "import os", extra=("--temperature", 0))[1] == 2 * first
    assert talk("import os", "/undo", "import os", "/exit", "never")[1] == 2 * first
    followed = talk("import os", "import os")[1]
    assert followed.startswith(first) and followed != 2 * first  # the second answer knows of the first turn
    assert talk("import os", extra=("--system", "def main"))[1] != first
    _, out, err = talk("/nothing", "x" * 3000, "import os")
    assert "no command /nothing" in err and "over the model's" in err and out == first
    (path.parent / "other.jinja").write_text("{{ messages[-1].content }}")
    assert talk("import os", extra=("--chat-template", path.parent / "other.jinja"))[1] != first


def test_chat_loses_a_line_that_is_no_text_and_no_more(capsys, path, monkeypatch):
    options = ("chat", path, "--gen-length", 8, "--block-length", 4, "--steps", 4)
    monkeypatch.setattr("sys.stdin", piped(b"import os\n"))
    first = run(capsys, *options)[1]
    monkeypatch.setattr("sys.stdin", piped(b"\xff\nimport os\r\n"))
    status, out, err = run(capsys, *options)
    assert status == 0 and out == first and "the line is not UTF-8 text: byte 0xff; it is not sent" in err
    (path.parent / "picky.jinja").write_text(
        "{{ messages[-1].content | trim if '+' not in messages[-1].content else 1 + 'a' }}"
    )
    monkeypatch.setattr("sys.stdin", piped(b"import os\n"))
    plain = run(capsys, *options, "--chat-template", path.parent / "picky.jinja")[1]
    monkeypatch.setattr("sys.stdin", piped(b"1+1\n/import os\n//import\nimport os\n"))
    sent = []
    real = chat._answer
    monkeypatch.setattr(
        chat, "_answer", lambda m, t, ids, *a, **k: sent.append(t.decode(ids)) or real(m, t, ids, *a, **k)
    )
    status, out, err = run(capsys, *options, "--chat-template", path.parent / "picky.jinja")
    assert status == 0 and "TypeError" in err and "no command /import" in err
    assert sent == ["/import", "import os"] and out.endswith(plain)
    monkeypatch.setattr("sys.stdin", None)
    status, _, err = run(capsys, *options)
    assert status == 2 and "standard input is closed" in err


def test_chat_holds_back_what_may_begin_a_stop_string(capsys, path, monkeypatch):
    """Half of it at the end of a block is not shown before the next one tells."""
    for text, stops, shown in (
        ("one EN", ("END",), "one "), ("one E", ("END", "NEVER"), "one "), ("one END", ("END",), "one END"),
        ("one", (), "one"), ("a\ufffd", (), "a"), ("xx", ("xxx",), ""),
    ):  # fmt: skip
        assert settled_text(text, stops) == shown
    options = ("chat", path, "--gen-length", 16, "--block-length", 1, "--steps", 1)
    monkeypatch.setattr("sys.stdin", piped(b"import os\n"))
    whole = run(capsys, *options)[1].removesuffix("\n")
    stop = whole[2:6]
    assert len(stop) == 4
    monkeypatch.setattr("sys.stdin", piped(b"import os\n"))
    assert run(capsys, *options, "--stop", stop)[1] == whole[: whole.index(stop)] + "\n"


def test_chat_needs_a_template(capsys, path, tmp_path):
    for file in path.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    status, _, err = run(capsys, "chat", tmp_path)
    assert status == 2 and "has no chat template" in err
    (tmp_path / "page.jinja").write_text("<!DOCTYPE html><html>")
    status, _, err = run(capsys, "chat", path, "--chat-template", tmp_path / "page.jinja")
    assert status == 2 and "page.jinja is an HTML page" in err
    status, _, err = run(capsys, "chat", path, "--mode", "infill")
    assert status == 2 and "a chat goes with var or fixed" in err


def test_agreement(capsys, path):
    prompts = ("--prompt", "import", "--prompt", "def main")
    status, out, _ = run(
        capsys, "agreement", path, *prompts, "--gen-length", 16, "--block-length", 4, "--steps", 2, "--json"
    )
    reports = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [r["cache"] for r in reports] == ["none", "prefix", "block"]
    none, prefix, block = reports
    assert none["token_match"] == 1.0 and none["identical"] == none["prompts"] == 2 and none["score_gap"] == 0.0
    assert none["first_difference"] is None
    for r in (prefix, block):
        assert 0 <= r["token_match"] < 1 and r["first_difference"] >= 0 and r["score"] < 0
        assert r["score_gap"] == pytest.approx(r["score"] - none["score"])
    table = run(capsys, "agreement", path, *prompts, *SHORT, "--steps", 1, "--caches", "prefix")[1]
    assert "100.0%" in table and "2 of 2" in table and "block" not in table  # one step a block is always fresh
    status, _, err = run(capsys, "agreement", path, *prompts, "--caches", "dual")
    assert status == 2 and "caches must be among none, prefix, block, got 'dual'" in err
    with pytest.raises(SystemExit):  # it would say nothing
        cli.main(["agreement", str(path), "--prompt", "x", "--cache", "prefix"])


def test_errors_are_one_line(capsys, path):
    for arguments, match in (
        (("generate", path, "--dtype", "int8"), "--dtype must be bfloat16, float16, float32, got 'int8'"),
        (
            ("generate", path, "--prompt", "x", "--gen-length", 10, "--block-length", 4),
            "block_length may be 1, 2, 5, 10",
        ),
        (("generate", path, "--prompt", "x", "--cache", "dual"), "cache must be one of none, prefix, block"),
        (("generate", path, "--prompt", "x", "--mask-token-id", 9), "mask"),
        (("generate", path, "--prompt", "x", "--stop", ""), "stop_strings holds an empty text"),
        (("generate", path.parent / "nowhere", "--prompt", "x"), "nowhere is not a checkpoint (no config.json)"),
    ):
        status, _, err = run(capsys, *arguments)
        assert status == 2 and match in err and err.count("\n") == 1, err
