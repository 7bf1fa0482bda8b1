"""`illada convert --hf`: the folder in transformers against our own model, and back into our layouts."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from published_checkpoints import CONFIGS, weights, write
from transformers import AutoModelForMaskedLM, AutoTokenizer

import illada
from illada import cli
from illada import model as our_model
from illada.checkpoints.weights import load_pretrained, read_config, save_pretrained, write_pretrained
from illada.config import ModelConfig
from illada.hf_export import modeling_illada
from illada.hf_export.modeling_illada import IlladaForMaskedLM, IlladaModel
from illada.integrations import transformers as attention
from illada.model import MaskedDiffusionModel
from illada.text.tokenizer import Tokenizer
from illada.text.training import train_tokenizer

SMALL = {
    "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "mask_token_id": 5, "eos_token_id": 2, "pad_token_id": 1, "bos_token_id": 0,
    "model_type": "illada_hf",
}  # fmt: skip
OPTIONS = {  # each option of ModelConfig that changes what is computed, on and off
    "iLLaDA": {},
    "Dream": {"qkv_bias": True, "logits_shift": True, "tie_word_embeddings": False, "pad_token_id": None},
    "LLaDA": {"rope_in_fp32": True, "embedding_size": 104, "num_key_value_heads": 4, "tie_word_embeddings": False},
    "all": {
        "qkv_bias": True, "logits_shift": True, "rope_in_fp32": True, "embedding_size": 104, "head_dim": 12,
        "num_key_value_heads": 1, "rope_theta": 1e4, "rms_norm_eps": 1e-4,
    },
}  # fmt: skip
SEQUENCES = (9, 5, 1)


def random_model(**options):
    model = MaskedDiffusionModel(ModelConfig.from_dict({**SMALL, **options}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15 + ("norm" in name))
    return model


@pytest.fixture
def pair(tmp_path):
    """Return our model, and the exported one with its weights."""

    def make(**options):
        model = random_model(**options)
        save_pretrained(model, tmp_path / "hf")
        return model, IlladaForMaskedLM.from_pretrained(tmp_path / "hf")

    return make


def batch(side, generator):
    """Return (tokens and attention_mask [3, 9], packed tokens, cu_seqlens)."""
    sequences = [torch.randint(6, 90, (n,), generator=generator) for n in SEQUENCES]
    tokens, mask = torch.ones(3, 9, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.int64)
    for i, sequence in enumerate(sequences):
        where = slice(0, len(sequence)) if side == "right" else slice(9 - len(sequence), 9)
        tokens[i, where], mask[i, where] = sequence, 1
    return tokens, mask, *illada.pack(sequences)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", OPTIONS)
def test_logits_loss_and_gradients_are_ours(options, side, pair, generator):
    attention.register()
    model, exported = pair(**OPTIONS[options])
    tokens, mask, packed, cu_seqlens = batch(side, generator)
    labels = torch.where((torch.rand(3, 9, generator=generator) < 0.5) & mask.bool(), tokens, -100)
    want = model(packed, cu_seqlens) @ model.head_weight.T
    loss = F.cross_entropy(want, labels[mask.bool()])
    loss.backward()
    for implementation in ("sdpa", "eager", "illada"):
        exported.set_attn_implementation(implementation)
        exported.zero_grad()
        out = exported(tokens, attention_mask=mask, labels=labels)
        assert out.logits.shape == (3, 9, 90)
        torch.testing.assert_close(out.logits[mask.bool()], want, rtol=0, atol=1e-5)
        torch.testing.assert_close(out.loss, loss, rtol=0, atol=1e-5)
        out.loss.backward()
        named = dict(exported.named_parameters())
        for name in ("norm.weight", "embed_tokens.weight", "layers.0.mlp.down_proj.weight"):
            got = named[f"model.{name}"].grad
            torch.testing.assert_close(got, model.get_parameter(name).grad, rtol=1e-3, atol=1e-5)
    alone = exported(tokens[:1]).logits  # without a mask; the first row has no padding
    torch.testing.assert_close(alone[0], want[: SEQUENCES[0]], rtol=0, atol=1e-5)


def test_in_bfloat16_rope_rounds_where_ours_does(pair, generator):
    for rope_in_fp32 in (False, True):
        model, exported = pair(rope_in_fp32=rope_in_fp32)
        tokens, mask, packed, cu_seqlens = batch("left", generator)
        hidden, got = model.bfloat16()(packed, cu_seqlens), exported.bfloat16().model(tokens, attention_mask=mask)
        torch.testing.assert_close(got.last_hidden_state[mask.bool()], hidden, rtol=0.05, atol=0.05)


def test_a_packed_row(pair, generator):
    """One row of several sequences, as DataCollatorWithFlattening makes it: their positions start again."""
    attention.register()
    model, exported = pair(**OPTIONS["all"])
    _, _, packed, cu_seqlens = batch("left", generator)
    exported.set_attn_implementation("illada")
    position_ids = torch.cat([torch.arange(n) for n in SEQUENCES])[None]
    got = exported(packed[None], position_ids=position_ids, cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens).logits
    torch.testing.assert_close(got[0], model(packed, cu_seqlens) @ model.head_weight.T, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="position_ids start anew within a row.*pass cu_seq_lens_q"):
        exported(packed[None], position_ids=position_ids)


def test_checkpointing_outputs_and_accumulation(pair, generator):
    _, exported = pair(**OPTIONS["Dream"])
    tokens, mask, _, _ = batch("right", generator)
    labels = tokens.masked_fill(mask == 0, -100)
    asked = {"attention_mask": mask, "labels": labels}
    exported.train()
    want = torch.autograd.grad(exported(tokens, **asked).loss, list(exported.parameters()))
    exported.gradient_checkpointing_enable()
    calls, handle = [], exported.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    got = torch.autograd.grad(exported(tokens, **asked).loss, list(exported.parameters()))
    handle.remove()
    assert len(calls) == 2 and all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    # What Trainer passes for accumulated steps: the sum over their tokens
    total = exported(tokens, **asked, num_items_in_batch=60).loss * 60
    torch.testing.assert_close(total, exported(tokens, **asked).loss * (labels != -100).sum())
    exported.eval().set_attn_implementation("eager")
    out = exported(tokens, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    assert [x.shape for x in out.hidden_states] == [(3, 9, 32)] * 3
    torch.testing.assert_close(exported.lm_head(out.hidden_states[-1]), out.logits)
    assert [x.shape for x in out.attentions] == [(3, 4, 9, 9)] * 2 and not out.attentions[0][1, :, :, 5:].any()
    embeddings = exported.get_input_embeddings()(tokens)
    assert torch.equal(exported(inputs_embeds=embeddings, attention_mask=mask, return_dict=False)[0], out.logits)
    exported.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="output_attentions needs attn_implementation='eager'.*has 'sdpa'"):
        exported(tokens, output_attentions=True)
    with pytest.raises(ValueError, match="give input_ids or inputs_embeds, one of them"):
        exported(tokens, inputs_embeds=embeddings)


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_through_transformers(tied, pair, tmp_path):
    """Saved by transformers, read by us: the same bits, also after a change of the vocabulary."""
    model, exported = pair(tie_word_embeddings=tied, embedding_size=104, qkv_bias=True)
    assert (exported.lm_head.weight is exported.model.embed_tokens.weight) == tied
    exported.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    again = load_pretrained(tmp_path / "again")
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    exported.resize_token_embeddings(112)
    exported.save_pretrained(tmp_path / "larger")
    assert (load_pretrained(tmp_path / "larger").config.vocab_size, exported.config.embedding_size) == (112, 112)
    for kind in (IlladaModel, IlladaForMaskedLM):
        half, info = kind.from_pretrained(
            tmp_path / "hf", dtype=torch.bfloat16, device_map="cpu", output_loading_info=True
        )
        assert half.dtype == torch.bfloat16 and not any(info.values())


def convert(*arguments):
    return cli.main(["convert", *map(str, arguments)])


@pytest.mark.parametrize("kind", CONFIGS)
def test_convert_there_and_back(kind, tmp_path, capsys):
    """Every layout, in bfloat16 and in shards, bit for bit; code in the folder is never run."""
    source = write(tmp_path / "source", CONFIGS[kind], weights(CONFIGS[kind], torch.bfloat16), shards=2)
    mask = ("--mask-token-id", 66) if kind == "qwen2" else ()
    assert convert(source, tmp_path / "hf", "--hf", "--max-shard-size", "40KB", *mask) == 0
    assert "parameters in the illada_hf layout" in capsys.readouterr().out
    config = read_config(tmp_path / "hf")
    assert config["architectures"] == ["IlladaForMaskedLM"] and config["transformers_version"] == "5.0.0"
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForMaskedLM"}
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    for code in (tmp_path / "hf").glob("*.py"):
        code.write_text("raise SystemExit('nobody runs this')")
    assert convert(tmp_path / "hf", tmp_path / "back", "--model-type", kind) == 0
    want, got = load_pretrained(source, mask_token_id=66 if mask else None), load_pretrained(tmp_path / "back")
    assert got.config == want.config
    for (name, a), (_, b) in zip(want.named_parameters(), got.named_parameters(), strict=True):
        assert a.dtype == b.dtype == torch.bfloat16 and torch.equal(a, b), name
    assert not list((tmp_path / "back").glob("*.py")) and not (tmp_path / "back" / "README.md").exists()


@pytest.fixture
def tokenizer_folder(tmp_path):
    """Make a tokenizer whose files name two eos tokens, its own bos and no mask; transformers takes the older file."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    train_tokenizer(["the quick brown fox\n"] * 9, 290).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "the", "model_max_length": 77, "unk_token": "x"}')
    (folder / "special_tokens_map.json").write_text('{"eos_token": "quick", "additional_special_tokens": ["a"]}')
    return folder


