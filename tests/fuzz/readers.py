"""What the commands do with each kind of file in a folder, and the valid files that the mutants are made of."""

import ctypes
import functools
import gzip
import json
import math
import runpy
import zlib
from random import Random

import numpy as np
import torch

from illada.checkpoints import folders as checkpoint_folders
from illada.checkpoints import weights
from illada.cli import sampling, score
from illada.config import ModelConfig
from illada.data import corpus
from illada.data.dataset import SPLITS, TokenDataset
from illada.data.sources import read_source
from illada.evaluation import dictionaries, questions, tasks
from illada.model import MaskedDiffusionModel
from illada.text import training
from illada.text.chat_template import render_chat_template
from illada.text.tokenizer import Tokenizer, read_template
from illada.text.tokenizer_files import control_tokens
from illada.train import load_config
from illada.train import state as train_state
from illada.train.log import Log
from illada.train.loop import _optimizer

MESSAGES = [{"role": "system", "content": "brief"}, {"role": "user", "content": "héllo\n"}]


def load():
    """Import what the readers import when they run."""
    import datasets  # noqa: F401
    import lm_eval.api.instance  # noqa: F401
    import matplotlib.backends.backend_agg  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch.distributed.fsdp  # noqa: F401
    import zstandard  # noqa: F401

    import illada.evaluation.lm_eval  # noqa: F401


# --------------------------------------------------------------------------------------- readers with a fault to be found


def crashes(folder):
    ctypes.string_at(0)


def hangs(folder):
    while True:
        pass


def fills_memory(folder):
    try:
        bytearray(1 << 28)
    except MemoryError:
        raise ValueError("full") from None


def looks_up(folder):
    {}["a"]


def passes_on(folder):
    int("a")


def says_all(folder):
    raise ValueError("a" * 10_000)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def read_checkpoint(folder):
    """Load weights, tokenizer and templates, and use them once."""
    checkpoint_folders.load(folder)


def read_weights(folder):
    """A model, run once."""
    model = weights.load_pretrained(folder).float()
    config = model.config
    if config.num_parameters < 1 << 20:
        with torch.no_grad():
            model(torch.tensor([config.eos_token_id]), torch.tensor([0, 1], dtype=torch.int32))


def convert_weights(folder):
    """Convert weights, as `illada convert` does."""
    weights.convert_checkpoint(folder, folder / "out", dtype=torch.bfloat16)
    weights.load_pretrained(folder / "out")


def read_tokenizer(folder):
    """A tokenizer, as prompts and chats use it."""
    tokenizer = Tokenizer.from_pretrained(folder)
    for text in ("", "hello <[MASK]> wörld", "a\x00b \U0001f600"):
        ids = tokenizer.encode_prompt(text, parse_special_tokens=False)
        tokenizer.decode(ids)
        tokenizer.encode(text, add_special_tokens=True)
    tokenizer.decode([0, 7, 1 << 20], skip_special_tokens=False)
    if tokenizer.chat_template is not None:
        tokenizer.apply_chat_template(MESSAGES)
    ids = training.special_ids(tokenizer.backend)
    control_tokens(tokenizer.backend, ids.values())


def render_template(folder):
    """A chat template, with a conversation."""
    template = read_template(folder / "chat_template.jinja")
    render_chat_template(template, MESSAGES, bos_token="<s>", eos_token="</s>", enable_thinking=False)
    answered = [*MESSAGES, {"role": "assistant", "content": "so "}]
    render_chat_template(template, answered, add_generation_prompt=False, continue_final_message=True)


# --------------------------------------------------------------------------------------------------------------- corpora


def read_corpus(folder):
    """A corpus, as training and tasks use it."""
    for split in SPLITS:
        dataset = TokenDataset(folder, split)
        dataset.windows(np.arange(min(2, dataset.num_windows(8))), 8)
        dataset.unigram_entropy()
        sum(map(len, dataset.documents()))
    config = load_config(None, ["data.window=8", "model.preset=tiny"])
    config.model_config(dataset.header)
    tasks.prepare_tasks(folder, ["cloze_word"])


def prepare(folder):
    """Prepare a corpus, as `illada prepare --tokenizer` does."""
    source = f"jsonl:{folder / 'text.jsonl'}"
    corpus.prepare(source, folder / "out", tokenizer=folder / "tokenizer.json", validation_fraction=0.4, progress=False)
    TokenDataset(folder / "out").unigram_entropy()


def read_texts(folder):
    """A source of text."""
    if (folder / "text.jsonl").exists():
        sum(map(len, read_source(f"jsonl:{folder / 'text.jsonl'}")))
    sum(map(len, read_source(f"dir:{folder}")))


def read_records(folder):
    """Read files of records, compressed ones and a saved dataset, as sources that are named."""
    for path in sorted(folder.iterdir()):
        sum(map(len, read_source(str(path))))
    sum(map(len, read_source(f"dir:{folder}")))


def read_questions(folder):
    """Read the files of `illada score --file` and `illada generate --prompt-file`."""
    options = sampling.argparse.Namespace(candidate=None, context="", file=folder / "questions.jsonl")
    score._questions(options)


