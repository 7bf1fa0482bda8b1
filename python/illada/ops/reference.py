"""Specification of every op of `illada.ops` in plain torch, with the same names and arguments and no native code.

The functions favour readability over speed and compute in the dtype of their inputs. In float64 they are the oracle of
the tests. They materialise what the real ops avoid: all logits, all probabilities, a loop over sequences. They are
differentiable where the ops are, through ordinary autograd.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from illada.ops.op_types import LogitBias, RemaskStatus, TokenSample
from illada.philox import Stream, key_of, philox4x32


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute bidirectional attention within each packed sequence; arguments as in `illada.ops.varlen_attention`.

        out[i, h] = sum_j softmax_j(scale * q[i, h] . k[j, g]) v[j, g],   g = h // (H / G)

    The index j runs over i's own sequence.

    Returns:
        out [T, H, D]; with `return_lse` (out, lse), where lse = log sum_j exp(scale * q . k), natural log, [H, T].
        Without keys, as for rows after the last sequence, out is 0 and lse -inf.
    """
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    starts_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    outs, lses = [q.new_zeros(0, *q.shape[1:])], [q.new_zeros(heads, 0)]
    for s in range(len(cu_seqlens) - 1):
        q_s = q[cu_seqlens[s] : cu_seqlens[s + 1]]
        end_k = starts_k[s + 1] if seqused_k is None else starts_k[s] + seqused_k[s]
        k_s = k[starts_k[s] : end_k].repeat_interleave(group, dim=1)
        v_s = v[starts_k[s] : end_k].repeat_interleave(group, dim=1)
        scores = torch.einsum("ihd,jhd->hij", q_s, k_s) * scale
        lses.append(scores.logsumexp(-1))
        if len(k_s) == 0:  # softmax over nothing: out 0, lse -inf
            outs.append(torch.zeros_like(q_s))
        else:
            outs.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v_s))
    rest = q[cu_seqlens[-1] :]  # rows of no sequence
    outs.append(torch.zeros_like(rest))
    lses.append(q.new_full((heads, len(rest)), -torch.inf))
    out, lse = torch.cat(outs), torch.cat(lses, dim=1)
    return (out, lse) if return_lse else out


def linear_masked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    *,
    rows: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    return_nll: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Compute `masked_cross_entropy` of the logits hidden @ weight^T, with hidden [T, C] and weight [V, C]."""
    return masked_cross_entropy(
        hidden @ weight.T, targets, token_weights, rows=rows, normalizer=normalizer, return_nll=return_nll
    )


def masked_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    *,
    rows: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    return_nll: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Compute loss = sum_i w_i (lse_i - logits[i, y_i]) / normalizer over the rows with w_i != 0.

    With w = 1/p this is Eq. 1 of the iLLaDA paper. Arguments and results are as in `illada.ops.masked_cross_entropy`.
    """
    selected = token_weights.nonzero().squeeze(-1) if rows is None else rows.long()
    x, w = logits[selected], token_weights[selected].to(logits.dtype)
    lse = x.logsumexp(-1)
    nll = lse - x.gather(-1, targets[selected].long().unsqueeze(-1)).squeeze(-1)
    nll, lse = (torch.where(w != 0, value, torch.zeros_like(value)) for value in (nll, lse))
    loss = (w * nll).sum() / (1.0 if normalizer is None else normalizer)
    if not (return_nll or return_lse):
        return loss
    nll, lse = (logits.new_zeros(len(logits)).index_copy(0, selected, value) for value in (nll.detach(), lse))
    return loss, *((nll,) if return_nll else ()), *((lse,) if return_lse else ())


