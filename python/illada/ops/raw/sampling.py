"""Raw calls of sampling and remasking."""

from __future__ import annotations

import torch
from torch import Tensor

from illada._native import native
from illada.ops._library import written
from illada.ops.op_types import RemaskStatus, TokenSample
from illada.ops.raw.launch import DTYPES, launch_of


def sample_tokens_workspace(rows: int, vocab_size: int, device: torch.device, filtered: bool = False) -> int:
    """Return the bytes of workspace that `sample_tokens` needs.

    Args:
        rows: N, the rows of logits.
        vocab_size: V.
        device: The device of the call; a CUDA device without an index is the current one.
        filtered: Whether the call uses top_k, top_p, top_ks, top_ps or confidence_at_temperature.

    Returns:
        Bytes; 0 on a CPU.
    """
    if device.type != "cuda":
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return native().sample_tokens_workspace(
        num_rows=rows, vocab_size=vocab_size, filtered=filtered, launch=native().launch(device=index)
    )


def sample_tokens(
    out: TokenSample,
    logits: Tensor,
    temperature: float = 0.0,
    seed: int = 0,
    step: int = 0,
    temperatures: Tensor | None = None,
    seeds: Tensor | None = None,
    steps: Tensor | None = None,
    row_ids: Tensor | None = None,
    bias_ids: Tensor | None = None,
    bias_values: Tensor | None = None,
    measure: int = 0,
    top_k: int = 0,
    top_p: float = 1.0,
    top_ks: Tensor | None = None,
    top_ps: Tensor | None = None,
    confidence_at_temperature: bool = False,
    *,
    workspace: Tensor | None = None,
) -> None:
    """Sample one token of each row of logits into `out`, as `illada.ops.sample_tokens` does.

    Args:
        out: The outputs, each [N]: token int64; confidence, logprob, entropy and margin float32. Entropy and margin may
            be None or empty.
        logits: [N, V], float32, bfloat16 or (on CUDA) float16, any row stride.
        temperature: Number for all rows.
        seed: Number for all rows.
        step: Number for all rows.
        temperatures: float32 [N], one value per row in place of `temperature`.
        seeds: int64 [N], one value per row in place of `seed`.
        steps: int32 [N], one value per row in place of `step`.
        row_ids: int64 [N] in [0, 2^32); default 0 .. N - 1.
        bias_ids: int32 [N, K] or [K]; -1 is an unused slot.
        bias_values: float32, the shape of `bias_ids`.
        measure: The confidence measure, an index into `types.MEASURES`.
        top_k: Filter for all rows; 0 keeps all ids.
        top_p: Filter for all rows; 1.0 keeps all ids.
        top_ks: int32 [N], one value per row in place of `top_k`.
        top_ps: float32 [N], one value per row in place of `top_p`.
        confidence_at_temperature: Compute all outputs but `token` from the distribution that is sampled.
        workspace: uint8, at least as large as `sample_tokens_workspace` says.
    """
    num_rows, vocab_size = logits.shape
    token, confidence, logprob, entropy, margin = out
    bias_count, bias_row_stride = _bias_sizes(bias_ids)
    inputs = (temperatures, seeds, steps, row_ids, bias_ids, bias_values, top_ks, top_ps)
    native().sample_tokens(
        logits=logits,
        logits_row_stride=logits.stride(0),
        num_rows=num_rows,
        vocab_size=vocab_size,
        dtype=DTYPES[logits.dtype],
        temperature=temperature,
        seed=seed,
        step=step,
        temperatures=temperatures,
        seeds=seeds,
        steps=steps,
        row_ids=row_ids,
        bias_ids=bias_ids,
        bias_values=bias_values,
        bias_count=bias_count,
        bias_row_stride=bias_row_stride,
        measure=measure,
        top_k=top_k,
        top_p=top_p,
        top_ks=top_ks,
        top_ps=top_ps,
        confidence_at_temperature=confidence_at_temperature,
        token=token,
        confidence=confidence,
        logprob=logprob,
        entropy=entropy,
        margin=margin,
        launch=launch_of(token, logits, confidence, logprob, entropy, margin, *inputs, workspace),
        num_threads=torch.get_num_threads(),
        workspace=workspace,
    )
    written(token, confidence, logprob, entropy, margin)


def _bias_sizes(bias_ids: Tensor | None) -> tuple[int, int]:
    """Return the biases of a row, and the elements between two rows' biases: 0 where all rows have the same."""
    if bias_ids is None:
        return 0, 0
    count = bias_ids.shape[-1]
    return count, count if bias_ids.dim() == 2 else 0


def linear_sample_tokens_workspace(hidden: Tensor, weight: Tensor, rows: Tensor | None) -> int | None:
    """Return the bytes of workspace that `linear_sample_tokens` needs.

    Args:
        hidden: [T, C].
        weight: [V, C], the head weight.
        rows: int32 [N], or None for all T rows.

    Returns:
        Bytes, or None where no fused kernel takes these tensors. One exists on sm_90a for 16-bit elements and 16-byte
        aligned rows.
    """
    if not hidden.is_cuda:
        return None
    size = native().linear_sample_tokens_workspace(
        hidden=hidden,
        hidden_row_stride=hidden.stride(0),
        num_tokens=hidden.shape[0],
        rows=rows,
        head_weight=weight,
        head_weight_row_stride=weight.stride(0),
        width=hidden.shape[1],
        num_rows=hidden.shape[0] if rows is None else rows.shape[0],
        vocab_size=weight.shape[0],
        dtype=DTYPES[hidden.dtype],
        launch=native().launch(device=hidden.get_device()),
    )
    return None if size < 0 else size


