"""Encoding of a context and a candidate such that all of the candidate is scored."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence

import tokenizers

from illada.text.tokenizer import Tokenizer


def encode_pair(
    tokenizer: Tokenizer,
    context: str,
    continuation: str,
    *,
    parse_special_tokens: bool = False,
    prefix: Sequence[int] | None = None,
) -> tuple[list[int], list[int]]:
    """Return (context ids, continuation ids) of two texts, which together are the ids of the whole.

    The whole is encoded and cut where it stops being the encoding of the context: a token across the join belongs to
    the continuation. So do spaces at the end of the context, as in lm-evaluation-harness. The continuation is empty
    where the tokenizer drops all of its text.

    Args:
        tokenizer: The tokenizer of the model.
        context: Text before the continuation; may be empty.
        continuation: Text to score.
        parse_special_tokens: whether text of the context that spells a special token is that token, as a chat
            template needs it. In the continuation it is always text.
        prefix: what the context begins with, as of `Tokenizer.encode_prompt`; default what the tokenizer adds to any
            text, such as a bos.
    """
    stripped = context.rstrip()
    joined = context + continuation
    parsed = _end_of_special(tokenizer, stripped) if parse_special_tokens else 0  # what follows is text
    at_once = parsed == 0 or _end_of_special(tokenizer, joined) == parsed

    def encode(text: str) -> list[int]:
        if at_once:  # one encoding, which a pre-tokenizer that looks at the start of its text needs
            return tokenizer.encode(text, parse_special_tokens=parsed > 0)
        begin = tokenizer.encode(text[:parsed])
        return begin + tokenizer.encode(text[parsed:], parse_special_tokens=False)

    ids, whole = encode(stripped), encode(joined)
    if stripped != context and encode(context) == whole:
        return tokenizer.begin_prompt(whole, prefix), []
    shared = len(os.path.commonprefix([ids, whole]))
    return tokenizer.begin_prompt(whole[:shared], prefix), whole[shared:]


def _end_of_special(tokenizer: Tokenizer, text: str) -> int:
    """Return where the last special token that `text` spells ends; 0 where it spells none."""
    pattern = _special_tokens(tokenizer)
    return max((found.end() for found in pattern.finditer(text)), default=0) if pattern else 0


@functools.lru_cache(maxsize=8)
def _special_tokens(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    backend = tokenizer.backend
    fast = isinstance(backend, tokenizers.Tokenizer)
    added = backend.get_added_tokens_decoder() if fast else backend.added_tokens_decoder
    texts = {token.content for token in added.values() if token.special}  # others are parsed in any text
    texts |= {named for named in tokenizer.special_tokens.values() if isinstance(named, str)}
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if texts else None
