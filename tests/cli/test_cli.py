"""The command line: from text to text, and one clear line for what goes wrong."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from illada import cli


def run(*arguments, stdin=""):
    done = subprocess.run(
        [sys.executable, "-m", "illada", *map(str, arguments)], capture_output=True, text=True, input=stdin
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A corpus and a trained run, made by the commands, in a path with a space."""
    root = tmp_path_factory.mktemp("a world")
    lines = [json.dumps({"text": f"one two three four {i} " * 30}) for i in range(40)]
    (root / "text.jsonl").write_text("\n".join(lines))
    status, out, err = run(
        "prepare", "--source", f"jsonl:{root}/text.jsonl", "--out", root / "corpus", "--vocab-size", 300,
        "--validation-fraction", 0.2,
    )  # fmt: skip
    assert status == 0, err
    assert "unigram entropy of the held-out tokens" in out and "train" in out
    (root / "run.toml").write_text(
        '[model]\npreset = "tiny"\nhidden_size = 32\nintermediate_size = 48\nnum_hidden_layers = 1\n'
        f'num_attention_heads = 4\n[data]\npath = "{root}/corpus"\nwindow = 32\n[train]\nout_dir = "{root}/run"\n'
        "steps = 4\nwindows_per_step = 4\nwindows_per_micro_batch = 4\nlog_every = 2\n[validation]\nwindows = 4\nstrata = 2\n"
    )
    status, out, err = run("train", root / "run.toml", "--train.steps=6")
    assert status == 0, err
    assert "step      6/6" in out and "\r" not in err  # no progress bar: not a terminal
    return root


def test_generate(world):
    options = ("--gen-length", 16, "--block-length", 8, "--steps", 4, "--json")
    status, out, err = run("generate", world / "run", "--prompt", "one two", "--prompt", "four", *options)
    assert status == 0, err
    records = [json.loads(line) for line in out.splitlines()]
    assert [r["prompt"] for r in records] == ["one two", "four"]
    assert all(set(r) == {"prompt", "tokens", "finish_reason", "forwards", "text"} for r in records)
    assert run("generate", world / "run", *options, stdin="one two")[1].splitlines()[0] == out.splitlines()[0]
    (world / "prompts.txt").write_text("one two\nfour\n")
    assert run("generate", world / "run", "--prompt-file", world / "prompts.txt", *options)[1] == out
    plain = run("generate", world / "run" / "checkpoints" / "step-000006", "--prompt", "one two", *options[:-1])[1]
    assert plain.startswith("one two" + records[0]["text"]) and "--- " in plain


def test_generate_output(world, tmp_path, capsys, monkeypatch):
    options = ["--prompt", "one \u00e9", "--gen-length", "8", "--block-length", "8", "--steps", "2"]
    arguments = ["generate", str(world / "run"), *options]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    file, link = tmp_path / "new" / "text", tmp_path / "link"
    link.symlink_to("new/text")
    for target in (file, link):
        assert cli.main([*arguments, "--output", str(target)]) == 0
        out, error = capsys.readouterr()
        assert out == "" and f"written to {target}" in error
        assert file.read_text(encoding="utf-8") == printed and link.is_symlink()
    assert cli.main([*arguments, "--json", "--output", str(file)]) == 0
    (line,) = file.read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["prompt"] == "one \u00e9" and "\u00e9" in line
    assert cli.main([*arguments, "--output", "/dev/null"]) == 0 and not os.path.isfile("/dev/null")
    capsys.readouterr()

    def full(source, target):
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr("illada.files.os.replace", full)
        assert cli.main([*arguments, "--output", str(file)]) == 2
    assert capsys.readouterr().out == printed  # it took its time
    assert file.read_text(encoding="utf-8").splitlines() == [line]
    assert [path.name for path in file.parent.iterdir()] == ["text"]
    assert cli.main([*arguments, "--output", str(tmp_path)]) == 2 and "is a folder" in capsys.readouterr().err


