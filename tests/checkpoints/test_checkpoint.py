"""Checkpoints: the layout, strict accounting of keys and options, damage, and full disks."""

import dataclasses
import json
import math
import re
import resource
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from illada.checkpoints.weights import convert_checkpoint, load_pretrained, read_config, save_pretrained
from illada.config import ModelConfig
from illada.generation import GenerationConfig, generate
from illada.model import MaskedDiffusionModel
from illada.text.tokenizer import Tokenizer
from illada.text.training import train_tokenizer

CONFIG = ModelConfig.preset(
    "tiny", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=40
)


@pytest.fixture
def saved(tmp_path):
    model = MaskedDiffusionModel(CONFIG, seed=1)
    save_pretrained(model, tmp_path / "m")
    return model, tmp_path / "m"


def test_round_trip_and_layout(saved):
    model, path = saved
    tensors = load_file(path / "model.safetensors")
    layer = [f"self_attn.{x}_proj.weight" for x in "qkvo"] + [f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")]
    layer += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    want = {f"model.layers.{i}.{name}" for i in range(2) for name in layer}
    assert set(tensors) == want | {"model.embed_tokens.weight", "model.norm.weight"}  # the tied head once
    config = read_config(path)
    assert config["model_type"] == "illada" and config["mask_token_id"] == 5 and config["torch_dtype"] == "float32"
    again = load_pretrained(path)
    assert again.config == CONFIG
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b) and b.requires_grad, name
    assert load_pretrained(path, dtype=torch.bfloat16).norm.weight.dtype == torch.bfloat16


def test_untied_and_sharded(tmp_path):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=False)
    model = MaskedDiffusionModel(config, seed=1, dtype=torch.bfloat16)
    save_pretrained(model, tmp_path / "m", max_shard_bytes=8000)
    shards = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    again = load_pretrained(tmp_path / "m")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert again.head_weight.dtype == torch.bfloat16
    (tmp_path / "m" / shards[1]).unlink()
    with pytest.raises(ValueError, match=f"lacks the shards {shards[1]}"):
        load_pretrained(tmp_path / "m")


def test_stored_tied_head_must_be_the_embedding(saved):
    _, path = saved
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # as the published checkpoint has it
    save_file(tensors, path / "model.safetensors")
    load_pretrained(path)
    tensors["lm_head.weight"][3] += 1
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ValueError, match="ties the head to the embedding, but lm_head.weight differs"):
        load_pretrained(path)


