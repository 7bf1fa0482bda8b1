"""Encoding by words: the tokens are those of the library, for every character and however the table fares."""

import json
import random
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from illada.data.encoding import TextEncoder
from illada.text import words
from illada.text.training import train_tokenizer
from illada.text.words import WordEncoder

SOURCE = (Path(sysconfig.get_paths()["stdlib"]) / "textwrap.py").read_text()
UINT16 = np.dtype("uint16")


def new_tokenizer():
    tokenizer = train_tokenizer([SOURCE, "naïve 字字 ½ don't"], 500)
    tokenizer.encode_special_tokens = True
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return new_tokenizer()


def by_library(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


def odd_texts(count):
    rng = random.Random(0)
    every = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    pools = [
        every,
        every[:0x300],
        every[: 0x10000 - 0x800],
        list(" \n\t\r'sStdrelvmLL09a_-\xa0\u3000\x1c\x85²½ſ\u200b\ufeff"),
    ]
    for _ in range(count):
        pool = rng.choice(pools)
        yield "".join(rng.choice(pool if rng.random() < 0.6 else " \n's a1") for _ in range(rng.randrange(200)))


def test_tokens_of_odd_texts(tokenizer):
    encoder, taken = WordEncoder(tokenizer, [0, 1, 2, 5], UINT16), 0
    for text in odd_texts(800):
        if (found := encoder.encode([text])) is not None:
            assert found[0].tolist() == by_library(tokenizer, text), repr(text)
            taken += 1
    assert taken > 400


def test_every_character_has_the_class_that_the_library_gives_it(tokenizer):
    encoder = WordEncoder(tokenizer, [], UINT16)
    characters = [chr(i) for i in range(1 << 16) if not 0xD800 <= i < 0xE000]
    text = "".join(f"a{c}1{c} {c}.{c}\n" for c in characters)
    splits = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert encoder._words.findall(text) == [text[start:end] for _, (start, end) in splits]


def test_characters_beyond_the_known_classes(tokenizer):
    encoder = WordEncoder(tokenizer, [], UINT16)
    for text, known in (("so 😀 and 🇪🇺!", True), ("𝐀 math", False), ("a 𐄇", False), ("😀𝐀", False), ("𠀀😀", False)):
        found = encoder.encode([text])
        assert (found is not None) == known
        assert found is None or found[0].tolist() == by_library(tokenizer, text)


def test_a_full_table_begins_anew(tokenizer, monkeypatch):
    monkeypatch.setattr(words, "_MOST_CHARACTERS", 2000)
    monkeypatch.setattr(words, "_CHUNK", 3)
    encoder, sizes = WordEncoder(tokenizer, [], UINT16), []
    for line in SOURCE.splitlines():
        assert encoder.encode([line])[0].tolist() == by_library(tokenizer, line)
        sizes.append(len(encoder._table))
    assert max(sizes) < 60 and any(before > after for before, after in zip(sizes, sizes[1:], strict=False))


def test_a_token_that_text_may_not_give(tokenizer):
    never = tokenizer.token_to_id("a")
    assert WordEncoder(tokenizer, [never], UINT16).encode(["x a"]) is not None  # " a" is another token
    assert WordEncoder(tokenizer, [never], UINT16).encode(["a x"]) is None


def odd_tokenizers():
    prefix = new_tokenizer()
    prefix.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    whole = new_tokenizer()
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    nfc = new_tokenizer()
    nfc.normalizer = normalizers.NFC()
    added = new_tokenizer()
    added.add_tokens([AddedToken("def ")])
    parsed = new_tokenizer()
    parsed.encode_special_tokens = False
    dropout = json.loads(new_tokenizer().to_str())
    dropout["model"]["dropout"] = 0.5
    none = json.loads(new_tokenizer().to_str())
    none["pre_tokenizer"] = None
    loaded = [Tokenizer.from_str(json.dumps(one)) for one in (dropout, none)]
    for one in loaded:
        one.encode_special_tokens = True
    return dict(zip(("prefix", "whole", "nfc", "added", "parsed", "dropout", "none"), (prefix, whole, nfc, added, parsed, *loaded), strict=True))  # fmt: skip


def test_other_tokenizers_are_left_to_the_library(tokenizer):
    assert WordEncoder.can_encode(tokenizer)
    for name, other in odd_tokenizers().items():
        assert not WordEncoder.can_encode(other), name


def test_a_library_that_differs_is_believed(tokenizer, monkeypatch):
    encoder = TextEncoder(tokenizer, {}, "uint16")
    monkeypatch.setattr(WordEncoder, "encode", lambda self, texts: [np.array([7], UINT16) for _ in texts])
    texts = ["one text", "another"]
    for _ in range(2):
        assert [ids.tolist() for ids in encoder.encode_texts(texts)] == [by_library(tokenizer, text) for text in texts]


@pytest.mark.parametrize("spelled", ["<[MASK]>", "a<[end▁of▁sentence]>b"])
def test_special_tokens_in_text_are_text(tokenizer, spelled):
    found = WordEncoder(tokenizer, [2, 5], UINT16).encode([spelled])[0]
    assert found.tolist() == by_library(tokenizer, spelled) and not {2, 5} & set(found.tolist())