def head_plan(rows: int, vocab_size: int, sm_count: int) -> tuple[int, int, int, list[tuple[int, int, int, int, int]]]:
    """Return how `linear_sample_tokens` divides its work among CTAs on sm_90a; for tests.

    Args:
        rows: N, the rows that are sampled.
        vocab_size: V.
        sm_count: Number of streaming multiprocessors.

    Returns:
        (CTAs per cluster, vocab ranges, slices of 32 ids per range, tasks). A task is (CTA, row tile, range, tiles
        of 128 rows x 256 ids, tiles of its cluster). Each CTA's tasks are in the order of their execution. A CTA waits
        while its neighbour in the cluster has more tiles.
    """
    return native().head_plan(num_rows=rows, vocab_size=vocab_size, sm_count=sm_count)


def linear_sample_tokens(
    out: TokenSample,
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    step: int = 0,
    temperatures: Tensor | None = None,
    seeds: Tensor | None = None,
    steps: Tensor | None = None,
    row_ids: Tensor | None = None,
    bias_ids: Tensor | None = None,
    bias_values: Tensor | None = None,
    measure: int = 0,
    *,
    workspace: Tensor,
) -> None:
    """Run the fused kernel of `illada.ops.linear_sample_tokens` and write to `out`.

    This call has no filters, because filters need a row's logits more than once.

    Args:
        out: The outputs, each [N], as in `sample_tokens` of this module.
        hidden: [T, C], float16 or bfloat16.
        weight: [V, C], the head weight, of hidden's dtype.
        rows: int32 [N], the rows of hidden to sample; None: all T.
        temperature: As in `sample_tokens` of this module.
        seed: As in `sample_tokens` of this module.
        step: As in `sample_tokens` of this module.
        temperatures: As in `sample_tokens` of this module.
        seeds: As in `sample_tokens` of this module.
        steps: As in `sample_tokens` of this module.
        row_ids: As in `sample_tokens` of this module.
        bias_ids: As in `sample_tokens` of this module.
        bias_values: As in `sample_tokens` of this module.
        measure: As in `sample_tokens` of this module.
        workspace: uint8, at least as large as `linear_sample_tokens_workspace` says.
    """
    token, confidence, logprob, entropy, margin = out
    bias_count, bias_row_stride = _bias_sizes(bias_ids)
    inputs = (weight, rows, temperatures, seeds, steps, row_ids, bias_ids, bias_values)
    native().linear_sample_tokens(
        hidden=hidden,
        hidden_row_stride=hidden.stride(0),
        num_tokens=hidden.shape[0],
        rows=rows,
        head_weight=weight,
        head_weight_row_stride=weight.stride(0),
        width=hidden.shape[1],
        num_rows=hidden.shape[0] if rows is None else rows.shape[0],
        vocab_size=weight.shape[0],
        dtype=DTYPES[hidden.dtype],
        temperature=temperature,
        seed=seed,
        step=step,
        temperatures=temperatures,
        seeds=seeds,
        steps=steps,
        row_ids=row_ids,
        bias_ids=bias_ids,
        bias_values=bias_values,
        bias_count=bias_count,
        bias_row_stride=bias_row_stride,
        measure=measure,
        token=token,
        confidence=confidence,
        logprob=logprob,
        entropy=entropy,
        margin=margin,
        launch=launch_of(token, hidden, confidence, logprob, entropy, margin, *inputs, workspace),
        workspace=workspace,
    )
    written(token, confidence, logprob, entropy, margin)


def remask(
    out: RemaskStatus,
    tokens: Tensor,
    rows: Tensor,
    cu_rows: Tensor,
    token: Tensor,
    confidence: Tensor,
    entropy: Tensor | None,
    rule: int,
    limit: float,
    limits: Tensor | None,
    mask_id: int,
    min_commit: int,
    end_ids: Tensor | None,
) -> None:
    """Commit candidates to `tokens` in place and write the counts to `out`, as `illada.ops.remask` does.

    Args:
        out: The outputs, each [S]: committed and remaining int32, finished and ended bool.
        tokens: int64 or int32 [T], the packed canvas.
        rows: int32 [N], the positions in `tokens` that were sampled.
        cu_rows: int32 [S + 1], where each sequence's rows start.
        token: int64 [N], the candidates.
        confidence: float32 [N].
        entropy: float32 [N], nats, or None; the rule entropy_bound needs it.
        rule: The commit rule, an index into `types.RULES`.
        limit: The rule's number for all sequences.
        limits: [S], int32 for quota and float32 for other rules, in place of `limit`; or None.
        mask_id: The id of the mask token.
        min_commit: Fewest candidates to commit, for rules other than quota.
        end_ids: int64 [E], the tokens that end a sequence; or None.
    """
    committed, remaining, finished, ended = out
    inputs = (rows, cu_rows, token, confidence, entropy, limits, end_ids)
    native().remask(
        tokens=tokens,
        tokens_are_int64=tokens.dtype == torch.int64,
        num_tokens=tokens.shape[0],
        rows=rows,
        cu_rows=cu_rows,
        num_rows=rows.shape[0],
        num_sequences=cu_rows.shape[0] - 1,
        token=token,
        confidence=confidence,
        entropy=entropy,
        rule=rule,
        limit=limit,
        limits=limits,
        mask_id=mask_id,
        min_commit=min_commit,
        end_ids=end_ids,
        num_end_ids=0 if end_ids is None else end_ids.shape[0],
        committed=committed,
        remaining=remaining,
        finished=finished,
        ended=ended,
        launch=launch_of(committed, tokens, remaining, finished, ended, *inputs),
    )
    written(tokens, committed, remaining, finished, ended)
