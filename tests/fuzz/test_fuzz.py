"""Every file that a command reads, damaged: the command succeeds or says in one line what is wrong.

Never another error, a signal, over 10 s, or over 10 times the files' size and 64 MB of memory. `make fuzz` runs 20,000
inputs (EXAMPLES=N); without ILLADA_FUZZ, which it sets, a few of each kind that are always the same run. The inputs that
fail are left in .cache/fuzz, with what happened beside them.
"""

import hashlib
import os
from pathlib import Path

import mutants
import pytest
import readers
from child import Child
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "fuzz"
set_hypothesis_home_dir(CACHE / "hypothesis")
pytestmark = pytest.mark.slow
INPUTS = int(os.environ.get("ILLADA_FUZZ", "0"))  # over all kinds of files; 0: the short run
SHORT = 12  # inputs of each kind in the short run
MOST_HANGS = 5  # of a kind of files

#: (what is valid, the file that is damaged, how, who reads it).
_STEP = "checkpoints/step-000001"
_FIELDS = st.sampled_from(mutants.ODD_TEXTS + mutants.ODD_NUMBERS)
_RECORDS = "a.csv", "b.csv.gz", "c.csv.zst", "plain.parquet", "packed.parquet", "saved/data-00000-of-00001.arrow"
KINDS = [
    *((name, "config.json", mutants.json_file, "read_weights") for name in ("illada", "llada", "dream", "qwen2")),
    ("illada", "model.safetensors", mutants.safetensors_file, "read_weights"),
    ("llada", "model.safetensors", mutants.safetensors_file, "convert_weights"),
    ("shards", "model.safetensors.index.json", mutants.json_file, "read_weights"),
    ("dream", "generation_config.json", mutants.json_file, "read_checkpoint"),
    ("tokenizer", "tokenizer.json", mutants.tokenizer_file, "read_tokenizer"),
    ("tokenizer", "tokenizer_config.json", mutants.json_file, "read_tokenizer"),
    ("tokenizer", "special_tokens_map.json", mutants.json_file, "read_tokenizer"),
    ("template", "chat_template.jinja", mutants.new_template, "render_template"),
    ("template", "chat_template.jinja", mutants.template_file, "render_template"),
    ("corpus", "corpus.json", mutants.json_file, "read_corpus"),
    ("corpus", "validation-00000.bin", lambda data: mutants.numbers_file(data, "uint16"), "read_corpus"),
    ("corpus", "train-00000.idx", lambda data: mutants.numbers_file(data, "uint64"), "read_corpus"),
    ("prepare", "tokenizer.json", mutants.tokenizer_file, "prepare"),
    ("texts", "text.jsonl", mutants.jsonl_file, "read_texts"),
    ("texts", "a.txt", mutants.damaged, "read_texts"),
    *(("records", name, mutants.damaged, "read_records") for name in _RECORDS),
    *(("records", f"saved/{name}.json", mutants.json_file, "read_records") for name in ("state", "dataset_info")),
    ("questions", "questions.jsonl", mutants.jsonl_file, "read_questions"),
    ("tasks", "cloze_word.jsonl", mutants.jsonl_file, "read_tasks"),
    ("wordnet", "data.noun", lambda data: mutants.lines_of(data, _FIELDS), "read_wordnet"),
    ("wordnet", "index.noun", lambda data: mutants.lines_of(data, _FIELDS), "read_wordnet"),
    ("wordnet", "cntlist.rev", lambda data: mutants.lines_of(data, _FIELDS), "read_wordnet"),
    ("toml", "run.toml", mutants.toml_file, "read_settings"),
    ("settings", "settings", mutants.settings_lines, "read_settings"),
    ("run", f"{_STEP}/trainer.json", mutants.json_file, "resume"),
    ("run", f"{_STEP}/optimizer.safetensors", mutants.safetensors_file, "resume"),
    ("log", "metrics.jsonl", mutants.jsonl_file, "read_log"),
    ("journal", "eval.json.journal", mutants.jsonl_file, "read_journal"),
]  # fmt: skip


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    return readers.make_valid(tmp_path_factory.mktemp("valid"))


@pytest.fixture(scope="module")
def child():
    child = Child()
    yield child
    child.close()


def test_faults_are_found(child, monkeypatch):
    monkeypatch.setattr("child.SECONDS", 1)
    child.load("read_questions", {"questions.jsonl": b""})
    faults = {"crashes": "ends the process: status -11", "hangs": "hangs", "fills_memory": "takes too much memory",
              "looks_up": "raises another kind", "passes_on": "passes on", "says_all": "says nothing, or 10000"}  # fmt: skip
    for reader, what in faults.items():
        kind, text = child.check(reader, {"a": b""})
        assert kind.startswith(what) and reader in text
    assert child.check("read_questions", {"questions.jsonl": b"{"}) is None


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[1].rpartition('/')[2]}-{kind[0]}")
def test_is_read_or_refused(kind, valid, child):
    name, file, damage, reader = kind
    files = valid[name]
    child.load(reader, files)
    found = {}  # the smallest input of each kind
    count = 0

    @settings(
        max_examples=-(-INPUTS // len(KINDS)) or SHORT,
        derandomize=not INPUTS,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(damage(files[file]))
    def run(data):
        nonlocal count
        count += 1
        answer = child.check(reader, {**files, file: data})
        if answer is not None and len(data) < len(found.get(answer[0], (data + b" ",))[0]):
            found[answer[0]] = data, answer[1]
        assert sum(what.startswith("hangs") for what in found) < MOST_HANGS, list(found)

    try:
        run()
    finally:
        print(f"{count} inputs")
        for what, (data, text) in found.items():
            kept = CACHE / f"{reader}-{hashlib.sha256(data).hexdigest()[:16]}-{Path(file).name}"
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(data)
            kept.with_name(f"{kept.name}.txt").write_text(f"{what}\n{name}/{file}\n{text}\n", errors="backslashreplace")
            print(f"{what}\n{file}, in {kept}: {data[:300]!r}\n{text}")
    assert not found, f"{len(found)} kinds of failures; the inputs are in {CACHE}: {'; '.join(found)}"