def test_special_tokens_are_named_by_the_ids_of_the_model(tokenizer_folder, tmp_path):
    model = random_model(vocab_size=320, bos_token_id=None, mask_token_id=310)  # no text: nothing has the id 310
    save_pretrained(model, tmp_path / "hf", tokenizer=tokenizer_folder)
    values = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    own = Tokenizer.from_pretrained(tokenizer_folder / "tokenizer.json").backend
    assert values == {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": own.id_to_token(2), "pad_token": own.id_to_token(1),
        "model_max_length": 77, "unk_token": "x", "additional_special_tokens": ["a"],
        "model_input_names": ["input_ids", "attention_mask"],
    }  # fmt: skip
    assert not (tmp_path / "hf" / "special_tokens_map.json").exists()
    assert "The mask is token 310, which the tokenizer does not name." in (tmp_path / "hf" / "README.md").read_text()
    save_pretrained(random_model(vocab_size=320), tmp_path / "named", tokenizer=tokenizer_folder / "tokenizer.json")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "named", config=IlladaForMaskedLM.config_class())
    ids = (loaded.mask_token_id, loaded.eos_token_id, loaded.pad_token_id, loaded.bos_token_id)
    assert ids == (5, 2, 1, 0) and loaded("the fox").input_ids == own.encode("the fox").ids
    assert loaded(f"the {loaded.mask_token}").input_ids[-1] == 5


