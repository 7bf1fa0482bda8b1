"""The end of a sequence: stop tokens, stop strings, and the text that may be shown so far."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

from illada.generation.config import GenerationConfig, GenerationDelta, GenerationResult
from illada.generation.request import Request
from illada.model import MaskedDiffusionModel
from illada.text.tokenizer import Continuation


class Reader:
    """A reader of a request: why it ends, its result, and what each block adds to that.

    Args:
        request: whose blocks are being filled. model: knows its stop tokens. tokenizer: for text; None without.
    """

    def __init__(self, request: Request, model: MaskedDiffusionModel, tokenizer: Any) -> None:
        self.request, self.infills = request, request.config.mode == "infill"
        self.ends = stop_ids(request.config, model)
        before = 0 if self.infills else request.prompt_length
        self.decoder = None if tokenizer is None else Continuation(tokenizer, request.canvas[:before].tolist())
        self._told, self._shown = 0, ""  # tokens and text of earlier deltas

    def why_finished(self) -> str | None:
        """Return, after a block, the reason to stop, or None."""
        request, config = self.request, self.request.config
        done = request.block == len(request.blocks)
        if self.infills:
            return "filled" if done else None
        generated = self._generated()
        kept = _before_stop(generated, self.ends)
        if config.stop_strings and cut_at_stop(self.decoder, kept, config) is not None:
            return "stop_string"
        if len(kept) < len(generated):
            return "stop_token"
        return "length" if done else None

    def result(self) -> GenerationResult:
        """Return the result of a finished request."""
        assert self.request.finish_reason is not None
        tokens = self._settled_tokens()
        text = None if self.decoder is None else self._text(tokens)
        return GenerationResult(tokens, self.request.finish_reason, self.request.forwards, text)

    def delta(self) -> GenerationDelta:
        """Return what the block that has just been finished adds."""
        text = None
        if self.decoder is not None:
            text = self._new(settled_text(self._text(self._settled_tokens()), self.request.config.stop_strings))
        return GenerationDelta(self.request.index, self._new_tokens(), text)

    def last(self) -> GenerationDelta:
        """Return what is left of the result of a request that is finished."""
        result = self.result()
        text = None if result.text is None else result.text[len(self._shown) :]
        return GenerationDelta(self.request.index, self._new_tokens(), text, result)

    def _generated(self) -> list[int]:
        """Return the tokens of finished blocks."""
        request = self.request
        return request.canvas[request.prompt_length : request.blocks[request.block - 1][-1] + 1].tolist()

    def _settled_tokens(self) -> list[int]:
        """Return the tokens that are final.

        They reach to what ends the sequence; in mode "infill" to the next block's first mask.
        """
        request = self.request
        if not self.infills:
            return _before_stop(self._generated(), self.ends)
        done = request.block == len(request.blocks)
        return request.canvas[: None if done else request.blocks[request.block][0]].tolist()

    def _new_tokens(self) -> list[int]:
        request = self.request
        if self.infills:
            return request.canvas[request.blocks[request.block - 1]].tolist()
        tokens = self._settled_tokens()[self._told :]
        self._told += len(tokens)
        return tokens

    def _text(self, tokens: list[int]) -> str:
        assert self.decoder is not None
        cut = cut_at_stop(self.decoder, tokens, self.request.config)
        return self.decoder.decode(tokens) if cut is None else cut

    def _new(self, text: str) -> str:
        """Return the part of `text` that was not shown yet.

        There is none where the decoder has changed what was shown.
        """
        if not text.startswith(self._shown):
            return ""
        new, self._shown = text[len(self._shown) :], text
        return new


def stop_ids(config: GenerationConfig, model: MaskedDiffusionModel) -> set[int]:
    """Return the ids that end a sequence."""
    own = (model.config.eos_token_id, model.config.eot_token_id, *model.stop_token_ids)
    return {i for i in own if i is not None} if config.stop_tokens is None else set(config.stop_tokens)


def _before_stop(tokens: list[int], ends: set[int]) -> list[int]:
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]


def settled_text(text: str, stop_strings: Sequence[str]) -> str:
    """Return `text` without an end that may still change.

    That is the start of a stop string, or a character of which only a part is there.
    """
    text = text.rstrip("\ufffd")
    held = [n for stop in stop_strings for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return text[: len(text) - max(held, default=0)]


def stop_position(text: str, stop_strings: Sequence[str], end_think: str = "") -> int | None:
    """Return where in `text` the first stop string begins, or None.

    It is looked for behind the first `end_think`.
    """
    reasoning = text.find(end_think)
    if reasoning < 0:
        return None
    begin = reasoning + len(end_think)
    return min((at for stop in stop_strings if (at := text.find(stop, begin)) >= 0), default=None)


def cut_at_stop(tokenizer: Any, tokens: list[int], config: GenerationConfig) -> str | None:
    """Return the text of `tokens` before the first stop string that counts, or None without any.

    A stop string may spell special tokens.
    """
    if tokenizer is None or not config.stop_strings:
        return None
    # Without spaces around it: there are tokens whose text begins with one only behind other text.
    end_think = tokenizer.decode(list(config.end_think), skip_special_tokens=False).strip()

    def first(text: str) -> int | None:
        return stop_position(text, config.stop_strings, end_think)

    text = tokenizer.decode(tokens)
    if (at := first(text)) is not None:
        return text[:at]
    if first(tokenizer.decode(tokens, skip_special_tokens=False)) is None:
        return None

    def raw(count: int) -> str:
        return tokenizer.decode(tokens[:count], skip_special_tokens=False)

    # Up to the token with which the stop string is complete; from there on every longer text has it.
    count = bisect.bisect_left(range(len(tokens)), True, key=lambda n: first(raw(n)) is not None)
    at = first(raw(count))
    kept = count
    while kept and len(raw(kept)) > (at or 0):
        kept -= 1
    return tokenizer.decode(tokens[:kept])