def test_keys_are_accounted_for(saved):
    _, path = saved
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.9.x"] = tensors.pop("model.norm.weight")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load_pretrained(path)
    for part in (
        "missing: model.norm.weight",
        "unexpected: model.layers.9.x",
        r"wrong: model.layers.0.mlp.up_proj.weight is [3, 3], expected [48, 32]",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": 4096}, {"hidden_size": 2**30, "intermediate_size": 2**30}, {"vocab_size": 2**30}]
)
def test_a_config_of_any_size_is_compared_with_the_file_first(saved, change):
    """In a moment, and in a few words; no such model is made."""
    _, path = saved
    (path / "config.json").write_text(json.dumps({**read_config(path), **change}))
    start = time.process_time()
    with pytest.raises(ValueError, match="do not fit its config.json; (missing|wrong): ") as error:
        load_pretrained(path)
    assert time.process_time() - start < 2 and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "change,match",
    [
        ({"model_type": "llama"}, "model_type='llama' (supported: 'illada', 'llada', 'Dream', 'qwen2', 'illada_hf')"),
        ({"attention_bias": True}, "attention_bias=True (supported: False)"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling={'factor': 2} (supported: None"),
        ({"sliding_window": 4}, "sliding_window=4 (unknown)"),
        ({"rope_theta": ...}, "lacks rope_theta, which cannot be guessed"),
        ({"hidden_size": -1}, "hidden_size must be positive"),
        ({"layer_types": 3}, "layer_types=3 (supported: 'full_attention' in all)"),
        ({"layer_types": [["full_attention"]]}, "layer_types=[['full_attention']] (supported"),
        ({"layer_types": "full_attention"}, "layer_types='full_attention' (supported"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types names 3 layers, num_hidden_layers is 2"),
        ({"rope_theta": math.inf}, "rope_theta must be finite, got inf"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps must be finite, got inf"),
        ({"rope_theta": 1e39}, "rope_theta must be at most 3.40282e+38, got 1e+39"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps must be finite, got nan"),
        ({"rope_theta": 10**400}, "rope_theta must be finite, got 1000"),
        ({"initializer_range": math.inf}, "initializer_range must be finite"),
        ({"hidden_size": 2**70}, "hidden_size must be at most 2^30"),
        ({"head_dim": -2}, "head_dim must be positive"),
        ({"rope_parameters": []}, "rope_parameters=[] (supported"),
        (
            {"rope_parameters": {"rope_theta": "x", "rope_type": "default"}, "rope_theta": ...},
            "rope_theta must be float, got 'x'",
        ),
        ({"eos_token_id": True}, "eos_token_id must be int, got True"),
        ({"eos_token_id": [2, "x"]}, "eot_token_id must be int, got 'x'"),
        ({"eos_token_id": {}}, "eos_token_id must be int, got {}"),
        ({"pad_token_id": [1]}, "pad_token_id must be int, got [1]"),
    ],
)
def test_config_options_are_honoured_or_refused(saved, change, match):
    _, path = saved
    config = {**read_config(path), **change}
    config = {key: value for key, value in config.items() if value is not ...}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        load_pretrained(path)
    assert match in str(error.value)


def test_ids_of_a_config_without_them(saved):
    _, path = saved
    config = {key: value for key, value in read_config(path).items() if not key.endswith("_token_id")}
    (path / "config.json").write_text(json.dumps(config))
    assert load_pretrained(path).config.mask_token_id == 5


@pytest.mark.parametrize("ids", [{}, {"pad_token_id": None}, {"bos_token_id": None, "pad_token_id": 7}])
@pytest.mark.parametrize("model_type", ["illada", "llada", "dream"])
def test_absent_ids_are_written_as_null(tmp_path, model_type, ids):
    """The authors' classes put ids of their own in the place of keys that are not there (Dream: pad 151643)."""
    shape = {"qkv_bias": True, "logits_shift": True} if model_type == "dream" else {}
    rope = {"rope_in_fp32": model_type == "llada"}
    config = dataclasses.replace(CONFIG, model_type=model_type, **shape, **rope, **ids)
    save_pretrained(MaskedDiffusionModel(config), tmp_path / "m")
    written = read_config(tmp_path / "m")
    assert {key: written[key] for key in ids} == ids
    assert load_pretrained(tmp_path / "m").config == config


def test_damaged_and_missing_files(saved, tmp_path):
    _, path = saved
    weights = path / "model.safetensors"
    content = weights.read_bytes()
    for damaged in (content[:-1], content[: len(content) // 2], content[:5], b"", b"PK\x03\x04 zip"):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged or not a safetensors file"):
            load_pretrained(path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        load_pretrained(path)
    (path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_pretrained(path)
    (path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json must hold a JSON object, got list"):
        load_pretrained(path)
    for load in (load_pretrained, lambda path: convert_checkpoint(path, tmp_path / "out", dtype=torch.float16)):
        with pytest.raises(FileNotFoundError, match=r"not a checkpoint \(no config\.json\)"):
            load(tmp_path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 16060556376\n"


@pytest.mark.parametrize("content,said", [
    (POINTER, "is a Git LFS pointer, not the file it stands for"),
    (b"\n<!doctype HTML>\n<title>Sign in</title>", "is an HTML page"),
], ids=["pointer", "page"])  # fmt: skip
@pytest.mark.parametrize("name", [
    "model.safetensors", "config.json", "model.safetensors.index.json", "tokenizer.json", "generation_config.json",
    "chat_template.jinja", "additional_chat_templates/rag.jinja",
])  # fmt: skip
def test_what_a_download_left(saved, name, content, said):
    _, path = saved
    (path / name).parent.mkdir(exist_ok=True)
    train_tokenizer(["a b"], 300).save(str(path / "tokenizer.json"))
    (path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path / name))} {said}"):
        (Tokenizer.from_pretrained if "chat" in name or name == "tokenizer.json" else load_pretrained)(path)


def test_shards_without_their_index(saved):
    _, path = saved
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    with pytest.raises(FileNotFoundError, match=r"has model-00001-of-00002\.safetensors, but not their index, model\."):
        load_pretrained(path)


def rewrite(path, change):
    """The weights with each tensor `change` names replaced by what it makes of it."""
    tensors = load_file(path / "model.safetensors")
    tensors |= {key: make(tensors[key.replace("lm_head", "model.embed_tokens")]) for key, make in change.items()}
    save_file(tensors, path / "model.safetensors")


NORM, EMBEDDING = "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"
OUT, KEY = "model.layers.1.self_attn.o_proj.weight", "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize("name", [NORM, "model.norm.weight", EMBEDDING, OUT, KEY])
def test_mixed_dtypes_become_that_of_config_json(tmp_path, name):
    path, model = tmp_path / "m", MaskedDiffusionModel(CONFIG, seed=1)
    save_pretrained(model, path, dtype=torch.bfloat16)
    rewrite(path, {name: torch.Tensor.float})
    loaded = load_pretrained(path)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    generate(loaded, [[7, 8]], GenerationConfig(gen_length=4, block_length=4, steps=2))

    convert_checkpoint(path, tmp_path / "wide", dtype=torch.float32)
    assert {t.dtype for t in load_file(tmp_path / "wide" / "model.safetensors").values()} == {torch.float32}
    convert_checkpoint(path, tmp_path / "same")
    assert {t.dtype for t in load_file(tmp_path / "same" / "model.safetensors").values()} == {torch.bfloat16}

    config = {key: value for key, value in read_config(path).items() if key != "torch_dtype"}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        load_pretrained(path)
    assert f"float32 ({name})" in str(error.value) and "bfloat16 (" in str(error.value)
    assert "give dtype (--dtype), to which all are converted" in str(error.value)
    assert load_pretrained(path, dtype=torch.float16).norm.weight.dtype == torch.float16


def test_wide_part_of_mixed_dtypes_is_converted_exactly(tmp_path):
    path = tmp_path / "m"
    save_pretrained(MaskedDiffusionModel(CONFIG, seed=1), path, dtype=torch.bfloat16)
    rewrite(path, {KEY: lambda weight: weight.float() + 2**-20, NORM: lambda weight: weight.float() + 2**-20})
    before = load_file(path / "model.safetensors")
    convert_checkpoint(path, tmp_path / "wide", dtype=torch.float32)
    assert all(torch.equal(before[key].float(), t) for key, t in load_file(tmp_path / "wide/model.safetensors").items())


@pytest.mark.parametrize("make,said", [
    (lambda weight: weight.to(torch.float8_e4m3fn), "lm_head.weight is F8_E4M3, expected F32"),
    (lambda weight: weight.to(torch.int64), "lm_head.weight is I64, expected F32"),
    (lambda weight: weight[:-1].clone(), "but lm_head.weight differs"),
    (lambda weight: weight.bfloat16(), None), (torch.clone, None),
])  # fmt: skip
def test_dtypes_of_a_tied_head(saved, make, said):
    _, path = saved
    rewrite(path, {"lm_head.weight": make})
    if said is None:
        assert load_pretrained(path).lm_head is None
        return
    with pytest.raises(ValueError, match=said):
        load_pretrained(path)


def test_weights_that_a_dtype_cannot_hold(saved, tmp_path):
    _, path = saved
    rewrite(path, {OUT: lambda weight: weight.index_fill(1, torch.tensor([3]), 1e6)})
    said = f"{OUT} holds 1e+06, which float16 cannot: it ends at 65504; bfloat16 can"
    with pytest.raises(ValueError, match=re.escape(said)):
        convert_checkpoint(path, tmp_path / "half", dtype=torch.float16)
    with pytest.raises(ValueError, match=re.escape(said)):
        load_pretrained(path, dtype=torch.float16)
    assert not (tmp_path / "half").exists()
    convert_checkpoint(path, tmp_path / "bf16", dtype=torch.bfloat16)
    # A model that has diverged has it in any dtype, and says so.
    rewrite(path, {OUT: lambda weight: weight / 0})
    assert not load_pretrained(path, dtype=torch.float16).layers[1].self_attn.o_proj.weight.isfinite().any()


def test_ids_that_only_the_generation_config_ends_with(saved):
    """As transformers: one, or several; a generation stops at any of them."""
    model, path = saved
    config = GenerationConfig(gen_length=8, block_length=8, steps=8, stop_tokens=())
    plain = generate(model, [[7, 8, 9]], config)[0].tokens
    own = model.config.eos_token_id
    end = next(token for token in plain if token != own)
    for value, want in ((end, (end,)), ([own, end], (own, end)), (None, ()), ([], ())):
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        loaded = load_pretrained(path)
        assert loaded.stop_token_ids == want
        if want:
            result = generate(loaded, [[7, 8, 9]], dataclasses.replace(config, stop_tokens=None))[0]
            assert result.finish_reason == "stop_token" and end not in result.tokens
    loaded.stop_token_ids = (own, end)
    (path / "generation_config.json").unlink()
    save_pretrained(loaded, path.parent / "again")
    assert load_pretrained(path.parent / "again").stop_token_ids == (own, end)
    save_pretrained(model, path.parent / "none")
    assert not (path.parent / "none" / "generation_config.json").exists()
    for bad, said in (
        ("2", " must be int, got '2'"),
        ([2, None], r"\[1\] must be int, got None"),
        (True, " must be int, got True"),
        (-1, " must not be negative, got -1"),
    ):
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": bad}))
        with pytest.raises(ValueError, match=rf"generation_config\.json: eos_token_id{said}"):
            load_pretrained(path)


def test_full_disk_keeps_the_old_checkpoint(saved):
    model, path = saved
    # A process that may not write files above 4 kB, as if the disk were full.
    code = (
        "import resource, signal, sys; from illada.checkpoints.weights import *; from illada.model import MaskedDiffusionModel\n"
        f"model = load_pretrained({str(path)!r}); model.norm.weight.data.fill_(9.0)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        f"save_pretrained(model, {str(path)!r})"
    )
    assert resource.RLIMIT_FSIZE is not None
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "File too large" in done.stderr
    assert [p.name for p in path.parent.iterdir()] == ["m"]
    assert torch.equal(load_pretrained(path).norm.weight, model.norm.weight)


def test_layout_that_cannot_say_it(tmp_path):
    model = MaskedDiffusionModel(dataclasses.replace(CONFIG, logits_shift=True, qkv_bias=True))
    with pytest.raises(NotImplementedError, match="cannot express qkv_bias=True, logits_shift=True"):
        save_pretrained(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())