def read_tasks(folder):
    """The questions of a task, by the reader that lies beside them."""
    runpy.run_path(str(folder / "read_jsonl.py"))["read"]("cloze_word.jsonl")


def read_wordnet(folder):
    """Read a dictionary, as `illada prepare --dictionary wordnet:PATH` does."""
    questions.definition_questions(dictionaries.read_wordnet(folder), most=100)


# -------------------------------------------------------------------------------------------------------------- training


def read_settings(folder):
    """A TOML file, and settings of the command line beside it; what loads is written and loads again."""
    settings = (folder / "settings").read_bytes().decode(errors="surrogateescape").split("\n")
    file = folder / "run.toml"
    config = load_config(file if file.exists() else None, [text for text in settings if text])
    (folder / "again.toml").write_text(config.to_toml(), encoding="utf-8")
    assert load_config(folder / "again.toml").to_dict() == config.to_dict()
    assert load_config(None, []).to_toml(commented=True)


def resume(folder):
    """A training checkpoint: state, weights and moments, and a step with them."""
    found = folder / "checkpoints" / "step-000001"
    config = load_config(folder / "run.toml")
    values = train_state.read_state(found)
    train_state.check_same_run(found, values, config, values["tokenizer_sha256"])
    model = MaskedDiffusionModel(_tiny())
    optimizer = _optimizer(model, config)
    train_state.restore(found, model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def read_log(folder):
    """Continue the metrics.jsonl of a run."""
    content = (folder / "metrics.jsonl").read_bytes()
    log = Log(folder, step=1, steps=2, progress=False)
    try:
        log.has_validation(1)
        log.validation(step=2, seconds=1.0, bound=2.0, unigram_entropy=3.0, tokens_seen=9)
        values = dict.fromkeys(("loss", "learning_rate", "grad_norm", "tokens_per_second", "data_wait"), 1.0)
        log.train(step=2, seconds=1.0, tokens_seen=9, loss_by_t=[None], **values)
        if zlib.crc32(content) % 8 == 0:  # it takes half a second
            log.plot()
    finally:
        log.close()


def read_journal(folder):
    """Read the journal of `illada eval --resume`: its results are used, or computed again."""
    from lm_eval.api.instance import Instance

    from illada.evaluation.lm_eval import IlladaLM

    model, tokenizer = _tiny_model(), Tokenizer(training.train_tokenizer(["a b c"], 262))
    lm = IlladaLM(model, tokenizer=tokenizer, journal=folder / "eval.json.journal", max_tokens=64, gen_length=4)
    pairs = [Instance("loglikelihood", {}, ("a", text), i, task_name="t") for i, text in enumerate(("b", "c c"))]
    for value, greedy in lm.loglikelihood(pairs):
        assert math.isfinite(value) and isinstance(greedy, bool)
    asked = [Instance("generate_until", {}, ("a", {"until": ["\n"], "max_gen_toks": 4}), 0, task_name="t")]
    assert all(isinstance(text, str) for text in lm.generate_until(asked))


@functools.cache
def _tiny_model():
    return MaskedDiffusionModel(_tiny())


def _tiny(model_type="illada", **changes):
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "mask_token_id": 5}
    sizes = {"vocab_size": 262, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return ModelConfig(**sizes, **heads, **ids, model_type=model_type, **changes)


# ----------------------------------------------------------------------------------------------------------- valid files


def files_in(folder):
    """Return {name: bytes} of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if loop.first and message['role'] == 'system' %}"
    "{{ '<<SYS>>' ~ message.content | trim }}{% else %}{{- '<|' + message['role'] + '|>\n' + message['content'] -}}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def _records(root, texts):
    """Files of records of each kind, each in two forms where it has them."""
    import datasets
    import pyarrow
    import pyarrow.parquet
    import zstandard

    texts = [*texts[:3], None, 'a "quoted" text, é\n']
    data = datasets.Dataset.from_dict({"id": range(len(texts)), "text": texts})
    data.save_to_disk(root / "saved")
    table = pyarrow.table({"id": range(len(texts)), "text": texts})
    pyarrow.parquet.write_table(table, root / "plain.parquet", compression="none", use_dictionary=False)
    pyarrow.parquet.write_table(table, root / "packed.parquet", compression="zstd", row_group_size=2)
    rows = ['"' + (text or "").replace('"', '""') + f'",{i}\n' for i, text in enumerate(texts)]
    written = "".join(["text,id\n", *rows]).encode()
    files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return {**files, "a.csv": written, "b.csv.gz": gzip.compress(written), "c.csv.zst": zstandard.compress(written)}


def make_valid(root):
    """Return {name: files} of everything that is read, made in a folder."""
    valid = {}
    random = Random(7)
    letters = "abcdefgh"
    texts = [" ".join("".join(random.choices(letters, k=4)) for _ in range(500)) for _ in range(6)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (root / "text.jsonl").write_text(lines)
    corpus.prepare(f"jsonl:{root / 'text.jsonl'}", root / "corpus", vocab_size=262, validation_fraction=0.4)
    valid["corpus"] = files_in(root / "corpus")
    tasks.prepare_tasks(root / "corpus", ["cloze_word"])
    valid["tasks"] = files_in(root / "corpus" / "tasks")
    tokenizer = root / "corpus" / "tokenizer.json"

    layouts = {
        "illada": _tiny(),
        "llada": _tiny("llada", tie_word_embeddings=False, rope_in_fp32=True),
        "dream": _tiny("dream", tie_word_embeddings=False, qkv_bias=True, logits_shift=True),
        "qwen2": _tiny("qwen2", qkv_bias=True, logits_shift=True),
    }
    for name, config in layouts.items():
        weights.save_pretrained(MaskedDiffusionModel(config), root / name, tokenizer=tokenizer)
        (root / name / "generation_config.json").write_text('{"eos_token_id": [2, 3], "do_sample": false}')
        valid[name] = files_in(root / name)
    model = MaskedDiffusionModel(_tiny())
    weights.save_pretrained(model, root / "shards", max_shard_bytes=4000)
    valid["shards"] = files_in(root / "shards")

    declared = {str(i): {"content": token, "special": True} for i, token in enumerate(training.SPECIAL_TOKENS.values())}
    settings = {
        "added_tokens_decoder": declared,
        "bos_token": {"content": training.SPECIAL_TOKENS["bos"], "lstrip": False},
        "eos_token": training.SPECIAL_TOKENS["eos"],
        "additional_special_tokens": [training.SPECIAL_TOKENS["mask"]],
        "chat_template": [{"name": "default", "template": TEMPLATE}],
    }
    valid["tokenizer"] = {
        "tokenizer.json": tokenizer.read_bytes(),
        "tokenizer_config.json": json.dumps(settings).encode(),
        "special_tokens_map.json": json.dumps({"pad_token": training.SPECIAL_TOKENS["pad"]}).encode(),
    }
    valid["prepare"] = {"tokenizer.json": tokenizer.read_bytes(), "text.jsonl": lines.encode()}
    valid["template"] = {"chat_template.jinja": TEMPLATE.encode()}
    valid["texts"] = {"text.jsonl": lines.encode(), "a.txt": "déjà\nvu\r\n".encode(), "b.json": b'{"a": 1}'}
    valid["records"] = _records(root / "records", texts)
    questions = [{"context": "a", "candidates": ["b", "c"]}, {"context": "", "candidates": ["d"]}]
    valid["questions"] = {"questions.jsonl": "".join(json.dumps(q) + "\n" for q in questions).encode()}
    valid["wordnet"] = _wordnet()

    run = root / "run"
    overrides = [f"model.{k}={json.dumps(v)}" for k, v in _tiny().to_dict().items() if v is not None]
    config = load_config(None, ["model.preset=tiny", *overrides, "optimizer.clip_norm=1"])
    valid["toml"] = {
        "run.toml": config.to_toml(commented=True).encode(),
        "settings": b"--train.seed=3\n--model.vocab_size=262",
    }
    valid["settings"] = {"settings": "\n".join(f"--{o}" for o in ("model.preset=tiny", *overrides[:6])).encode()}
    model = MaskedDiffusionModel(_tiny())
    optimizer = _optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    values = {
        "step": 1,
        "tokens_seen": 64,
        "unlogged_losses": [2.5],
        "decay_step": 1,
        "validation_bounds": [(1, 2.4)],
        "corpus": "0",
    }
    train_state.save(run / "checkpoints", model, optimizer, config, tokenizer=tokenizer, **values)
    (run / "run.toml").write_text(config.to_toml())
    metrics = [
        {"kind": "train", "step": 1, "seconds": 0.5, "loss": 2.5, "learning_rate": 0.1},
        {"kind": "validation", "step": 1, "seconds": 0.6, "bound": 2.4, "unigram_entropy": 3.0},
    ]
    valid["run"] = files_in(run)
    valid["log"] = {"metrics.jsonl": "".join(json.dumps(record) + "\n" for record in metrics).encode()}

    (root / "eval").mkdir()
    read_journal(root / "eval")
    valid["journal"] = {"eval.json.journal": (root / "eval" / "eval.json.journal").read_bytes()}
    return valid


def _wordnet():
    """Return data and index files in WordNet's format."""
    words = [f"{a}{b}" for a in ("alpha", "brave", "cloud", "delta") for b in ("ber", "cat", "dim", "fog", "gum")]
    data_lines, index_lines, counts = ["  1 a licence"], ["  1 a licence"], []
    for i, word in enumerate(words):
        pointer = f"001 @ {(i + 1) % len(words):08} n 0000"
        gloss = f'a thing of sort {i} that stands for something else; "an example"'
        data_lines.append(f"{i:08} 03 n 01 {word} 0 {pointer} | {gloss}  ")
        index_lines.append(f"{word} n 1 1 @ 1 1 {i:08}  ")
        counts.append(f"{word}%1:03:00:: 1 {i + 1}")
    files = {"data.noun": data_lines, "index.noun": index_lines, "cntlist.rev": counts}
    return {name: ("\n".join(lines) + "\n").encode() for name, lines in files.items()}
