"""`generate_iter`: what each block adds, which joined is what `generate` gives."""

import dataclasses

import pytest

from illada.config import ModelConfig
from illada.generation import GenerationConfig, generate, generate_iter
from illada.generation.stopping import settled_text
from illada.model import MaskedDiffusionModel
from illada.text.training import train_tokenizer

PROMPTS = [[5, 6, 7, 8], [30, 31], [9] * 11]
CONFIG = GenerationConfig(gen_length=24, block_length=8, steps=4, stop_tokens=())
TOKENIZER = train_tokenizer(["some text to learn from, and more text, naïve größer 語"] * 3, 300)


@pytest.fixture(scope="module")
def model():
    return MaskedDiffusionModel(ModelConfig.preset("tiny", vocab_size=300, max_position_embeddings=64), seed=1)


def joined(deltas, count):
    """Return (tokens, text, result) of each prompt."""
    parts = [[delta for delta in deltas if delta.index == i] for i in range(count)]
    assert all(part[-1].result is not None and not any(delta.result for delta in part[:-1]) for part in parts)
    return [
        (sum((delta.tokens for delta in part), []), "".join(delta.text for delta in part), part[-1].result)
        for part in parts
    ]


@pytest.mark.parametrize("cache", ["none", "prefix"])
@pytest.mark.parametrize("batch_size", [None, 1])
@pytest.mark.parametrize("mode", ["var", "fixed"])
def test_deltas_join_to_the_results(model, mode, batch_size, cache):
    config = dataclasses.replace(CONFIG, mode=mode, cache=cache, steps=12 if mode == "fixed" else 4)
    options = {"seed": [1, 2, 3], "tokenizer": TOKENIZER, "batch_size": batch_size}
    want = generate(model, PROMPTS, config, **options)
    deltas = list(generate_iter(model, PROMPTS, config, **options))
    assert joined(deltas, 3) == [(result.tokens, result.text, result) for result in want]
    assert len(deltas) == 9


def test_nothing_of_the_end_is_streamed(model):
    """Not the stop token, nor what the block has behind it; nor a stop string, nor its beginning in the block before."""
    whole = generate(model, PROMPTS[:1], CONFIG, tokenizer=TOKENIZER)[0]
    for at in (0, 3, 8, 10):
        stop = whole.tokens[at]
        config = dataclasses.replace(CONFIG, stop_tokens=(stop,))
        ((tokens, text, result),) = joined(list(generate_iter(model, PROMPTS[:1], config, tokenizer=TOKENIZER)), 1)
        assert tokens == whole.tokens[: whole.tokens.index(stop)] == result.tokens and text == result.text
        assert result.finish_reason == "stop_token"
    boundary = len(TOKENIZER.decode(whole.tokens[:8]))
    stop = whole.text[boundary - 1 : boundary + 2]
    config = dataclasses.replace(CONFIG, stop_strings=(stop,))
    deltas = list(generate_iter(model, PROMPTS[:1], config, tokenizer=TOKENIZER))
    assert "".join(delta.text for delta in deltas) == whole.text[: whole.text.index(stop)]
    assert deltas[-1].result.finish_reason == "stop_string"


def test_infilling_gives_text_up_to_the_next_mask(model):
    mask, words = model.config.mask_token_id, TOKENIZER.encode("some text").ids
    prompt = [*words, mask, mask, *words, mask, *words]
    config = dataclasses.replace(CONFIG, mode="infill", block_length=1, steps=1)
    deltas = list(generate_iter(model, [prompt], config, tokenizer=TOKENIZER))
    ((tokens, text, result),) = joined(deltas, 1)
    assert text == result.text and tokens == [t for t, p in zip(result.tokens, prompt, strict=True) if p == mask]
    assert deltas[0].text == settled_text(TOKENIZER.decode(result.tokens[: len(words) + 1]), ())


def test_without_a_tokenizer_there_is_no_text(model):
    assert {delta.text for delta in generate_iter(model, PROMPTS, CONFIG)} == {None}


def test_errors_come_from_the_call(model):
    with pytest.raises(ValueError, match=r"prompts\[0\] is a text, which needs a tokenizer"):
        generate_iter(model, ["text"])


def test_an_iterator_may_be_left(model):
    deltas = generate_iter(model, PROMPTS, CONFIG, progress=True)
    assert next(deltas).tokens
    deltas.close()
    assert generate(model, PROMPTS, CONFIG)
