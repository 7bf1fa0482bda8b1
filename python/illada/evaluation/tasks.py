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

import ast
import bisect
import hashlib
import json
import re
import shutil
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from illada.data.dataset import TokenDataset
from illada.files import check_inside, recover, staged_directory
from illada.text.files import read_lines
from illada.text.tokenizer_files import library_errors, load_tokenizer

TASKS = ("definitions", "cloze", "cloze_word")
CHOICES = 4
FEWSHOT = 8  # questions set aside for --num-fewshot
_SMALLEST = 20  # questions: with fewer the standard error is over 0.1 and nothing can be told
_CONTEXT_WORDS = 24  # of code about 100 tokens in a vocabulary of 1,024: within the demo's windows of 128
_NEAREST = 8  # distractors are drawn from this many candidates of the most similar length
_BLANK = "___"
_SHINGLE = 4  # words; a question's text is looked up in the training split by its first ones
_SCANNED_TOKENS = 1 << 26  # of the training split, when looking for a question's text

Item = TypeVar("Item")


@dataclass(frozen=True)
class Entry:
    """A word with its definition.

    kind: part of speech, or "def" and "class"; group: where it stands, words of one group make the best distractors;
    related: words that the definition might also fit; frequency: how common the word is, where that is known.
    """

    word: str
    kind: str
    text: str
    group: str = ""
    related: frozenset[str] = frozenset()
    frequency: int = 0


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


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def _seen_in_training(train: TokenDataset, texts: Iterable[str]) -> set[str]:
    """Return those of `texts` whose words also follow one another in the training split."""
    by_start: dict[tuple[str, ...], list[tuple[list[str], str]]] = defaultdict(list)
    for text in texts:
        words = _words(text)
        by_start[tuple(words[:_SHINGLE])].append((words, text))
    seen: set[str] = set()
    for document in _documents(train, _SCANNED_TOKENS):
        words = _words(document)
        for i, start in enumerate(zip(*(words[k:] for k in range(_SHINGLE)), strict=False)):
            for needle, text in by_start.get(start, ()):
                if words[i : i + len(needle)] == needle:
                    seen.add(text)
    return seen


def _rank(*parts: object) -> bytes:
    """Return a key that sorts these parts in an order that is random and the same everywhere."""
    return hashlib.sha256(json.dumps(parts).encode()).digest()


# ------------------------------------------------------------------------------------------------------- dictionaries