@pytest.mark.parametrize("damaged", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_damaged_tokenizer_is_found_before_anything_is_written(damaged, tokenizer_folder, tmp_path):
    (tokenizer_folder / damaged).write_text("[")
    folder = tmp_path / "written"
    folder.mkdir()
    with pytest.raises(ValueError, match=re.escape(f"{tokenizer_folder / damaged} ")):
        write_pretrained(random_model(), folder, tokenizer=tokenizer_folder)
    assert not list(folder.iterdir())
    with pytest.raises(ValueError, match=re.escape(f"{tokenizer_folder / damaged} ")):
        save_pretrained(random_model(), tmp_path / "saved", tokenizer=tokenizer_folder)
    assert not (tmp_path / "saved").exists()


def test_a_tokenizer_that_comes_alone_has_no_tokens_of_the_files_beside_it(tokenizer_folder, tmp_path):
    """They do not come along, so transformers would give them other ids."""
    size = Tokenizer.from_pretrained(tokenizer_folder / "tokenizer.json").backend.get_vocab_size()
    beside = {"added_tokens_decoder": {str(size): {"content": "<later>", "special": True}}}
    (tokenizer_folder / "tokenizer_config.json").write_text(json.dumps(beside))
    for source, want in ((tokenizer_folder, "<later>"), (tokenizer_folder / "tokenizer.json", None)):
        save_pretrained(
            random_model(vocab_size=320, mask_token_id=size), tmp_path / f"hf-{source.name}", tokenizer=source
        )
        values = json.loads((tmp_path / f"hf-{source.name}" / "tokenizer_config.json").read_text())
        assert values.get("mask_token") == want


@pytest.mark.parametrize("head_dim", [2, 12, 64, 128])
@pytest.mark.parametrize("rope_theta", [1e4, 5e5, 1e6, 12345.678])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rope_in_fp32", [False, True])
def test_rope_is_ours_bit_for_bit(head_dim, rope_theta, dtype, rope_in_fp32, generator):
    sizes = {"head_dim": head_dim, "rope_theta": rope_theta, "rope_in_fp32": rope_in_fp32}
    theirs, ours = IlladaForMaskedLM.config_class(**sizes), ModelConfig.from_dict({**SMALL, **sizes})
    positions = torch.tensor([0, 1, 2, 3, 7, 101, 4097, 8191, 65537, 1048575, 16777215])
    want = our_model.rotary_tables(positions, ours, dtype)
    got = modeling_illada.rotary_tables(positions[None], theirs, dtype)
    assert all(a.dtype == b.dtype and torch.equal(a[0, 0], b[:, 0]) for a, b in zip(got, want, strict=True))
    x = torch.randn(len(positions), 3, head_dim, generator=generator).to(dtype)
    rotated = modeling_illada.rotate(x.transpose(0, 1)[None], *got)[0].transpose(0, 1)
    assert rotated.dtype == dtype and torch.equal(rotated, our_model.rotate(x, *want))


def test_a_training_run_and_what_is_refused(tmp_path, capsys):
    run = tmp_path / "run" / "checkpoints" / "step-000002"
    write(run, CONFIGS["illada"], weights(CONFIGS["illada"]))
    assert convert(tmp_path / "run", tmp_path / "hf", "--hf") == 0
    files = {"config.json", "model.safetensors", "README.md", "configuration_illada.py", "modeling_illada.py"}
    assert {file.name for file in (tmp_path / "hf").iterdir()} == files
    assert re.search(r"token \d+\. \*\*This folder has no tokenizer.json", (tmp_path / "hf" / "README.md").read_text())
    assert convert(tmp_path / "run", tmp_path / "hf", "--hf") == 2
    assert "exists; overwrite it with --overwrite" in capsys.readouterr().err
    assert convert(tmp_path / "hf", tmp_path / "hf", "--overwrite") == 0  # the layout of the source
    assert {file.name for file in (tmp_path / "hf").iterdir()} == files
    for arguments, message in (
        ((run, tmp_path / "x", "--hf", "--model-type", "llada"), "not allowed with argument --hf"),
        (("--help",), "convert demo-hf back --model-type illada"),
    ):
        with pytest.raises(SystemExit):
            convert(*arguments)
        captured = capsys.readouterr()
        assert message in captured.err + captured.out


@pytest.fixture
def folder(tmp_path, remote_code):
    """An exported checkpoint with its tokenizer."""
    train_tokenizer(["the quick brown fox\n"] * 9, 290).save(str(tmp_path / "tokenizer.json"))
    save_pretrained(random_model(vocab_size=290), tmp_path / "hf", tokenizer=tmp_path / "tokenizer.json")
    return tmp_path / "hf"


def blocks(folder):
    """The Python of the model card, for its own folder."""
    card = (folder / "README.md").read_text()
    return [code.replace("FOLDER", str(folder)) for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL)]


