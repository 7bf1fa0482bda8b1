"""Confidence remasking: commit the most confident of the sampled tokens in place.

`illada.ops.sampling` samples the tokens. `illada.ops.reference.remask` has the formulas of the commit rules.

| device          | tokens       | kernels                                             |
|-----------------|--------------|-----------------------------------------------------|
| CPU             | int64, int32 | csrc/cpu                                            |
| sm_80 and newer | int64, int32 | csrc/remask                                         |
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from illada.ops import _library as lib
from illada.ops import raw
from illada.ops.op_types import RULES, RemaskStatus, TokenSample

lib.LIBRARY.define(
    "remask(Tensor(a!) tokens, Tensor rows, Tensor cu_rows, Tensor token, Tensor confidence, Tensor? entropy, "
    "int rule, float limit, Tensor? limits, int mask_id, int min_commit, Tensor? end_ids) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=lib.TAGS,
)


def _remask(
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
) -> tuple[Tensor, ...]:
    out = _remask_fake(tokens, rows, cu_rows)
    rows, cu_rows, token, confidence = (t.contiguous() for t in (rows, cu_rows, token, confidence))
    entropy, limits, end_ids = (None if t is None else t.contiguous() for t in (entropy, limits, end_ids))
    raw.remask(
        *(RemaskStatus(*out), tokens, rows, cu_rows, token, confidence, entropy),
        *(rule, limit, limits, mask_id, min_commit, end_ids),
    )
    return out


def _remask_fake(tokens: Tensor, rows: Tensor, cu_rows: Tensor, *arguments: lib.Argument) -> tuple[Tensor, ...]:
    dtypes = (torch.int32, torch.int32, torch.bool, torch.bool)
    return tuple(cu_rows.new_empty(cu_rows.shape[0] - 1, dtype=dtype) for dtype in dtypes)


lib.implement("remask", _remask_fake, cpu=_remask, cuda=_remask)


@overload
def remask(
    tokens: Tensor,
    rows: Tensor,
    cu_rows: Tensor,
    sample: TokenSample,
    *,
    quota: int | Tensor | None = ...,
    threshold: float | Tensor | None = ...,
    factor: float | Tensor | None = ...,
    entropy_bound: float | Tensor | None = ...,
    mask_id: int,
    min_commit: int = ...,
    end_ids: Tensor | None = ...,
    return_status: Literal[False] = ...,
) -> Tensor: ...
@overload
def remask(
    tokens: Tensor,
    rows: Tensor,
    cu_rows: Tensor,
    sample: TokenSample,
    *,
    quota: int | Tensor | None = ...,
    threshold: float | Tensor | None = ...,
    factor: float | Tensor | None = ...,
    entropy_bound: float | Tensor | None = ...,
    mask_id: int,
    min_commit: int = ...,
    end_ids: Tensor | None = ...,
    return_status: Literal[True],
) -> RemaskStatus: ...
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
    """Commit the most confident sampled tokens of each sequence to `tokens` in place; the rest stay masks.

    Give exactly one commit rule: quota, threshold, factor or entropy_bound. Each is a number, or a tensor [S] with one
    value per sequence (int32 for quota, float32 for the others).

    Args:
        tokens: int64 or int32 [T], the packed canvas. Only positions that hold `mask_id` are candidates.
        rows: int32 or int64 [N], the positions in `tokens` that were sampled; int64 is copied.
        cu_rows: int32 or int64 [S + 1], where each sequence's rows start, from 0 to N; int64 is copied.
        sample: TokenSample of `sample_tokens`, N rows. Rows with confidence -inf or NaN are never committed. The rule
            entropy_bound also never commits rows with entropy NaN. An id that int32 tokens cannot hold is an error on a
            CPU; on CUDA it is never committed.
        quota: Commit the `quota` most confident candidates; a number of any size, infinity takes all.
        threshold: Commit all candidates with confidence >= threshold.
        factor: Commit the longest prefix of the ranking with confidence_(r) > 1 - factor / (r + 1).
        entropy_bound: Commit the longest prefix, by ascending entropy, whose entropies without the largest sum to
            <= entropy_bound. The sample needs entropies.
        mask_id: The id of the mask token.
        min_commit: Commit at least this many where there are that many candidates; not for `quota`.
        end_ids: int64 [E], the tokens that end a sequence, for RemaskStatus.ended.
        return_status: Return the RemaskStatus with all counts and flags, not only `committed`.

    Returns:
        committed, int32 [S], or a RemaskStatus. The lowest row wins ties. Nothing is copied to the host.

    Raises:
        TypeError: An argument has a wrong dtype; the message names it.
        ValueError: An argument has a wrong shape, device or value, or not exactly one rule is given.
        NotImplementedError: No kernel was built for this device.
    """
    op = "remask"
    lib.check_shape(op, "tokens", tokens, ("T",))
    lib.check_dtype(op, "tokens", tokens, (torch.int64, torch.int32))
    lib.check_last_contiguous(op, "tokens", tokens)
    lib.check_shape(op, "rows", rows, ("N",))
    lib.check_index(op, "rows", rows)
    lib.check_index(op, "cu_rows", cu_rows)
    if cu_rows.dim() != 1 or cu_rows.shape[0] == 0:
        raise ValueError(f"{op}: cu_rows must have shape [S + 1], got {list(cu_rows.shape)}")
    for field, dtype in (("token", torch.int64), ("confidence", torch.float32), ("entropy", torch.float32)):
        if (tensor := getattr(sample, field)) is not None:
            lib.check_shape(op, f"sample.{field}", tensor, tuple(rows.shape))
            lib.check_dtype(op, f"sample.{field}", tensor, (dtype,))
    rules = dict(zip(RULES, (quota, threshold, factor, entropy_bound), strict=True))
    given = [name for name, value in rules.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"{op}: give exactly one of {', '.join(RULES)}, got {', '.join(given) or 'none'}")
    if given[0] == "entropy_bound" and sample.entropy is None:
        raise ValueError(f"{op}: entropy_bound needs sample.entropy; sample with extras=('entropy',)")
    if min_commit < 0:
        raise ValueError(f"{op}: min_commit must be >= 0, got {min_commit}")
    limit = rules[given[0]]
    limits: Tensor | None = None
    assert limit is not None
    if isinstance(limit, Tensor):
        lib.check_shape(op, given[0], limit, (cu_rows.shape[0] - 1,))
        lib.check_dtype(op, given[0], limit, (torch.int32 if given[0] == "quota" else torch.float32,))
        limits, limit = limit, 0.0
    elif limit != limit or (given[0] == "quota" and limit < 0):
        raise ValueError(f"{op}: {given[0]} must be a number (quota: >= 0), got {limit}")
    for name, number in (("mask_id", mask_id), ("min_commit", min_commit)):
        if not -(2**63) <= number < 2**63:
            raise ValueError(f"{op}: {name} must fit 64 bits, got {number}")
    if given[0] == "quota" and limits is None:
        limit = min(limit, 2.0**31)  # above any number of rows; a larger integer may not fit a float
    if end_ids is not None:
        lib.check_shape(op, "end_ids", end_ids, ("E",))
        lib.check_dtype(op, "end_ids", end_ids, (torch.int64,))
    lib.check_same_device(
        op, ("tokens", tokens), ("rows", rows), ("cu_rows", cu_rows), ("sample.token", sample.token),
        ("sample.confidence", sample.confidence), ("sample.entropy", sample.entropy), (given[0], limits),
        ("end_ids", end_ids),
    )  # fmt: skip
    status = RemaskStatus(
        *torch.ops.illada.remask(
            tokens, lib.as_int32(rows), lib.as_int32(cu_rows), sample.token, sample.confidence, sample.entropy,
            RULES.index(given[0]), float(limit), limits, mask_id, min_commit, end_ids,
        )
    )  # fmt: skip
    return status if return_status else status.committed