def read_docstrings(documents: Iterable[str]) -> list[Entry]:
    """Return the public functions and classes of Python files, each defined by the first sentence of its docstring.

    The files are parsed, never imported; what does not parse is left out.
    """
    entries = []
    for number, document in enumerate(documents):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old files are full of invalid escapes
                tree = ast.parse(document)
        except (SyntaxError, ValueError, RecursionError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                kind = "class" if isinstance(node, ast.ClassDef) else "def"
                text = _first_sentence(ast.get_docstring(node) or "")
                if text and not node.name.startswith("_"):
                    entries.append(Entry(node.name, kind, text, group=str(number)))
    return entries


def _first_sentence(docstring: str) -> str:
    paragraphs = [" ".join(part.split()) for part in docstring.strip().split("\n\n")]
    if len(paragraphs) > 1 and re.match(r"[\w.]+\(", paragraphs[0]):
        del paragraphs[0]  # the old custom of beginning with the signature
    paragraph = paragraphs[0]
    found = re.match(r"(.+?[.!?])(?:\s|$)", paragraph)
    sentence = found[1] if found else paragraph
    return sentence if 4 <= len(sentence.split()) <= 40 and not sentence.startswith((">>>", "#")) else ""


_PARTS_OF_SPEECH = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
_SYNSET_TYPES = {"n": "n", "v": "v", "a": "a", "s": "a", "r": "r"}
_SENSE_TYPES = {"1": "noun", "2": "verb", "3": "adjective", "4": "adverb", "5": "adjective"}


def read_wordnet(path: str | Path) -> list[Entry]:
    """Return the single words of WordNet, each defined by the gloss of its first sense.

    Args:
        path: a folder with data.noun, data.verb, data.adj, data.adv. Beside them index.noun, ... say which sense comes
            first, and with cntlist.rev words that WordNet's tagged texts never use are left out.

    Raises:
        FileNotFoundError: none of these files there. ValueError: a line that is not WordNet's; names it.
    """
    folder = Path(path)
    files = {kind: folder / f"data.{suffix}" for suffix, kind in _PARTS_OF_SPEECH.items()}
    files = {kind: file for kind, file in files.items() if file.is_file()}
    if not files:
        raise FileNotFoundError(f"dictionary wordnet: {folder} has no data.noun, data.verb, data.adj or data.adv")
    counts: dict[tuple[str, str], int] = defaultdict(int)  # over all senses of a word
    for key, tagged in _read_lines(folder / "cntlist.rev", _parse_count):
        counts[key] += tagged
    entries = []
    for kind, file in files.items():
        synsets = {at: (words, near, gloss) for at, words, near, gloss in _read_lines(file, _parse_synset)}
        index = file.with_name(file.name.replace("data.", "index."))
        first = dict(_read_lines(index, _parse_index))
        if absent := [word for word, offset in first.items() if offset not in synsets]:
            raise ValueError(f"{index} gives {absent[0]!r} the sense {first[absent[0]]}, which {file} lacks")
        for offset, (words, _, _) in synsets.items():
            for word in words:
                first.setdefault(word.lower(), offset)
        for word, offset in first.items():
            words, pointers, gloss = synsets[offset]
            frequency = counts.get((kind, word), 0)
            if not re.fullmatch(r"[a-z]{3,}", word) or word not in words or len(gloss.split()) < 4:
                continue  # not proper names, nor several words
            if counts and not frequency:
                continue
            # Synonyms, and the words one relation away: a distractor must not be a right answer too.
            near = {other.lower() for o in (offset, *pointers) if o in synsets for other in synsets[o][0]}
            entries.append(Entry(word, kind, gloss, related=frozenset(near), frequency=frequency))
    return entries


def _read_lines(file: Path, parse: Callable[[str], Item]) -> list[Item]:
    """Return what the lines of one of WordNet's files say, without the licence at its beginning, which is indented.

    Nothing where there is no file.
    """
    parsed = []
    for where, line in read_lines(file) if file.is_file() else ():
        if line.strip() and not line.startswith(" "):
            try:
                parsed.append(parse(line))
            except (ValueError, IndexError, KeyError):
                raise ValueError(f"{where} is not in WordNet's format of {file.name}: {line!r:.80}") from None
    return parsed


def _parse_index(line: str) -> tuple[str, str]:
    """Return (word, offset of its first synset); synsets stand in the order of the word's senses."""
    fields = line.split()
    return fields[0], fields[6 + _number(fields[3])]


def _parse_synset(line: str) -> tuple[str, list[str], list[str], str]:
    """Return (offset, words, offsets of related synsets, definition) of one line of a data file."""
    fields, _, gloss = line.partition("|")
    parts = fields.split()
    own, count = _SYNSET_TYPES[parts[2]], _number(parts[3], 16)
    words = [re.sub(r"\(\w+\)$", "", word) for word in parts[4 : 4 + 2 * count : 2]]  # adjectives: "alive(p)"
    at = 4 + 2 * count
    pointers = [
        parts[i + 1] for i in range(at + 1, at + 1 + 4 * _number(parts[at]), 4) if _SYNSET_TYPES[parts[i + 2]] == own
    ]
    definition = re.split(r"; \"|;\s*$", gloss.strip())[0].strip()
    return parts[0], words, pointers, definition


def _parse_count(line: str) -> tuple[tuple[str, str], int]:
    """Return (part of speech, word) and how often one of its senses was met in tagged texts, from cntlist.rev."""
    key, _, tagged = line.split()
    lemma, _, rest = key.partition("%")
    return (_SENSE_TYPES[rest[:1]], lemma), _number(tagged)


def _number(text: str, base: int = 10) -> int:
    value = int(text, base)
    if not 0 <= value < 1 << 31:
        raise ValueError(f"a count must be in [0, 2^31), got {value}")
    return value


# ---------------------------------------------------------------------------------------------------------- questions


def definition_questions(entries: Sequence[Entry], *, seed: int = 0, most: int | None = None) -> list[dict[str, Any]]:
    """Return at most `most` questions for words whose definition fits no other.

    The word itself is blanked in its definition.
    """
    words_of: dict[str, set[str]] = defaultdict(set)
    for entry in entries:
        words_of[entry.text.lower()].add(_plain(entry.word))
    pools: dict[str, list[Entry]] = defaultdict(list)
    groups: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    asked: set[tuple[str, str]] = set()
    order = sorted(entries, key=lambda e: (_rank(seed, e.word, e.kind, e.text), e.group))
    for entry in sorted(order, key=lambda e: e.frequency):
        pools[entry.kind].append(entry)
        groups[entry.kind, entry.group].append(entry)
    frequencies = {kind: [e.frequency for e in pool] for kind, pool in pools.items()}

    rows: list[dict[str, Any]] = []
    for entry in order:
        if len(rows) == most:
            break
        name = _plain(entry.word)
        if (entry.kind, name) in asked or len(name) < 3:
            continue
        text = _blanked(entry.word, entry.text)
        if len(text.replace(_BLANK, "").split()) < 4:
            continue
        if len(words_of[entry.text.lower()]) > 1:
            continue
        pool = pools[entry.kind]
        at = bisect.bisect_left(frequencies[entry.kind], entry.frequency)
        similar = pool[max(0, at - 200) : at + 200]  # of similar frequency; all of them where none is known
        forbidden = {name, *map(_plain, entry.related)}

        def allowed(other: Entry, forbidden: set[str] = forbidden, text: str = entry.text) -> bool:
            return _plain(other.word) not in forbidden and not _leaks(other.word, text) and other.text != text

        near = groups[entry.kind, entry.group] if entry.group else []
        wrong = _nearest(entry.word, near, allowed, seed) or _nearest(entry.word, similar, allowed, seed)
        if not wrong:
            continue
        asked.add((entry.kind, name))
        rows.append(
            {"text": text, "kind": entry.kind, **_shuffled(entry.word, wrong, (seed, entry.text)), "_text": entry.text}
        )
    return rows


def _plain(word: str) -> str:
    return word.replace("_", "").lower()


def _blanked(word: str, text: str) -> str:
    """Return `text` with a blank for `word` and its inflections."""
    return re.sub(r"\w+", lambda part: _BLANK if _leaks(word, part[0]) else part[0], text)


def _leaks(word: str, text: str) -> bool:
    """Return whether a word of `text` is `word`, or an inflection of it."""
    begins = word.lower()
    stem = begins[:-1] if len(begins) > 3 and begins[-1] in "ey" else begins  # copies, sizing
    for part in map(str.lower, _words(text)):
        if part.startswith(begins) or _plain(part) == _plain(word):
            return True
        if part.startswith(stem) and len(part) <= len(word) + 3:
            return True
    return False


def _nearest(word: str, pool: Sequence[Entry], allowed: Callable[[Entry], bool], seed: int) -> list[str]:
    """Return wrong answers from `pool` of about the length of `word`; none if there are too few."""
    found: dict[str, str] = {}
    for entry in pool:
        if allowed(entry):
            found.setdefault(_plain(entry.word), entry.word)
    nearest = sorted(found.values(), key=lambda w: (abs(len(w) - len(word)), _rank(seed, word, w)))[:_NEAREST]
    return sorted(nearest, key=lambda w: _rank(seed, w, word))[: CHOICES - 1] if len(nearest) >= CHOICES - 1 else []


def _shuffled(right: str, wrong: list[str], salt: tuple) -> dict[str, Any]:
    choices = sorted([right, *wrong], key=lambda choice: _rank(*salt, choice))
    return {"choices": choices, "answer": choices.index(right)}


def cloze_questions(documents: Sequence[str], *, seed: int = 0, word: bool = False) -> list[dict[str, Any]]:
    """Return passages that break off within a line, in a hashed order.

    Each has 24 words of text as it stands; `choices` are the three to eight words up to the end of the line and three
    such ends from other places, or, with `word`, `answer` is the next word alone.
    """
    cuts: list[tuple[bytes, int, str, str]] = []
    for number, document in enumerate(documents):
        spans = [found.span() for found in re.finditer(r"\S+", document)]
        step = _CONTEXT_WORDS + 8  # so that no two passages overlap
        for begin in range(0, len(spans) - step + 1, step):
            at = begin + _CONTEXT_WORDS
            # The first break within a line whose rest is long enough; the place varies with the text.
            for i in range(at, at + 6):
                cut = spans[i - 1][1]
                rest = document[cut:].split("\n", 1)[0]
                if word:
                    found = re.match(r" ([A-Za-z]{3,})\b", rest)
                    ending = found[1] if found else ""
                else:
                    found = re.match(r" \S+(?: \S+){2,7}", rest)
                    ending = found[0][1:] if found else ""
                if not ending:
                    continue
                context = document[spans[i - _CONTEXT_WORDS][0] : cut]
                cuts.append((_rank(seed, number, i), number, context, ending))
                break
    cuts.sort()
    rows = []
    for _, number, context, ending in cuts:
        row: dict[str, Any] = {"text": context}
        if word:
            row["answer"] = ending
        else:
            others = {
                e for _, n, _, e in cuts if e != ending and e not in context and (n != number or len(documents) == 1)
            }
            wrong = sorted(others, key=lambda e: (abs(len(e) - len(ending)), _rank(seed, ending, e)))[: CHOICES - 1]
            if len(wrong) < CHOICES - 1:
                continue
            row.update(_shuffled(ending, wrong, (seed, context)))
        rows.append({**row, "_text": " ".join([*context.split()[-6:], ending])})
    return rows


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