def uniform64(seed: int, row_id: int, step: int, vocab_size: int) -> np.ndarray:
    """Return the sampler's uniforms in (0, 1), float64 [V]: (bits + 1/2) / 2^64 with 64 random bits each.

    Vocabulary index v takes word v % 4 of Philox4x32-10 with key (seed lo, seed hi) and counter
    (v // 4, row_id, step, stream). The upper 32 bits come from one stream, the lower from another. A kernel needs to
    draw the lower bits only for the few tokens that can still win.
    """
    counter = np.zeros((-(-vocab_size // 4), 4), dtype=np.uint32)
    counter[:, 0] = np.arange(len(counter))
    counter[:, 1], counter[:, 2] = row_id, step & 0xFFFFFFFF
    key = key_of(seed)
    words = []
    for stream in (Stream.SAMPLE, Stream.SAMPLE_LOW_BITS):
        counter[:, 3] = stream
        words.append(philox4x32(counter, key).reshape(-1)[:vocab_size].astype(np.float64))
    return (words[0] + (words[1] + 0.5) * 2.0**-32) * 2.0**-32


def sample_tokens(
    logits: Tensor,
    *,
    temperature: float | Tensor = 0.0,
    seed: int | Tensor = 0,
    step: int | Tensor = 0,
    row_ids: Tensor | None = None,
    measure: str = "probability",
    logit_bias: LogitBias | None = None,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    confidence_at_temperature: bool = False,
    extras: Sequence[str] = (),
) -> TokenSample:
    """Sample token = argmax(logits + temperature * Gumbel) over the ids that `kept_ids` returns.

    Confidence comes from the noise-free softmax (LLaDA's rule), or from the softmax of the kept logits at the
    temperature (Dream's rule). Arguments and results are as in `illada.ops.sample_tokens`, in float64.
    """
    rows, vocab_size = logits.shape
    x = logits.double().clone()
    if logit_bias is not None:
        ids, values = (t.expand(rows, t.shape[-1]) for t in logit_bias)
        for n in range(rows):
            for token, value in zip(ids[n].tolist(), values[n].tolist(), strict=True):
                if token >= 0:
                    x[n, token] += value

    per_row = [
        torch.as_tensor(a).expand(rows).tolist()
        for a in (temperature, seed, step, torch.arange(rows) if row_ids is None else row_ids, top_k, top_p)
    ]
    noisy = x.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    random_measure = torch.zeros(rows, dtype=torch.float64)
    for n, (t, s, at_step, row_id, k, p) in enumerate(zip(*per_row, strict=True)):
        divisor = t if t > 0 else 1.0
        kept = kept_ids(x[n], divisor, k, p)
        noisy[n, ~kept] = -torch.inf
        if confidence_at_temperature and x[n].max().isfinite():
            x[n] = torch.where(kept, (x[n] - x[n].max()) / divisor, -torch.inf)
        if t > 0:
            # -log(1 - u), not -log(u): the smallest values win, and small u are exact.
            exponential = -np.log1p(-uniform64(s, row_id, at_step, vocab_size))
            noisy[n] += t * torch.from_numpy(-np.log(exponential))
        key = key_of(s)
        counter = np.array([0, row_id, at_step & 0xFFFFFFFF, Stream.SAMPLE_RANDOM_MEASURE], dtype=np.uint32)
        random_measure[n] = float(philox4x32(counter, key)[0] >> np.uint32(8)) * 2.0**-24

    token = torch.stack([(row == row.max()).nonzero()[0, 0] for row in noisy])  # ties: lowest index
    logprobs = x.log_softmax(-1)
    logprob = logprobs.gather(-1, token.unsqueeze(-1)).squeeze(-1)
    top2 = x.softmax(-1).topk(min(2, vocab_size), dim=-1).values
    margin = top2[:, 0] - top2[:, 1] if vocab_size > 1 else top2[:, 0]
    entropy = -torch.special.xlogy(logprobs.exp(), logprobs.exp()).sum(-1)
    confidence = {"probability": logprob.exp(), "margin": margin, "entropy": -entropy, "random": random_measure}[
        measure
    ]
    # A row whose softmax has no value (NaN or +inf among the logits, or only -inf) is never committed.
    valid = logprobs.exp().sum(-1).isfinite()
    return TokenSample(
        token=token,
        confidence=torch.where(valid, confidence, -torch.inf),
        logprob=torch.where(valid, logprob, -torch.inf),
        entropy=entropy if "entropy" in extras or measure == "entropy" else None,
        margin=margin if "margin" in extras or measure == "margin" else None,
    )


def kept_ids(x: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Return the ids of one row that top_k and then top_p keep, bool [V]; all ids where the row has no softmax.

    top_k keeps the k largest logits and all that equal the last of them. top_p then takes softmax(x / temperature) over
    those ids. It keeps them from the largest down, of equal ones the lowest id first, until the sum reaches top_p.
    """
    everything = torch.ones_like(x, dtype=torch.bool)
    if not x.softmax(-1).sum().isfinite():
        return everything
    kept = x >= x.topk(top_k).values[-1] if 0 < top_k < len(x) else everything
    if top_p < 1:
        order = torch.where(kept, x, -torch.inf).argsort(descending=True, stable=True)
        weights = torch.where(kept, ((x - x.max()) / temperature).exp(), 0.0)[order]
        sums = weights.cumsum(-1)
        kept = kept.clone()
        kept[order[1:][sums[:-1] >= top_p * sums[-1]]] = False
    return kept


def linear_sample_tokens(hidden: Tensor, weight: Tensor, *, rows: Tensor | None = None, **keywords: Any) -> TokenSample:
    """Apply `sample_tokens` to the logits hidden[rows] @ weight^T; hidden [T, C], weight [V, C], rows [N] or None."""
    return sample_tokens((hidden if rows is None else hidden[rows.long()]) @ weight.T, **keywords)


def remask(
    tokens: Tensor,
    rows: Tensor,
    cu_rows: Tensor,
    sample: TokenSample,
    *,
    quota: int | Tensor | None = None,
    threshold: float | Tensor | None = None,
    factor: float | Tensor | None = None,
    entropy_bound: float | Tensor | None = None,
    mask_id: int,
    min_commit: int = 1,
    end_ids: Tensor | None = None,
    return_status: bool = False,
) -> Tensor | RemaskStatus:
    """Commit the chosen candidates of each sequence to `tokens` in place; the rest stay masks.

    Arguments and results are as in `illada.ops.remask`. Candidates are ranked by descending confidence c, for
    entropy_bound by ascending entropy H; rank r starts at 1. The rules commit:

    - quota k: r <= k.
    - threshold tau: c >= tau.
    - factor f: the longest prefix with c_(r) > 1 - f / (r + 1).
    - entropy_bound gamma: the longest prefix with sum H_(1..r) - max H_(1..r) <= gamma.
    """
    committed, remaining = torch.zeros(2, len(cu_rows) - 1, dtype=torch.int32)
    ended = torch.zeros(len(committed), dtype=torch.bool)
    canvas, positions, starts = tokens.tolist(), rows.tolist(), cu_rows.tolist()
    token, confidence = sample.token.tolist(), sample.confidence.tolist()
    entropy = None if sample.entropy is None else sample.entropy.tolist()
    ends = set() if end_ids is None else set(end_ids.tolist())
    limits = next(
        torch.as_tensor(a).expand(len(committed)).tolist()
        for a in (quota, threshold, factor, entropy_bound)
        if a is not None
    )
    for s, limit in enumerate(limits):
        all_rows = range(starts[s], starts[s + 1])
        mine = [n for n in all_rows if canvas[positions[n]] == mask_id and confidence[n] > -torch.inf]
        if entropy_bound is not None:
            assert entropy is not None
            mine = sorted((n for n in mine if entropy[n] == entropy[n]), key=lambda n: (entropy[n], n))  # no NaN
            entropies = [entropy[n] for n in mine]
            count = _prefix(sum(entropies[:r]) - max(entropies[:r]) <= limit for r in range(1, len(mine) + 1))
        else:
            mine.sort(key=lambda n: (-confidence[n], n))
            if quota is not None:
                count = max(int(min(limit, len(mine))), 0)
            elif threshold is not None:
                count = sum(confidence[n] >= limit for n in mine)
            else:
                assert factor is not None
                count = _prefix(confidence[n] > 1 - limit / (r + 1) for r, n in enumerate(mine, 1))
        if quota is None:
            count = max(count, min_commit)
        for n in mine[:count]:
            canvas[positions[n]] = token[n]
            ended[s] |= token[n] in ends
        committed[s] = min(count, len(mine))
        remaining[s] = sum(canvas[positions[n]] == mask_id for n in all_rows)
    tokens.copy_(torch.tensor(canvas, dtype=tokens.dtype))
    return RemaskStatus(committed, remaining, remaining == 0, ended) if return_status else committed


def _prefix(passes: Iterable[bool | Tensor]) -> int:
    """Count the leading items that pass."""
    count = 0
    for ok in passes:
        if not ok:
            break
        count += 1
    return count