def test_score(world):
    pair = ("--context", "one two", "--candidate", " three four", "--candidate", " two one zzz")
    status, out, err = run("score", world / "run", *pair, "--json")
    assert status == 0 and "2 candidates of 1 questions" in err and "\r" not in err
    first = json.loads(out)
    assert set(first) == {"context", "candidates", "scores", "best"}
    assert first["best"] == first["scores"].index(max(first["scores"])) and max(first["scores"]) < 0
    plain = run("score", world / "run", *pair)[1].splitlines()
    assert [line[0] for line in plain] == ["*" if i == first["best"] else " " for i in range(2)]
    assert repr(" three four") in plain[0] and f"{first['scores'][0]:.4f}" in plain[0]
    questions = [
        {"context": "one two", "candidates": [" three four", " two one zzz"]},
        {"context": "one\u2028two", "candidates": ["x"]},  # an end of the line for Unicode, but not for JSON
    ]
    lines = [json.dumps(question, ensure_ascii=False) for question in questions]
    (world / "questions.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    status, out, err = run("score", world / "run", "--file", world / "questions.jsonl", "--json", "--max-tokens", 8)
    records = [json.loads(line) for line in out.split("\n")[:-1]]
    assert status == 0 and records[0]["scores"] == pytest.approx(first["scores"], abs=1e-4) and records[1]["best"] == 0
    monte_carlo = ("--method", "monte-carlo", "--num-samples", 32, "--append-eos", "--cfg-scale", 0.5, "--json")
    status, out, err = run("score", world / "run", *pair, *monte_carlo)
    assert status == 0 and json.loads(out)["scores"] != first["scores"]
    long = ("--context", "one two " * 600, "--candidate", " three", "--truncate-left")
    assert run("score", world / "run", *long)[0] == 0
    joined = ("--context", "on", "--candidate", "e x", "--candidate", "e two x")  # a token goes across the join
    assert len(set(json.loads(run("score", world / "run", *joined, "--json")[1])["scores"])) == 2
    rounded = json.loads(run("score", world / "run", *pair, "--json", "--dtype", "bfloat16", "--device", "cpu")[1])
    assert rounded["scores"] != first["scores"] and rounded["scores"] == pytest.approx(first["scores"], rel=0.05)


def test_info():
    status, out, _ = run("info", "--json")
    facts = json.loads(out)
    assert status == 0 and facts["cpu kernels"] in ("avx512", "avx2", "baseline") and facts["torch"]
    assert "native module" in run("info")[1]


@pytest.mark.parametrize("closed", [False, True])
def test_library_calls_without_standard_streams(world, tmp_path, monkeypatch, closed):
    """As under pythonw, or after a daemon has closed them."""
    from illada import train
    from illada.checkpoints.folders import load
    from illada.checkpoints.weights import convert_checkpoint
    from illada.data.corpus import prepare
    from illada.data.dataset import TokenDataset
    from illada.generation import GenerationConfig, generate
    from illada.score import confidence_score

    for name in ("stdin", "stdout", "stderr"):
        stream = (tmp_path / name).open("w") if closed else None
        if stream is not None:
            stream.close()
        monkeypatch.setattr(sys, name, stream)
    prepare(f"jsonl:{world}/text.jsonl", tmp_path / "corpus", vocab_size=300, validation_fraction=0.2)
    config = train.load_config(world / "run.toml", [f"train.out_dir={tmp_path}/run"])
    assert train.train(config).finished
    model, tokenizer = load(tmp_path / "run")
    assert train.evaluate(model, TokenDataset(world / "corpus", "validation"), config)
    options = GenerationConfig(gen_length=8, block_length=8, steps=2)
    assert generate(model, ["one two"], options, tokenizer=tokenizer, progress=True)[0].tokens
    assert confidence_score(model, [[5]], [[6]], progress=True)
    assert convert_checkpoint(tmp_path / "run" / "checkpoints" / "step-000004", tmp_path / "copy", progress=True)


def test_info_without_the_native_module():
    code = "import sys; sys.modules['illada._C'] = None; from illada import cli; sys.exit(cli.main(['info']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "could not be loaded" in done.stdout


def test_help_teaches(capsys):
    for command in ([], ["prepare"], ["train"], ["generate"], ["score"], ["eval"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*command, "--help"])
        assert stopped.value.code == 0 and "illada " in capsys.readouterr().out.split("example")[-1]


WITHOUT_TORCH = [
    (["--help"], 0, ""),
    (["--version"], 0, ""),
    (["generate", "--help"], 0, ""),
    (["generat"], 2, "invalid choice"),
    (["generate", "--seed", "x", "runs/demo"], 2, "--seed"),
    (["train"], 2, "needs a configuration file"),
    (["train", "no.toml"], 2, "no configuration file at no.toml"),
    (["train", "run.toml", "--train.stepz=3"], 2, "unknown key train.stepz"),
    (
        ["train", "run.toml"],
        2,
        "no is not a corpus (no corpus.json); make one with `illada prepare --source SOURCE --out no`",
    ),
    (["train", "run.toml", "--resume", "no"], 2, "no is not a corpus"),
    (["prepare", "--out", "x"], 2, "needs --source"),
    (["prepare", "--out", "x", "--source", "books"], 2, "source must be"),
    (["prepare", "--out", "x", "--source", "dir:no"], 2, "no is not a folder"),
    (["prepare", "--out", "x", "--source", "jsonl:no"], 2, "no is not a file"),
    (["prepare", "--out", "x", "--source", "stdlib", "--source", "hf:no"], 2, "no is not a folder; hf:PATH reads"),
    (["prepare", "--out", "x", "--source", "stdlib", "--tokenizer", "no"], 2, "no tokenizer at no"),
    (["prepare", "--out", "no", "--tasks", "all"], 2, "no is not a corpus"),
    (["convert", "a", "b", "--max-shard-size", "x"], 2, "--max-shard-size"),
    (["convert", "no", "b"], 2, "no is not a checkpoint"),
    (["generate", "no"], 2, "no is not a checkpoint"),
    (["generate", "run", "--prompt-file", "no"], 2, "--prompt-file: there is no no"),
    (["chat", "run", "--chat-template", "no"], 2, "--chat-template: there is no no"),
    (["score", "run", "--file", "no"], 2, "--file: there is no no"),
    (["score", "run", "--tokenizer", "no", "--candidate", "x"], 2, "--tokenizer: there is no no"),
    (["agreement", "no"], 2, "no is not a checkpoint"),
    (["eval", "x", "--tasks", "a", "--limit", "0"], 2, "--limit must be"),
    (["eval", "no", "--tasks", "a"], 2, "no is not a checkpoint"),
    (["eval", "run", "--tasks", "a", "--include-path", "no"], 2, "no is not a folder"),
    (["eval", "run", "--tasks", "a", "--output", "."], 2, "--output must be a file"),
]


def test_what_needs_no_torch_does_not_import_it(tmp_path):
    """Help, version, wrong options and wrong paths, within 0.3 s: torch alone takes seconds."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "run.toml").write_text('[data]\npath = "no"\n')
    code = (
        "import json, sys\nfrom illada.cli import main\nfor arguments in json.loads(sys.argv[1]):\n"
        "    try:\n        status = main(arguments)\n    except SystemExit as stopped:\n        status = stopped.code\n"
        "    slow = [name for name in ('torch', 'safetensors', 'lm_eval', 'matplotlib') if name in sys.modules]\n"
        "    print('ended', status, slow, flush=True)\n    print('ended', file=sys.stderr, flush=True)\n"
    )
    arguments = json.dumps([case[0] for case in WITHOUT_TORCH])
    done = subprocess.run([sys.executable, "-c", code, arguments], capture_output=True, text=True, cwd=tmp_path)
    found = [line for line in done.stdout.splitlines() if line.startswith("ended")]
    errors = done.stderr.split("ended\n")
    for (case, status, said), line, error in zip(WITHOUT_TORCH, found, errors[:-1], strict=True):
        assert line == f"ended {status} []" and said in error, (case, line, error)


def test_every_public_name_loads_when_it_is_used():
    code = (
        "import sys, illada; assert not {'torch', 'numpy', 'tokenizers'} & sys.modules.keys(), 'import illada'\n"
        "assert set(illada.__all__) <= set(dir(illada)) and illada.ops.remask is illada.remask\n"
        "named = {name for names in illada._MODULES.values() for name in names}\n"
        "assert named | {'__version__'} == set(illada.__all__)\n"
        "from illada import *\nassert all(name in globals() for name in illada.__all__)\n"
        "for package in (illada.checkpoints, illada.data, illada.train):\n"
        "    assert all(getattr(package, name).__name__ == name for name in package.__all__), package\n"
        "try:\n    illada.nothing\nexcept AttributeError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "module 'illada' has no attribute 'nothing'\n", done.stderr


@pytest.mark.parametrize(
    "line, expected",
    [("illada gen", {"generate "}), ("illada generate --gen", {"--gen-length "})],
    ids=["command", "option"],
)
def test_shells_complete(tmp_path, line, expected):
    pytest.importorskip("argcomplete")
    answer = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "out"),
        "_ARGCOMPLETE_IFS": "\n",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    code = "import sys; from illada.cli import main; main()"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **answer}, check=True)
    assert set((tmp_path / "out").read_text().split("\n")) == expected


def test_print_config_is_a_template(capsys, tmp_path):
    assert cli.main(["train", "--print-config", "--train.steps=77"]) == 0
    text = capsys.readouterr().out
    assert "steps = 77  # optimizer steps" in text
    (tmp_path / "t.toml").write_text(text)
    assert cli.main(["train", str(tmp_path / "t.toml"), "--print-config"]) == 0
    assert capsys.readouterr().out == text


def test_warnings_are_one_line(tmp_path, capsys):
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"one two three four {i} " * 30)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfeo\x00")
    source = ["--source", f"dir:{tmp_path}", "--validation-fraction", "0.3"]
    assert cli.main(["prepare", *source, "--out", str(tmp_path / "corpus"), "--vocab-size", "300"]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "arning" in line]
    assert line.startswith(
        f"illada: warning: dir:{tmp_path}: 1 of 31 files left out: 1 UTF-16 (first: {tmp_path}/binary"
    )


def test_user_errors_are_one_line(world, capsys, monkeypatch):
    cases = [
        (["train", "none.toml"], "no configuration file at none.toml"),
        (["train"], "train needs a configuration file"),
        (["train", str(world / "run.toml"), "--steps=3"], "settings look like --section.key=value"),
        (["train", str(world / "run.toml"), "--train.stepz=3"], "unknown key train.stepz"),
        (["train", str(world / "run.toml"), "--resume", "never"], "exists; resume it"),
        (["prepare", "--source", "web", "--out", str(world / "x")], "source must be"),
        (["prepare", "--source", "stdlib", "--out", str(world / "corpus")], "exists; overwrite it"),
        (["generate", str(world / "nothing")], "nothing is not a checkpoint (no config.json)"),
        (["generate", str(world / "run"), "--prompt", "x", "--mode", "ar"], "mode must be one of var, fixed, infill"),
        (["generate", str(world / "run"), "--prompt", "x" * 2000], "over the model's max_position_embeddings"),
        (["generate", str(world / "run"), "--tokenizer", str(world / "other.json"), "--prompt", "x"], "is not the tokenizer that"),
        (["score", str(world / "run")], "score needs a --candidate"),
        (["score", str(world / "run"), "--candidate", "y", "--candidate", ""], "--candidate is empty"),
        (["score", str(world / "run"), "--file", str(world / "bad.jsonl")], 'bad.jsonl, line 2: expected {"context"'),
        (["score", str(world / "run"), "--context", "x" * 2000, "--candidate", "y"], "over the model's max_position"),
        (["score", str(world / "run"), "--candidate", "y", "--method", "monte-carlo", "--num-samples", "20"], "num_samples must be a multiple"),
        (["score", str(world / "run"), "--candidate", "y", "--cfg-scale", "-1"], "cfg_scale must be"),
    ]  # fmt: skip
    (world / "bad.jsonl").write_text('{"context": "a", "candidates": ["b"]}\n{"context": "a", "candidates": []}\n')
    (world / "other.json").write_bytes((world / "corpus" / "tokenizer.json").read_bytes() + b"\n")
    for arguments, match in cases:
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("illada: error: ") and match in error and error.count("\n") == 1
    monkeypatch.setenv("ILLADA_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        cli.main(["train", "none.toml"])
    with pytest.raises(SystemExit):
        cli.main(["info", "--what"])


@pytest.mark.parametrize("when", ["illada.cli", "json", "torch", "exit"])
def test_ctrl_c_while_modules_are_imported_and_at_the_exit(when):
    code = (
        "import atexit, os, signal, sys\ndef strike():\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "class Finder:\n    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {when!r}:\n            try:\n                strike()\n"
        "            except KeyboardInterrupt:  # as C++ and some modules do\n                pass\n"
        "from illada.__main__ import main\nsys.meta_path.insert(0, Finder())\n"
        f"if {when!r} == 'exit':\n    atexit.register(strike)\nsys.exit(main())"
    )
    command = "info" if when == "torch" else "--version"
    done = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True)
    assert done.returncode in (-signal.SIGINT, 130) and done.stderr in ("", "illada: interrupted\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_in_finalizers_are_not_lost(monkeypatch, capsys, number):
    """Python drops what is raised there; imports are full of such callbacks."""

    class Final:
        def __del__(self):
            signal.raise_signal(number)

    def run(options):
        Final()
        for _ in range(1000):
            time.sleep(0.01)
        return 0

    monkeypatch.setattr(cli.info, "_run", run)
    assert cli.main(["info"]) == 128 + number
    assert "Traceback" not in capsys.readouterr().err


def test_an_error_that_nobody_expected_is_one_line(monkeypatch, capsys):
    for error, status, said in (
        (KeyError("x"), 1, "illada: error: KeyError: 'x' (ILLADA_DEBUG=1 shows where it came from)\n"),
        (RecursionError("too deep\nmore"), 1, "illada: error: RecursionError: too deep (ILLADA_DEBUG=1"),
        (MemoryError(), 2, "illada: error: out of memory\n"),
        (AttributeError("no a"), 1, "illada: error: AttributeError: no a"),
    ):

        def run(options, error=error):
            raise error

        monkeypatch.setattr(cli.info, "_run", run)
        assert cli.main(["info"]) == status
        assert capsys.readouterr().err.startswith(said)
        monkeypatch.setenv("ILLADA_DEBUG", "1")
        with pytest.raises(type(error)):
            cli.main(["info"])
        monkeypatch.delenv("ILLADA_DEBUG")
