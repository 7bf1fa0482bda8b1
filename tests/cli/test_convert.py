"""`illada convert`: what it writes, carries and refuses."""

import json

import pytest
import torch
from published_checkpoints import CONFIGS, weights, write
from safetensors.torch import load_file

from illada import cli
from illada.checkpoints.weights import load_pretrained, read_config, save_pretrained
from illada.cli.convert import parse_size
from illada.text.tokenizer import Tokenizer
from illada.text.training import tokenizer_sha256, train_tokenizer


@pytest.fixture
def source(tmp_path):
    """A tiny Qwen2.5 with its tokenizer, as it is published: no mask anywhere."""
    folder = write(tmp_path / "a source", CONFIGS["qwen2"], weights(CONFIGS["qwen2"], torch.bfloat16), shards=2)
    train_tokenizer(["the quick brown fox\n"] * 9, 300).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages[0].content }}!"}')
    (folder / "generation_config.json").write_text('{"temperature": 0.7}')
    (folder / "tokenization_own.py").write_text("raise SystemExit('nobody runs this')")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("RAG")
    (folder / "README.md").write_text("not the tokenizer's")
    return folder


def convert(*arguments):
    return cli.main(["convert", *map(str, arguments)])


def test_dtype_layout_and_files(source, tmp_path, capsys):
    target = tmp_path / "out" / "dream"
    options = ("--dtype", "float32", "--model-type", "dream", "--mask-token-id", 66, "--max-shard-size", "30KB")
    assert convert(source, target, *options) == 0
    captured = capsys.readouterr()
    assert "in the dream layout, mask token 66" in captured.out and captured.err == ""  # no bar: not a terminal
    names = {str(file.relative_to(target)) for file in target.rglob("*")}
    carried = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "tokenization_own.py"}
    carried |= {"additional_chat_templates/rag.jinja"}
    assert carried <= names and "README.md" not in names and len(list(target.glob("model-*"))) > 2
    assert all((target / name).read_bytes() == (source / name).read_bytes() for name in carried)
    config = read_config(target)
    assert config["model_type"] == "Dream" and config["torch_dtype"] == "float32" and config["mask_token_id"] == 66
    assert config["tokenizer_sha256"] == tokenizer_sha256(source)
    want, got = load_pretrained(source, mask_token_id=66), load_pretrained(target)
    assert all(torch.equal(a.float(), b) for a, b in zip(want.parameters(), got.parameters(), strict=True))
    assert Tokenizer.from_pretrained(target).apply_chat_template([{"role": "user", "content": "Hi"}]) == "Hi!"


def test_source_without_a_tokenizer_and_a_training_run(tmp_path, capsys):
    run = tmp_path / "run" / "checkpoints" / "step-000002"
    write(run, CONFIGS["illada"], weights(CONFIGS["illada"]))
    assert convert(tmp_path / "run", tmp_path / "plain") == 0
    assert {file.name for file in (tmp_path / "plain").iterdir()} == {"config.json", "model.safetensors"}
    assert "lm_head.weight" not in load_file(tmp_path / "plain" / "model.safetensors")


def test_refusals_leave_nothing_behind(source, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    training = tmp_path / "training"
    training.mkdir()
    for name in ("config.json", "trainer.json"):
        (training / name).write_text("{}")
    before = sorted(path.name for path in tmp_path.iterdir())
    cases = [
        ((source, tmp_path / "x"), "does not name the mask token of this qwen2 model; give mask_token_id, an id below 80"),
        ((source, tmp_path / "x", "--mask-token-id", 80), "mask_token_id must be in [0, 80), got 80"),
        ((source, tmp_path / "x", "--mask-token-id", 43), "mask_token_id (43) is model.eos_token_id as well"),
        ((source, tmp_path / "x", "--mask-token-id", 66, "--model-type", "illada"), "cannot express qkv_bias=True, logits_shift=True"),
        ((source, tmp_path / "x", "--model-type", "gpt"), "--model-type must be illada, llada, dream, qwen2, illada_hf, got 'gpt'"),
        ((source, tmp_path / "x", "--dtype", "int8"), "--dtype must be bfloat16, float16, float32, got 'int8'"),
        ((source, tmp_path / "x", "--max-shard-size", "big"), "--max-shard-size looks like 5GB"),
        ((tmp_path / "none", tmp_path / "x"), "is not a checkpoint (no config.json)"),
        ((source, tmp_path / "other"), "exists; overwrite it with --overwrite"),
        ((source, tmp_path / "other", "--overwrite"), "is not a plain checkpoint, so it is not overwritten"),
        ((source, training, "--overwrite"), "is not a plain checkpoint, so it is not overwritten"),
    ]  # fmt: skip
    for arguments, message in cases:
        assert convert(*arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("illada: error: ") and message in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_overwrites_itself(source, capsys):
    want = [p.detach().clone() for p in load_pretrained(source, mask_token_id=66).parameters()]
    assert convert(source, source, "--mask-token-id", 66, "--overwrite") == 0
    assert all(torch.equal(a, b) for a, b in zip(want, load_pretrained(source).parameters(), strict=True))
    assert json.loads((source / "config.json").read_text())["mask_token_id"] == 66


def test_help_teaches_and_sizes(capsys):
    with pytest.raises(SystemExit):
        cli.main(["convert", "--help"])
    assert "illada convert runs/demo" in capsys.readouterr().out.split("example")[-1]
    assert [parse_size(text) for text in ("5GB", "500 MiB", "1000", "1.5kb")] == [5 * 10**9, 500 << 20, 1000, 1500]
    for text in ("", "GB", "-1", "0", "5 apples"):
        with pytest.raises(ValueError, match="max-shard-size looks like"):
            parse_size(text)


def test_saving_with_a_folder_that_has_no_tokenizer(source, tmp_path):
    model = load_pretrained(source, mask_token_id=66)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no tokenizer files"):
        save_pretrained(model, tmp_path / "x", tokenizer=tmp_path / "empty")
    save_pretrained(model, tmp_path / "x", tokenizer=source / "tokenizer.json")
    assert not (tmp_path / "x" / "tokenizer_config.json").exists()