def test_the_card_says_how_to_load_and_to_sample(folder, capsys):
    load, sample = blocks(folder)
    scope = {}
    exec(load, scope)
    assert type(scope["model"]).__module__.startswith("transformers_modules") and scope["logits"].shape[-1] == 290
    exec(sample, {})
    (folder / "tokenizer.json").unlink()
    assert isinstance(AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True), type(scope["model"]))


@pytest.mark.slow
def test_in_an_environment_without_illada(folder, tmp_path):
    """A process in which `import illada` fails loads the folder, trains it and saves it; we read what it wrote."""
    script = f"""
import sys
sys.modules["illada"] = None
try:
    import illada
except ImportError:
    print("no illada")
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, pipeline
{blocks(folder)[0]}
folder = {str(folder)!r}
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert config.mask_token_id == tokenizer.mask_token_id == 5 and tokenizer.pad_token_id == 1
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "IlladaModel"
batch = tokenizer(["the quick", "brown"], padding=True, return_tensors="pt")
model.train()
model(**batch, labels=batch["input_ids"]).loss.backward()
torch.optim.SGD(model.parameters(), 0.1).step()
model.save_pretrained(folder + "-trained")
tokenizer.save_pretrained(folder + "-trained")
fill = pipeline("fill-mask", folder + "-trained", trust_remote_code=True)
print(len(fill("the quick " + tokenizer.mask_token)), "fillings")
torch.save(model.eval()(**batch).logits, folder + "-trained/logits.pt")
torch.save(dict(batch), folder + "-trained/batch.pt")
assert not [name for name in sys.modules if name.startswith("illada.")]
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "no illada\n5 fillings" in done.stdout
    trained = tmp_path / "hf-trained"
    model, batch = load_pretrained(trained), torch.load(trained / "batch.pt")
    packed, cu_seqlens = illada.pack([row[keep.bool()] for row, keep in zip(*batch.values(), strict=True)])
    logits = torch.load(trained / "logits.pt")[batch["attention_mask"].bool()]
    torch.testing.assert_close(logits, model(packed, cu_seqlens) @ model.head_weight.T, rtol=0, atol=1e-5)
    assert torch.equal(torch.tensor(Tokenizer.from_pretrained(trained).encode("brown")), batch["input_ids"][1][:5])
