"""Evaluation tasks from text that is on the machine: multiple choice and cloze, in lm-evaluation-harness folders.

`prepare_tasks` writes `<corpus>/tasks`, one NAME.yaml and NAME.jsonl a task:

    definitions   multiple choice: a definition, and four words of which one is defined. From the docstrings of the
                  corpus's held-out Python files, or from WordNet's data files.
    cloze         multiple choice: a passage of held-out text, and four ways in which it may go on.
    cloze_word    generation: the next word of such a passage, matched exactly.

Questions come from the corpus's held-out split, as stored in it, and none whose text also stands in the training
split is kept: a model trained on the corpus has not seen them. Everything is drawn by hashes, so the same corpus and
seed give the same bytes on every machine.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from illada.data.dataset import TokenDataset
from illada.evaluation.dictionaries import read_docstrings, read_wordnet
from illada.evaluation.questions import cloze_questions, definition_questions, split_words
from illada.files import check_inside, recover, staged_directory
from illada.text.tokenizer_files import library_errors, load_tokenizer

TASKS = ("definitions", "cloze", "cloze_word")
FEWSHOT = 8  # questions set aside for --num-fewshot
_SMALLEST = 20  # questions: with fewer the standard error is over 0.1 and nothing can be told
_SHINGLE = 4  # words; a question's text is looked up in the training split by its first ones
_SCANNED_TOKENS = 1 << 26  # of the training split, when looking for a question's text


def prepare_tasks(
    corpus: str | Path,
    names: Sequence[str] | None = None,
    *,
    dictionary: str = "docstrings",
    questions: int = 400,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, int]:
    """Write evaluation tasks from a corpus's held-out text into its folder `tasks`.

    Args:
        corpus: a folder made by `illada.data.prepare`.
        names: which of "definitions", "cloze" and "cloze_word"; default those that the text is enough for.
        dictionary: what "definitions" asks for: "docstrings", of the held-out Python files; or "wordnet:PATH", a folder
            with WordNet's data files, see `read_wordnet`.
        questions: most questions of a task; `FEWSHOT` more are set aside for few-shot prompts.
        seed: another seed draws other questions.
        overwrite: replace tasks of these names; others in the folder stay.

    Returns:
        How many questions each task has that was made.

    Raises:
        ValueError: an unknown task or dictionary, too little text. FileNotFoundError: no corpus, no WordNet.
        FileExistsError: a task is there already, and overwrite is off.
    """
    some, names = names is None, TASKS if names is None else names
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names:
        raise ValueError(f"tasks must be some of {', '.join(TASKS)}, got {', '.join(map(repr, unknown)) or 'none'}")
    if questions < _SMALLEST:
        raise ValueError(f"questions must be at least {_SMALLEST}, got {questions}")
    out = Path(corpus) / "tasks"
    held_out = TokenDataset(corpus, "validation")
    recover(out)
    if (there := [name for name in names if (out / f"{name}.yaml").exists()]) and not overwrite:
        raise FileExistsError(f"{out} has {', '.join(there)}; overwrite with overwrite=True (--overwrite)")
    texts = list(_documents(held_out))

    made: dict[str, tuple[str, list[dict[str, Any]]]] = {}
    if "definitions" in names:
        if dictionary == "docstrings":
            template, entries = _DOCSTRINGS_YAML, read_docstrings(texts)
        elif dictionary.startswith("wordnet:") and len(dictionary) > len("wordnet:"):
            template, entries = _WORDNET_YAML, read_wordnet(Path(dictionary.removeprefix("wordnet:")).expanduser())
        else:
            raise ValueError(f"dictionary must be docstrings or wordnet:PATH, got {dictionary!r}")
        most = 2 * (questions + FEWSHOT)  # some may stand in the training split
        made["definitions"] = template, definition_questions(entries, seed=seed, most=most)
    for name in ("cloze", "cloze_word"):
        if name in names:
            template = _CLOZE_YAML if name == "cloze" else _CLOZE_WORD_YAML
            made[name] = template, cloze_questions(texts, seed=seed, word=name == "cloze_word")

    seen = _seen_in_training(TokenDataset(corpus, "train"), [row["_text"] for _, rows in made.values() for row in rows])
    with staged_directory(out) as folder:
        for kept in out.iterdir() if out.is_dir() else ():
            if kept.is_file() and kept.stem not in names:
                check_inside(kept, out)
                shutil.copyfile(kept, folder / kept.name)
        (folder / "read_jsonl.py").write_text(_READER, encoding="utf-8")
        counts, short = {}, dict[str, int]()
        for name, (template, rows) in made.items():
            rows = [row for row in rows if row["_text"] not in seen][: questions + FEWSHOT]
            if len(rows) < _SMALLEST + FEWSHOT:
                short[name] = len(rows)
                continue
            counts[name] = len(rows) - FEWSHOT
            with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
                for i, row in enumerate(rows):
                    split = "fewshot" if i < FEWSHOT else "test"
                    columns = {key: value for key, value in row.items() if key != "_text"}
                    file.write(json.dumps({"split": split, **columns}, ensure_ascii=False) + "\n")
            (folder / f"{name}.yaml").write_text(template, encoding="utf-8")
        if short and not (some and counts):
            raise ValueError(
                f"the held-out text of {corpus} gives "
                f"{', '.join(f'{count} questions for task {name}' for name, count in short.items())}; at least "
                f"{_SMALLEST + FEWSHOT} are needed: hold out more of it (--validation-fraction)"
                + (", or use another --dictionary" if "definitions" in short else "")
            )
    return counts


def _documents(dataset: TokenDataset, most_tokens: int | None = None) -> Iterator[str]:
    """Yield the documents of a split as text."""
    tokenizer = load_tokenizer(dataset.path)
    read = 0
    for tokens in dataset.documents():
        read += len(tokens)
        if most_tokens is not None and read > most_tokens:
            return
        with library_errors(f"the tokenizer of {dataset.path} cannot decode its text"):
            text = tokenizer.decode(tokens[:-1].tolist(), skip_special_tokens=False)
        yield text


def _seen_in_training(train: TokenDataset, texts: Iterable[str]) -> set[str]:
    """Return those of `texts` whose words also follow one another in the training split."""
    by_start: dict[tuple[str, ...], list[tuple[list[str], str]]] = defaultdict(list)
    for text in texts:
        words = split_words(text)
        by_start[tuple(words[:_SHINGLE])].append((words, text))
    seen: set[str] = set()
    for document in _documents(train, _SCANNED_TOKENS):
        words = split_words(document)
        for i, start in enumerate(zip(*(words[k:] for k in range(_SHINGLE)), strict=False)):
            for needle, text in by_start.get(start, ()):
                if words[i : i + len(needle)] == needle:
                    seen.add(text)
    return seen


# --------------------------------------------------------------------------------------------------------------- files

_READER = '''\
"""Reads the JSONL files beside it, wherever this folder is."""

import json
from pathlib import Path

import datasets


def read(file, **_):
    splits = {}
    # texts hold other ends of lines
    for number, line in enumerate((Path(__file__).parent / file).read_bytes().split(b"\\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
            splits.setdefault(row.pop("split"), []).append(row)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            said = "it is nested too deeply" if isinstance(error, RecursionError) else repr(error)
            raise ValueError(f"{file}, line {number}, is no JSON object with a split: {said:.200}") from None
    try:
        return {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
    except (ValueError, TypeError, ArithmeticError, NotImplementedError) as error:
        raise ValueError(f"{file} has rows whose values are of different types: {error!s:.200}") from None
'''

_HEAD = """\
task: {name}
custom_dataset: !function read_jsonl.read
dataset_kwargs:
  file: {name}.jsonl
test_split: test
fewshot_split: fewshot
"""

_CHOICE = """\
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""

_DOCSTRINGS_YAML = _HEAD.format(name="definitions") + 'doc_to_text: "# {{text}}\\n{{kind}}"\n' + _CHOICE
_WORDNET_YAML = _HEAD.format(name="definitions") + 'doc_to_text: "Definition ({{kind}}): {{text}}\\nWord:"\n' + _CHOICE
_CLOZE_YAML = _HEAD.format(name="cloze") + "doc_to_text: text\n" + _CHOICE
_CLOZE_WORD_YAML = (
    _HEAD.format(name="cloze_word")
    + """\
doc_to_text: text
output_type: generate_until
doc_to_target: answer
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 8
  do_sample: false
filter_list:
  - name: first_word
    filter:
      - function: regex
        regex_pattern: "^\\\\s*([A-Za-z]+)"
        group_select: 0
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
)
