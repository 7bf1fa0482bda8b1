"""The loop of generation by un-masking, for a pack of sequences at a time.

Each step predicts all masks and commits the surest tokens.

Prompts of any lengths are packed, without padding. A sequence's noise is keyed by (its seed, position, step), so it
gives the same tokens alone or in company (float32, cache "none"); a finished sequence leaves the pack and the next one
that waits takes its place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from illada.devices import autocast_dtype
from illada.generation import graphs, step, stopping
from illada.generation.cache import KeyValueCache
from illada.generation.config import GenerationConfig, GenerationDelta, GenerationResult
from illada.generation.request import Request
from illada.model import MaskedDiffusionModel
from illada.terminal import shows
from illada.text.tokenizer import Tokenizer, affixes, begin_with


def generate(
    model: MaskedDiffusionModel,
    prompts: Sequence[Sequence[int] | str],
    config: GenerationConfig | Sequence[GenerationConfig] | None = None,
    *,
    seed: int | Sequence[int] = 0,
    tokenizer: Any = None,
    batch_size: int | None = None,
    cuda_graphs: bool = True,
    progress: bool = False,
    on_commit: Callable[[int, list[int], list[int]], None] | None = None,
) -> list[GenerationResult]:
    """Generate a continuation of each prompt (or fill its masks), all in one pack.

    Args:
        model: in evaluation or training mode, it has no dropout; its device is used.
        prompts: token ids, of any lengths, also none; or texts, which the tokenizer encodes. Masks among them are
            filled in mode "infill", and left as they are in the others.
        config: default `GenerationConfig()`; or one for each prompt (all with the same `cache`).
        seed: one for all, or one for each prompt. Sequences with one seed and one prompt come out alike.
        tokenizer: with encode and decode, as `illada.Tokenizer` or those of `tokenizers` and `transformers`; makes
            `text`, and is needed by texts and stop_strings.
        batch_size: most sequences in the pack at a time; the others wait until one leaves. Default all.
        cuda_graphs: on CUDA and with a cache, replay the steps within a block as a graph.
        progress: a bar on a terminal: tokens, tokens per second, tokens per forward; of tokens that stand.
        on_commit: called as on_commit(prompt index, positions, tokens) after each step that committed something;
            positions count from the start of the prompt. With `take_back` a position can come again.

    Returns:
        One result for each prompt, in order.

    Raises:
        ValueError: token ids out of range, prompts without room for a block or without masks to fill, bad seeds, no
            tokenizer where one is needed, configs with different caches.
        TypeError: prompts that are one prompt, not a list of them; ids, seeds or configs of another type.
    """
    requests = _requests(model, prompts, config, seed, tokenizer, batch_size)
    results: list[GenerationResult | None] = [None] * len(requests)
    for delta in _run(model, requests, tokenizer, batch_size, cuda_graphs, progress, on_commit, stream=False):
        results[delta.index] = delta.result
    return [result for result in results if result is not None]


def generate_iter(
    model: MaskedDiffusionModel,
    prompts: Sequence[Sequence[int] | str],
    config: GenerationConfig | Sequence[GenerationConfig] | None = None,
    *,
    seed: int | Sequence[int] = 0,
    tokenizer: Any = None,
    batch_size: int | None = None,
    cuda_graphs: bool = True,
    progress: bool = False,
    on_commit: Callable[[int, list[int], list[int]], None] | None = None,
) -> Iterator[GenerationDelta]:
    """Generate block by block: yield what each block adds to its prompt's result, as soon as it stands.

    The deltas of one prompt, joined, are its result: nothing of what ends a sequence, or follows that, is among them.

    Args, Raises: as in `generate`; errors come from this call, before the first delta.

    Returns:
        An iterator. To stop early, close it or leave it.
    """
    requests = _requests(model, prompts, config, seed, tokenizer, batch_size)
    return _run(model, requests, tokenizer, batch_size, cuda_graphs, progress, on_commit, stream=True)


def _requests(
    model: MaskedDiffusionModel,
    prompts: Sequence[Sequence[int] | str],
    config: GenerationConfig | Sequence[GenerationConfig] | None,
    seed: int | Sequence[int],
    tokenizer: Any,
    batch_size: int | None,
) -> list[Request]:
    """Return a checked request for each prompt."""
    if isinstance(prompts, str):  # a sequence of texts, too, of one letter each
        raise TypeError(f"prompts must be a list, got one text, {prompts!r:.80}; give [text]")
    configs = _configs(config, len(prompts))
    seeds = [int(seed)] * len(prompts) if isinstance(seed, (int, np.integer)) else list(seed)
    ids = [
        encode(tokenizer, p, f"prompts[{i}]") if isinstance(p, str) else _token_ids(p, f"prompts[{i}]")
        for i, p in enumerate(prompts)
    ]
    _check(model, ids, configs, seeds, tokenizer, batch_size)
    return [
        Request(i, np.asarray(p, dtype=np.int64), c, s, model.config)
        for i, (p, c, s) in enumerate(zip(ids, configs, seeds, strict=True))
    ]


@torch.inference_mode()
def _run(
    model: MaskedDiffusionModel,
    requests: list[Request],
    tokenizer: Any,
    batch_size: int | None,
    cuda_graphs: bool,
    progress: bool,
    on_commit: Callable[[int, list[int], list[int]], None] | None,
    *,
    stream: bool,
) -> Iterator[GenerationDelta]:
    """Yield the deltas of all requests.

    Without `stream` there is only the last one of each, with nothing in it but the result.
    """
    waiting = deque(requests)
    size = min(batch_size or len(requests), len(requests))
    cache, free = _make_cache(model, requests, size)
    graphed = graphs.GraphedSteps(graphs.CudaCapture()) if cuda_graphs and graphs.available(model, cache) else None

    first_projection_reuse = step.FirstProjectionReuse(model)
    active: list[Request] = []
    readers = {request.index: stopping.Reader(request, model, tokenizer) for request in requests}
    total = sum(sum(map(len, r.blocks)) for r in waiting)
    bar = tqdm(total=total, unit=" tokens", disable=not shows(progress))
    forwards = committed_total = 0
    with bar:
        while active or waiting:
            while waiting and len(active) < size:
                request = waiting.popleft()
                request.slots = tuple(free.pop(0) for _ in range(1 + request.guided)) if cache is not None else ()
                active.append(request)
            committed = _advance(model, active, cache, graphed, first_projection_reuse)
            forwards += 1
            for request, positions, _ in committed:
                if on_commit is not None and len(positions):
                    on_commit(request.index, positions.tolist(), request.canvas[positions].tolist())
            count = sum(gain for _, _, gain in committed)
            committed_total += count
            bar.update(count)
            bar.set_postfix_str(f"{committed_total / forwards:.1f} tokens/forward", refresh=False)
            for request in [r for r in active if r.block_done]:
                request.next_block()
                reader = readers[request.index]
                request.finish_reason = reader.why_finished()
                if request.finish_reason is not None:
                    bar.total -= sum(map(len, request.blocks[request.block :]))  # what will not be generated
                    free = sorted([*free, *request.slots])
                    active.remove(request)
                    yield reader.last() if stream else GenerationDelta(request.index, [], result=reader.result())
                elif stream:
                    yield reader.delta()


def encode(tokenizer: Any, text: str, name: str) -> list[int]:
    """Return the ids of a prompt by a tokenizer of this library, `tokenizers` or `transformers`.

    `Tokenizer.encode_prompt` says how.
    """
    if tokenizer is None:
        raise ValueError(f"{name} is a text, which needs a tokenizer; give one, or token ids")
    if isinstance(tokenizer, Tokenizer):
        return tokenizer.encode_prompt(text)
    found = tokenizer.encode(text, add_special_tokens=False)
    return begin_with(list(getattr(found, "ids", found)), affixes(tokenizer)[0])


def _advance(
    model: MaskedDiffusionModel,
    active: list[Request],
    cache: KeyValueCache | None,
    graphed: graphs.GraphedSteps | None,
    first_projection_reuse: step.FirstProjectionReuse,
) -> list[tuple[Request, np.ndarray, int]]:
    """Run one step of all active requests; return (request, positions it committed, number of tokens it gained)."""
    if graphed is not None and graphs.suitable(active):
        layout = step.lay_out(model, active, cache, whole_blocks=True, sequences=graphs.bucket(len(active)))
        tokens = graphed.run(model, layout)
    else:
        layout = step.lay_out(model, active, cache)
        inputs = layout.upload(model.device)
        tokens = step.run(model, inputs, layout.calls, first_projection_reuse.of(layout, inputs))
    now = tokens.cpu().numpy()  # the one wait for the device in a step
    done, at = [], 0
    for group, members in zip(layout.arrays.groups, layout.members, strict=True):
        end = at + len(group.rows)
        for request, positions in members:
            taken = len(request.taken)
            committed = request.advance(positions, now[at : at + len(positions)])
            done.append((request, committed, len(committed) - taken))
            at += len(positions)
        at = end  # past the blanks
    return done


def _make_cache(
    model: MaskedDiffusionModel, requests: list[Request], size: int
) -> tuple[KeyValueCache | None, list[int]]:
    """Return the cache that all requests share, if their configs want one, and its free slots."""
    if not requests or requests[0].config.cache == "none":
        return None, []
    slots = size * (1 + any(r.guided for r in requests))
    weight = model.embed_tokens.weight
    dtype = autocast_dtype(weight.device) or weight.dtype
    longest = max(len(r.canvas) for r in requests)
    spare = 1 + max(r.config.block_length for r in requests)  # of blank sequences
    return KeyValueCache(model.config, slots, longest, spare=spare, device=weight.device, dtype=dtype), list(
        range(slots)
    )


# -------------------------------------------------------------------------------------------------------------- checks


def _token_ids(prompt: Sequence[int], name: str) -> list[int]:
    ids = np.asarray(prompt.cpu() if isinstance(prompt, torch.Tensor) else prompt)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise TypeError(f"{name} must be a text or a list of token ids, got {prompt!r:.80}")
    return ids.tolist()


def _configs(config: GenerationConfig | Sequence[GenerationConfig] | None, count: int) -> list[GenerationConfig]:
    if config is None or isinstance(config, GenerationConfig):
        return [config or GenerationConfig()] * count
    if not isinstance(config, Sequence) or not all(isinstance(c, GenerationConfig) for c in config):
        raise TypeError(f"config must be a GenerationConfig, or a list of them, got {config!r:.80}")
    if len(config) != count:
        raise ValueError(f"config must be one, or one for each of the {count} prompts, got {len(config)}")
    if len(caches := sorted({c.cache for c in config})) > 1:
        raise ValueError(f"config: the sequences of a batch share one kind of cache, got {', '.join(caches)}")
    return list(config)


def _check(
    model: MaskedDiffusionModel,
    prompts: list[list[int]],
    configs: list[GenerationConfig],
    seeds: list[int],
    tokenizer: Any,
    batch_size: int | None,
) -> None:
    if batch_size is not None and (not isinstance(batch_size, Integral) or batch_size < 1):
        raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
    if len(seeds) != len(prompts):
        raise ValueError(f"seed must be one integer or one for each of the {len(prompts)} prompts, got {len(seeds)}")
    if wrong := [s for s in seeds if not isinstance(s, Integral)]:
        raise TypeError(f"seed must be an integer, or one for each prompt, got {wrong[0]!r}")
    if wrong := [s for s in seeds if not -(2**63) <= s < 2**63]:
        raise ValueError(f"seed must fit 64 bits, got {wrong[0]}")
    size, limit, mask_id = model.config.embedding_rows, model.config.max_position_embeddings, model.config.mask_token_id
    for i, (prompt, config) in enumerate(zip(prompts, configs, strict=True)):
        if config.stop_strings and tokenizer is None:
            raise ValueError("stop_strings need a tokenizer")
        if wrong := [token for token in prompt if not 0 <= token < size]:
            raise ValueError(f"prompts[{i}] holds token id {wrong[0]}, outside of [0, {size})")
        if config.mode == "infill" and mask_id not in prompt:
            raise ValueError(f"prompts[{i}] holds no mask (id {mask_id}); mode infill fills the masks of the prompt")
        room = {"var": config.block_length, "fixed": config.gen_length, "infill": 0}[config.mode]
        if (beyond := len(prompt) + room - limit) > 0:
            raise ValueError(
                f"prompts[{i}] has {len(prompt)} tokens; with {room} more it is {beyond} over the model's "
                f"max_position_embeddings of {limit}"
            )
        for name in ("stop_tokens", "forbid_tokens", "delay_tokens", "end_think"):
            if wrong := [token for token in getattr(config, name) or () if not 0 <= token < size]:
                raise ValueError(f"{name} holds token id {wrong[0]}, outside of [0, {size})")
