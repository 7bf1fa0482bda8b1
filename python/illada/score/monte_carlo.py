"""Monte Carlo likelihood bound: cross-entropies of randomly masked continuations, packed over pairs and samples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral

import numpy as np
import torch
from numpy.typing import NDArray

from illada.model import MaskedDiffusionModel
from illada.philox import Stream, words
from illada.score.items import (
    MAX_TOKENS,
    Item,
    check_options,
    hidden_states,
    lay_out,
    make_items,
    negative_log_likelihood,
    progress_bar,
    without_context,
)


@torch.inference_mode()
def monte_carlo_likelihood(
    model: MaskedDiffusionModel,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    *,
    num_samples: int = 128,
    stratum: int = 16,
    append_eos: bool = False,
    cfg_scale: float = 0.0,
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
    progress: bool = False,
) -> list[float]:
    """Estimate a lower bound on the log-likelihood of each continuation by LLaDA's Monte Carlo method, in nats.

        -1/n sum_s L / x_s sum_{i masked in s} CE(y_i)

    Sample s masks x_s of the L tokens of the continuation, chosen at random.

    Args:
        model: The model; its device is used.
        contexts: P lists of token ids, also empty ones, as in `confidence_score`.
        continuations: P lists of token ids in [0, V), without masks.
        num_samples: n (published as `mc_num`); one is enough for continuations of one token.
        stratum: Samples over which the mask counts x are spread evenly (published as `batch_size`); see
            `monte_carlo_masks`.
        append_eos: Show the eos token to the model after the continuation, as in `confidence_score`.
        cfg_scale: Strength of classifier-free guidance, >= 0, as in `confidence_score`.
        seed: Seed of the masks, which depend only on (seed, context, continuation, sample). They do not depend on other
            pairs, their order or the packing.
        max_tokens: Most tokens of a pack; a longer sequence has its own pack.
        progress: Show a bar on a terminal.

    Returns:
        P floats in order, in nats. Samples that mask the same tokens run once, so a short continuation costs at most
        2^L - 1 sequences.

    Raises:
        ValueError, TypeError: As `confidence_score`. ValueError also where num_samples or stratum is not a positive
            integer, or num_samples is larger than stratum and not a multiple of it.
    """
    items = make_items(model.config, contexts, continuations, append_eos)
    check_options(cfg_scale, max_tokens)
    _check_samples(num_samples, stratum)

    def drawn() -> Iterator[tuple[Item, NDArray[np.bool_], NDArray[np.float64]]]:
        # Sort so that candidates that are equal once masked are neighbours, and so are sequences of one length.
        with progress_bar(len(contexts), progress) as bar:
            bar.update(len(contexts) - len(items))
            for item in sorted(items, key=lambda i: (-i.size, -i.length, i.context.tobytes(), i.index)):
                masks = monte_carlo_masks(
                    item.context.tolist(),
                    item.continuation.tolist(),
                    num_samples=num_samples,
                    stratum=stratum,
                    seed=seed,
                )
                patterns, counts = np.unique(masks, axis=0, return_counts=True)
                yield item, patterns, counts / num_samples
                bar.update()

    bounds = _estimate(model, drawn(), len(contexts), cfg_scale, max_tokens)
    return [0.0 - loss for loss in bounds]


def monte_carlo_masks(
    context: Sequence[int], continuation: Sequence[int], *, num_samples: int = 128, stratum: int = 16, seed: int = 0
) -> NDArray[np.bool_]:
    """Return the tokens that each sample of `monte_carlo_likelihood` masks.

    As published, each stratum of b = min(stratum, num_samples) samples draws k uniformly on 1 .. L. Its counts are
    x_i = (round(k + i L / b) - 1) mod L + 1, and each sample masks x_i tokens chosen uniformly. The random numbers are
    Philox4x32-10 with a hash of (seed, context, continuation) as key.

    Args:
        context: Token ids before the continuation.
        continuation: L token ids, at least one.
        num_samples: As in `monte_carlo_likelihood`.
        stratum: As in `monte_carlo_likelihood`.
        seed: As in `monte_carlo_likelihood`.

    Returns:
        bool [num_samples, L], True where masked.

    Raises:
        ValueError: num_samples is larger than stratum and not a multiple of it, one of the two is not a positive
            integer, or the continuation is empty.
    """
    _check_samples(num_samples, stratum)
    length = len(continuation)
    if length == 0:
        raise ValueError("continuation is empty; there is nothing to mask")
    parts = ([seed & (2**64 - 1), len(context)], context, continuation)
    content = b"".join(np.array(part, dtype=np.uint64).tobytes() for part in parts)
    key = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")

    size = min(stratum, num_samples)
    first_words = words(key, Stream.LIKELIHOOD_COUNT, np.arange(num_samples // size), 1)[:, 0]
    first = 1 + (first_words.astype(np.uint64) * length >> 32).astype(np.int64)
    # torch's float32 linspace and its rounding of halves to even, as published: other roundings move some counts by 1.
    ends = [(k, k + (size - 1) * (length / size)) for k in first.tolist()]
    spread = [torch.linspace(*two, size, dtype=torch.float32, device="cpu") for two in ends]
    counts = (torch.cat(spread).round().long().numpy() - 1) % length + 1
    mask_words = words(key, Stream.LIKELIHOOD_MASK, np.arange(num_samples), length)
    ranks = mask_words.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    return ranks < counts[:, None]


# -------------------------------------------------------------------------------------------------- estimating in packs


def _estimate(
    model: MaskedDiffusionModel,
    weighted: Iterable[tuple[Item, NDArray[np.bool_], NDArray[np.float64]]],
    count: int,
    cfg_scale: float,
    max_tokens: int,
) -> list[float]:
    """Compute sum_s weight_s L / x_s sum_{i masked in s} CE_i for each of `count` items.

    `weighted` gives each item with its masks, bool [patterns, L], and their weights, float64 [patterns].
    """
    config, device = model.config, model.device
    losses = torch.zeros(count, dtype=torch.float64, device=device)
    sequences: dict[bytes, int] = {}  # sequences of the pack: bytes of the tokens -> start
    tokens: list[NDArray[np.int64]] = []
    unconditional: list[NDArray[np.int64]] = []
    rows: list[NDArray[np.int64]] = []
    targets: list[NDArray[np.int64]] = []
    factors: list[NDArray[np.float64]] = []
    owners: list[NDArray[np.int64]] = []
    total = 0

    def run() -> None:
        nonlocal total
        packed = torch.from_numpy(np.concatenate(tokens + unconditional)).to(device)
        sizes = np.array([len(sequence) for sequence in tokens + unconditional])
        at, inverse = np.unique(np.concatenate(rows), return_inverse=True)  # ascending; items may share sequences
        layout = lay_out(config, sizes, device)
        hidden = hidden_states(model, packed, torch.from_numpy(at.astype(np.int32)).to(device), layout, cfg_scale)
        shown = hidden[torch.from_numpy(inverse).to(device)]
        nll = negative_log_likelihood(
            shown, model.head_weight, torch.from_numpy(np.concatenate(targets)).to(device)
        ).double()
        factor, owner = (torch.from_numpy(np.concatenate(part)).to(device) for part in (factors, owners))
        losses.index_add_(0, owner, nll * factor)
        for part in (sequences, tokens, unconditional, rows, targets, factors, owners):
            part.clear()
        total = 0

    for item, masks, weights in weighted:
        for masked, weight in zip(masks, weights, strict=True):
            sequence = item.sequence(config.mask_token_id, masked)
            key = sequence.tobytes()
            # Guidance masks the context, so equal tokens with another split into context and continuation differ.
            key += len(item.context).to_bytes(8, "little") if cfg_scale else b""
            if key not in sequences:
                if tokens and (total + item.size) * (2 if cfg_scale else 1) > max_tokens:
                    run()
                sequences[key] = total
                tokens.append(sequence)
                if cfg_scale:
                    unconditional.append(without_context(sequence, len(item.context), config.mask_token_id))
                total += item.size
            where = np.flatnonzero(masked)
            rows.append(sequences[key] + len(item.context) + where)
            targets.append(item.continuation[where])
            factors.append(np.full(len(where), weight * item.length / len(where)))
            owners.append(np.full(len(where), item.index))
    if tokens:
        run()
    return losses.tolist()


def _check_samples(num_samples: int, stratum: int) -> None:
    for name, value in (("num_samples", num_samples), ("stratum", stratum)):
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if num_samples > stratum and num_samples % stratum:
        below = num_samples // stratum * stratum
        raise ValueError(
            f"num_samples must be a multiple of stratum ({stratum}) or smaller than it, got {num_samples}; the nearest "
            f"are {below} and {below + stratum}"
        )
