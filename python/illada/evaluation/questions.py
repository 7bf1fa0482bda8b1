"""Questions of the evaluation tasks, made from dictionaries and passages, all drawn by hashes."""

from __future__ import annotations

import bisect
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from illada.evaluation.dictionaries import Entry

CHOICES = 4
_CONTEXT_WORDS = 24  # of code about 100 tokens in a vocabulary of 1,024: within the demo's windows of 128
_NEAREST = 8  # distractors are drawn from this many candidates of the most similar length
_BLANK = "___"


def split_words(text: str) -> list[str]:
    """Return the words of a text, without punctuation."""
    return re.findall(r"\w+", text)


def _rank(*parts: object) -> bytes:
    """Return a key that sorts these parts in an order that is random and the same everywhere."""
    return hashlib.sha256(json.dumps(parts).encode()).digest()


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
    for part in map(str.lower, split_words(text)):
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
