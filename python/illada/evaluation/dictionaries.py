"""Dictionaries of the evaluation tasks: words with definitions, from docstrings or from WordNet's data files."""

from __future__ import annotations

import ast
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from illada.text.files import read_lines

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
