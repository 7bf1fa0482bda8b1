"""Checkpoints of the four published layouts against independent twins, and each key of their configs."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from plain_models import TWINS
from published_checkpoints import CONFIGS, shapes, weights, write
from safetensors.torch import load_file, save_file

from illada import pack
from illada.checkpoints.formats import LAYOUTS
from illada.checkpoints.weights import convert_checkpoint, load_config, load_pretrained, read_config, save_pretrained
from illada.config import ModelConfig
from illada.model import MaskedDiffusionModel
from illada.ops import attention

VARIANTS = {  # name: (model type, changes of the published config)
    "illada": ("illada", {}),
    "illada untied": ("illada", {"tie_word_embeddings": False}),
    "illada transformers 5": ("illada", {"rope_theta": ..., "rope_scaling": ..., "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}),
    "llada": ("llada", {}),
    "llada tied": ("llada", {"weight_tying": True}),
    "llada null kv heads, null embedding size": ("llada", {"n_kv_heads": None, "embedding_size": None}),
    "llada GQA, qkv bias, rope in its own precision": ("llada", {"n_kv_heads": 2, "include_qkv_bias": True, "rope_full_precision": False}),
    "dream": ("dream", {}),
    "dream tied": ("dream", {"tie_word_embeddings": True}),
    "dream transformers 5": ("dream", {"rope_theta": ..., "torch_dtype": ..., "dtype": "bfloat16", "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "layer_types": ["full_attention"] * 2}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
}  # fmt: skip


def changed(config, changes):
    return {key: value for key, value in {**config, **changes}.items() if value is not ...}


def plain(config):
    """Return the config with rope_theta where the plain models look for it."""
    return {**config, **config.get("rope_parameters", {})}


def make(folder, model_type, changes=None, dtype=torch.float32, shards=1):
    config = changed(CONFIGS[model_type], changes or {})
    tensors = weights(plain(config), dtype)
    return config, tensors, write(folder, config, tensors, shards)


def load(path, **options):
    needs_mask = read_config(path)["model_type"] == "qwen2" and "mask_token_id" not in read_config(path)
    return load_pretrained(path, **({"mask_token_id": 66} if needs_mask else {}), **options)


def run(model, sequences):
    tokens, cu_seqlens = pack(sequences)
    with torch.no_grad():
        hidden = model(tokens, cu_seqlens)
        return hidden, hidden @ model.head_weight.T


def sequences(config, generator, lengths=(11, 1, 37)):
    return [torch.randint(0, config["vocab_size"], (n,), generator=generator) for n in lengths]


@pytest.mark.parametrize("name", VARIANTS)
def test_matches_twin(name, tmp_path, generator):
    config, tensors, path = make(tmp_path / "m", *VARIANTS[name], shards=3)
    model = load(path)
    rows = sequences(config, generator)
    hidden, logits = run(model, rows)
    want = [TWINS[VARIANTS[name][0]](tensors, plain(config), row[None]) for row in rows]
    torch.testing.assert_close(hidden, torch.cat([h[0] for h, _ in want]), rtol=1e-4, atol=1e-5)
    want_logits = torch.cat([x[0] for _, x in want])[:, : config["vocab_size"]]
    torch.testing.assert_close(logits, want_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_bfloat16_tells_the_rope_precisions_apart(model_type, tmp_path, generator, monkeypatch):
    monkeypatch.setattr(
        attention.cpu, "_most_keys", lambda q: 0
    )  # torch's attention, as the twins have: it rounds alike
    config, tensors, path = make(tmp_path / "m", model_type, dtype=torch.bfloat16)
    rows = sequences(config, generator, (128,))
    hidden, _ = run(load(path), rows)
    assert hidden.dtype == torch.bfloat16
    in_fp32 = model_type == "llada"
    right, wrong = (
        TWINS[model_type](tensors, config, rows[0][None], rope_in_fp32=option)[0][0]
        for option in (in_fp32, not in_fp32)
    )
    exact = TWINS[model_type]({k: t.double() for k, t in tensors.items()}, config, rows[0][None])[0][0]
    near, far, own = ((hidden.double() - other.double()).norm() / exact.norm() for other in (right, wrong, exact))
    assert near < 0.5 * far and own < 0.03, (near, far, own)


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip_in_the_same_layout(name, tmp_path):
    config, tensors, path = make(tmp_path / "m", *VARIANTS[name], dtype=torch.bfloat16, shards=2)
    model = load(path)
    save_pretrained(model, tmp_path / "again", max_shard_bytes=20000)
    again = load_pretrained(tmp_path / "again")
    assert again.config == model.config
    saved = {}
    files = list((tmp_path / "again").glob("*.safetensors"))
    for file in files:
        saved |= load_file(file)
    if plain(config).get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)  # a tied head is stored once
    assert len(files) > 2 and set(saved) == set(tensors)
    assert all(saved[key].dtype == t.dtype and torch.equal(saved[key], t) for key, t in tensors.items())
    # What the new config.json says, it says as the old one; what it leaves out does not matter.
    before, after = plain(config), read_config(tmp_path / "again")
    layout = LAYOUTS[VARIANTS[name][0]]
    for key in set(before) & set(after) & (set(layout.honoured) | set(layout.fixed)):
        if before[key] is not None:
            assert after[key] == before[key], key
    lost = set(before) - set(after) - set(layout.ignored) - {"rope_parameters", "rope_type", "layer_types"}
    assert not {key for key in lost if before[key] is not None}


@pytest.mark.parametrize("model_type", CONFIGS)
def test_each_config_key_has_one_meaning(model_type, tmp_path):
    layout = LAYOUTS[model_type]
    tables = [set(layout.honoured), set(layout.fixed), set(layout.ignored), {"model_type"}]
    for key in CONFIGS[model_type]:
        assert sum(key in table for table in tables) == 1, key
    assert sum(map(len, tables)) == len(set().union(*tables)) and all(layout.ignored.values())
    fields = {f.name for f in dataclasses.fields(ModelConfig)} - {"model_type"}
    assert set(layout.honoured.values()) | set(layout.implied) <= fields
    assert layout.optional <= set(layout.honoured) and layout.explicit <= set(layout.fixed)


REFUSED = [
    ("llada", {"activation_type": "swiglu"}, "activation_type='swiglu' (supported: 'silu')"),
    ("llada", {"alibi": True}, "alibi=True (supported: False)"),
    ("llada", {"attention_layer_norm": True}, "attention_layer_norm=True (supported: False)"),
    ("llada", {"bias_for_layer_norm": True}, "bias_for_layer_norm=True (supported: False, None)"),
    ("llada", {"block_group_size": 4}, "block_group_size=4 (supported: 1)"),
    ("llada", {"block_type": "sequential"}, "block_type='sequential' (supported: 'llama')"),
    ("llada", {"include_bias": True}, "include_bias=True (supported: False)"),
    ("llada", {"input_emb_norm": True}, "input_emb_norm=True (supported: False)"),
    ("llada", {"layer_norm_type": "low_precision"}, "layer_norm_type='low_precision' (supported: 'rms')"),
    ("llada", {"layer_norm_with_affine": False}, "layer_norm_with_affine=False (supported: True)"),
    ("llada", {"multi_query_attention": True}, "multi_query_attention=True (supported: None, False)"),
    ("llada", {"rope": False}, "rope=False (supported: True)"),
    ("llada", {"scale_logits": True}, "scale_logits=True (supported: False)"),
    ("llada", {"include_bias": ...}, "lacks include_bias, which cannot be guessed"),
    ("llada", {"mlp_hidden_size": None}, "lacks mlp_hidden_size, which cannot be guessed"),
    ("llada", {"mask_token_id": ...}, "does not name the mask token of this llada model"),
    ("llada", {"rope_full_precision": 1}, "rope_full_precision must be bool, got 1"),
    ("illada", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling={'rope_type': 'yarn', 'factor': 4.0}"),
    ("illada", {"layer_norm_eps": 1e-5}, "layer_norm_eps=1e-05 (supported: None)"),
    ("illada", {"mlp_bias": True}, "mlp_bias=True (supported: False)"),
    ("illada", {"rms_norm_eps": ...}, "lacks rms_norm_eps"),
    ("illada", {"rms_norm_eps": "1e-6"}, "rms_norm_eps must be float, got '1e-6'"),
    ("illada", {"hidden_size": True}, "hidden_size must be int, got True"),
    ("illada", {"eos_token_id": [1, 2, 3]}, "eos_token_id must be one id, or two (end of text, of turn), got [1, 2, 3]"),
    ("illada", {"mask_token_id": 90}, "mask_token_id must be in [0, 90), got 90"),
    ("illada", {"mask_token_id": 2}, "mask_token_id (2) is model.eos_token_id as well; no text may contain the mask"),
    ("illada", {"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4} (unknown)"),
    ("illada", {"num_key_value_heads": 3}, "num_attention_heads (8) must be a multiple"),
    ("dream", {"use_sliding_window": True}, "use_sliding_window=True (supported: False)"),
    ("dream", {"use_mrope": True}, "use_mrope=True (supported: False)"),
    ("dream", {"hidden_act": "gelu"}, "hidden_act='gelu' (supported: 'silu')"),
    ("dream", {"mask_token_id": None}, "does not name the mask token of this dream model"),
    ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling={'type': 'yarn', 'factor': 4.0} (supported: None"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=['full_attention', 'sliding_attention']"),
    ("qwen2", {"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn"}}, "rope_parameters={'rope_theta': 1000000.0, 'rope_type': 'yarn'}"),
    ("qwen2", {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}, "rope_theta=1000000.0, but rope_parameters="),
    ("qwen2", {"eos_token_id": None}, "lacks eos_token_id"),
    ("qwen2", {"tie_word_embeddings": ...}, "lacks tie_word_embeddings"),
    ("qwen2", {"model_type": "qwen3"}, "model_type='qwen3' (supported: 'illada', 'llada', 'Dream', 'qwen2', 'illada_hf')"),
    ("qwen2", {"model_type": ...}, "model_type=None (supported:"),
]  # fmt: skip


@pytest.mark.parametrize("model_type,change,message", REFUSED)
def test_what_is_not_understood_is_refused_with_its_value(model_type, change, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(changed(CONFIGS[model_type], change)))
    given = {"mask_token_id": 66} if model_type == "qwen2" else {}
    with pytest.raises(ValueError) as error:
        load_config(tmp_path, **given)
    assert message in str(error.value) and str(tmp_path / "config.json") in str(error.value)


def test_special_ids_are_data_of_the_checkpoint(tmp_path):
    def config_of(model_type, change=None, **options):
        (tmp_path / "config.json").write_text(json.dumps(changed(CONFIGS[model_type], change or {})))
        config = load_config(tmp_path, **options)
        return config.mask_token_id, config.eos_token_id, config.eot_token_id, config.pad_token_id, config.bos_token_id

    assert config_of("illada") == (5, 2, None, 1, 0)
    assert config_of("illada", mask_token_id=7)[0] == 7
    assert config_of("illada", {"eos_token_id": [2, 9]}) == (5, 2, 9, 1, 0)
    assert config_of("llada") == (86, 81, None, 81, None)
    published = {
        "vocab_size": 126464,
        "embedding_size": 126464,
        "mask_token_id": 126336,
        "eos_token_id": 126081,
        "pad_token_id": 126081,
    }
    assert config_of("llada", published) == (126336, 126081, 126348, 126081, 126080)
    assert config_of("dream") == (66, 43, None, 43, 43)
    assert config_of("qwen2", mask_token_id=66) == (66, 43, None, None, 43)
    with pytest.raises(ValueError, match=r"does not name the mask token of this qwen2 model; give mask_token_id"):
        config_of("qwen2")
    with pytest.raises(ValueError, match=r"mask_token_id=7 was given, but .* names 66"):
        config_of("dream", mask_token_id=7)
    with pytest.raises(ValueError, match=r"mask_token_id must be in \[0, 80\), got 151666"):
        config_of("qwen2", mask_token_id=151666)


def test_keys_that_may_be_absent(tmp_path):
    # transformers leaves keys out that have its defaults, and writes others as null
    def config_of(model_type, change):
        (tmp_path / "config.json").write_text(json.dumps(changed(CONFIGS[model_type], change)))
        return load_config(tmp_path)

    absent = dict.fromkeys(
        ("tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act", "rope_scaling", "layer_norm_eps"), ...
    )
    assert config_of("illada", {**absent, "head_dim": None}) == config_of("illada", {})
    absent = dict.fromkeys(("n_kv_heads", "include_qkv_bias", "alibi", "scale_logits", "multi_query_attention"), ...)
    assert config_of("llada", absent) == config_of("llada", {})
    assert config_of("llada", {"embedding_size": ...}).embedding_size == 100
    assert config_of("dream", {"initializer_range": ..., "rope_scaling": {"rope_type": "default"}}) == config_of(
        "dream", {}
    )


def test_presets_are_what_the_published_configs_say(tmp_path):
    published = {
        "llada_8b": {
            **CONFIGS["llada"], "d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32, "vocab_size": 126464,
            "mlp_hidden_size": 12288, "embedding_size": 126464, "max_sequence_length": 4096, "mask_token_id": 126336,
            "eos_token_id": 126081, "pad_token_id": 126081,
        },
        "illada_8b": {
            **CONFIGS["illada"], "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 155136, "max_position_embeddings": 8192,
        },
    }  # fmt: skip
    qwen = {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 131072, "bos_token_id": 151643,
        "eos_token_id": 151643,
    }  # fmt: skip
    published["dream_7b"] = {**CONFIGS["dream"], **qwen, "pad_token_id": 151643, "mask_token_id": 151666}
    published["qwen2_7b"] = {**CONFIGS["qwen2"], **qwen, "mask_token_id": 151666}
    for name, config in published.items():
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert load_config(tmp_path) == ModelConfig.preset(name)
        names = shapes(config)
        if config.get("tie_word_embeddings"):
            assert len(names) == 291  # with the head that the published file repeats
            del names["lm_head.weight"]
        layout, model = (
            LAYOUTS[config["model_type"].lower()],
            MaskedDiffusionModel(load_config(tmp_path), device="meta"),
        )
        parts = {n: layout.file_parts(n, model.config) for n, _ in model.named_parameters()}
        parameters = dict(model.named_parameters())
        assert {key: list(parameters[n][rows].shape) for n in parts for key, rows in parts[n].items()} == names


@pytest.mark.parametrize("model_type", CONFIGS)
def test_wrong_names_are_listed_not_initialised(model_type, tmp_path):
    config, tensors, path = make(tmp_path / "m", model_type)
    renamed = {f"transformer.{key}": t for key, t in tensors.items()}  # as a wrapper's state dict has them
    save_file(renamed, path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load(path)
    tied = ["lm_head.weight"] if config.get("tie_word_embeddings") else []
    missing, unexpected = str(error.value).split("unexpected: ")
    for listed, more in ((unexpected, len(tensors) - 5), (missing, len(tensors) - len(tied) - 5)):
        assert listed.count(".weight") == 5 and f" and {more} more" in listed
    assert "unexpected: transformer." in str(error.value)
    first = next(key for key in tensors if key.endswith("q_proj.weight"))
    save_file({key: t for key, t in tensors.items() if key != first}, path / "model.safetensors")
    with pytest.raises(ValueError, match=f"missing: {first}$"):
        load(path)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_fused_projection_is_the_three_of_the_file(model_type, tmp_path):
    """Wherever they lie: the shards tear them apart. What is wrong with one is said of that one."""
    changes = {"n_kv_heads": 2, "include_qkv_bias": True} if model_type == "llada" else {}
    _, tensors, path = make(tmp_path / "m", model_type, changes, dtype=torch.bfloat16, shards=3)
    model = load(path)
    for name, parameter in model.named_parameters():
        if "qkv_proj" in name:
            parts = [tensors[LAYOUTS[model_type].file_name(name.replace("qkv", which))] for which in "qkv"]
            assert torch.equal(parameter, torch.cat(parts)) and parameter.is_contiguous() and parameter.requires_grad
    assert (model_type != "illada") == any(name.endswith("qkv_proj.bias") for name, _ in model.named_parameters())

    key = next(key for key in tensors if key.endswith("k_proj.weight"))
    short = tensors[key][:-1]
    for i, (change, message) in enumerate((
        ({}, f"missing: {key}"),
        ({key: short}, f"wrong: {key} is {list(short.shape)}, expected {list(tensors[key].shape)}"),
    )):  # fmt: skip
        folder = write(tmp_path / str(i), read_config(path), {k: t for k, t in tensors.items() if k != key} | change)
        with pytest.raises(ValueError) as error:
            load(folder)
        assert message in str(error.value) and "unexpected" not in str(error.value)


def test_other_damage_is_named(tmp_path):
    config, tensors, path = make(tmp_path / "m", "dream", shards=2)
    index = path / "model.safetensors.index.json"
    second = path / "model-00002-of-00002.safetensors"
    part = load_file(second)
    save_file(
        {
            **part,
            "model.norm.weight": tensors["model.norm.weight"],
            "model.embed_tokens.weight": tensors["model.embed_tokens.weight"],
        },
        second,
    )
    with pytest.raises(ValueError, match="is in two files"):
        load(path)
    save_file({key: t.to(torch.int8) for key, t in part.items()}, second)
    with pytest.raises(ValueError, match="is I8, expected F32, BF16, F16"):
        load(path)
    for content, said in (
        ("{", r" is not JSON: "),
        ('{"weight_map": ' + "[" * 100000, " is not JSON that can be read: it is nested too deeply"),
        ("{}", " lacks weight_map"),
        ("[]", " must hold a JSON object, got list"),
        ('{"weight_map": []}', ": weight_map must be an object with keys, got "),
        ('{"weight_map": {"a": 1}}', ": weight_map.a must be str, got 1"),
        (
            '{"weight_map": {"a": "../m/model.safetensors"}}',
            ": weight_map.a must be a file in its folder, got '../m/model.safetensors'",
        ),
    ):
        index.write_text(content)
        with pytest.raises(ValueError, match=rf"index\.json{said}"):
            load(path)
    index.write_text(json.dumps({"weight_map": {f"t{i}": f"{i}{'a' * 300}" for i in range(1000)}}))
    with pytest.raises(ValueError, match="lacks the shards .* and 995 more that its index names") as error:
        load(path)
    assert len(str(error.value)) < 2000
    index.unlink()
    for shard in path.glob("model-*.safetensors"):
        shard.unlink()
    (path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors; pytorch_model\.bin is a pickle"):
        load(path)


def test_convert_between_dtypes(tmp_path):
    _, tensors, path = make(tmp_path / "m", "llada", shards=2)
    convert_checkpoint(path, tmp_path / "half", dtype=torch.bfloat16)
    saved = load_file(tmp_path / "half" / "model.safetensors")
    assert all(torch.equal(saved[key], t.bfloat16()) for key, t in tensors.items())
    assert read_config(tmp_path / "half")["torch_dtype"] == "bfloat16"
    convert_checkpoint(tmp_path / "half", tmp_path / "wide", dtype=torch.float32, max_shard_bytes=30000)
    wide = load_pretrained(tmp_path / "wide")
    assert all(p.dtype == torch.float32 for p in wide.parameters())
    assert load_pretrained(tmp_path / "half", dtype=torch.float32).config == wide.config


@pytest.mark.parametrize("source,target", [("qwen2", "dream"), ("dream", "qwen2"), ("illada", "llada")])
def test_convert_between_layouts(source, target, tmp_path, generator):
    config, tensors, path = make(tmp_path / "m", source)
    convert_checkpoint(path, tmp_path / "there", model_type=target, mask_token_id=66 if source == "qwen2" else None)
    there = load_pretrained(tmp_path / "there")
    assert there.config == dataclasses.replace(load(path).config, model_type=target)
    rows = sequences(config, generator)
    assert torch.equal(run(there, rows)[1], run(load(path), rows)[1])
    # The twin of the target, fed with the target's own file, agrees with the twin of the source.
    file = load_file(tmp_path / "there" / "model.safetensors")
    want = TWINS[source](tensors, config, rows[0][None])[1]
    torch.testing.assert_close(TWINS[target](file, read_config(tmp_path / "there"), rows[0][None])[1], want)
    convert_checkpoint(tmp_path / "there", tmp_path / "back", model_type=source)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[key], tensors[key]) for key in back)


@pytest.mark.parametrize(
    "source,target,message",
    [
        ("llada", "illada", "the checkpoint layout 'illada' cannot express embedding_size=112, rope_in_fp32=True"),
        (
            "dream",
            "illada",
            "cannot express qkv_bias=True, logits_shift=True (it has qkv_bias=False, logits_shift=False)",
        ),
        ("dream", "llada", "cannot express logits_shift=True"),
        ("illada", "qwen2", "cannot express qkv_bias=False, logits_shift=False"),
    ],
)
def test_layouts_that_cannot_say_it(source, target, message, tmp_path):
    _, _, path = make(tmp_path / "m", source)
    with pytest.raises(NotImplementedError) as error:
        convert_checkpoint(path, tmp_path / "x", model_type=target)
    assert message in str(error.value) and [p.name for p in tmp_path.iterdir()] == ["m"]


def test_matches_transformers_with_a_full_attention_mask(tmp_path, generator):
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        hidden_size=56, intermediate_size=96, num_hidden_layers=2, num_attention_heads=7, num_key_value_heads=1,
        vocab_size=80, rope_theta=1e6, bos_token_id=3, eos_token_id=4, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    theirs.save_pretrained(tmp_path / "m")
    model = load_pretrained(tmp_path / "m", mask_token_id=66)
    row = sequences({"vocab_size": 80}, generator, (23,))[0]
    with torch.no_grad():
        want = theirs(row[None], attention_mask=torch.zeros(1, 1, 23, 23), use_cache=False).logits[0]
    _, logits = run(model, [row])
    torch.testing.assert_close(logits[1:], want[:-1], rtol=1e-4, atol=1e-4)
    save_pretrained(model, tmp_path / "back")
    again = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "back")
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), again.parameters(), strict=True))


@pytest.mark.slow
def test_memory_of_the_true_shapes(tmp_path):
    """An eighth of the 8B model's layers and vocabulary: its pages are those of the file, and the tenth of it that is
    copied into fused projections does not stay mapped."""
    config = {
        **CONFIGS["illada"], "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_hidden_layers": 4, "vocab_size": 19392, "max_position_embeddings": 8192,
    }  # fmt: skip
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes(config).items()}
    for tensor in tensors.values():
        tensor.view(torch.int16).random_(-1000, 1000)
    del tensors["lm_head.weight"]
    write(tmp_path / "m", config, tensors, shards=3)
    size = sum(file.stat().st_size for file in (tmp_path / "m").glob("*.safetensors"))
    del tensors
    # VmHWM and not ru_maxrss: the latter starts from what the parent held when it started the child.
    code = (
        "import re, torch; from illada.checkpoints.weights import load_pretrained\n"
        f"model = load_pretrained({str(tmp_path / 'm')!r})\n"
        "total = sum(int(p.view(-1).view(torch.int16)[::1024].sum()) for p in model.parameters())\n"
        "print(int(re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1]) * 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert size > 1.9e9
    assert size < int(done.stdout) < 1.2 * size  # all pages were touched, and Python, torch and all fit in a fifth
