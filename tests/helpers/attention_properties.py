"""Attention on values that break kernels, for the tests of every device: what is expected, and how near.

A pack has a sequence for each kind of `adversarial`, and rows of no sequence at its end, which hold NaN. The kind is a
rule for a row of scores: it stands in one column of the keys, against a column of the queries that is 1 for the first
key-value head and, of every other token, 2^13 for the second, so that scores reach far beyond what the dtype holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from adversarial import values
from torch import Tensor

from illada.ops import reference

HEADS, KV_HEADS, REST = 4, 2, 9
LARGE = 2.0**13
MOST = 2.0**90  # of a key: products of scores and gradients stay within float32
SCORE_ERRORS = 8  # of a score, in eps of float32 of the sum of its products' sizes: tensor cores truncate every sum
ROUNDINGS = 2  # of a probability, in eps of the dtype
MOST_OF_SUM = 2.0**-5  # how far from 1 the sum of probabilities may be that rounded scores and lse give
LEAST = 2.0**-100  # of the exponential functions
NAMES = ("out", "lse", "dq", "dk", "dv")


def make(
    kinds: Sequence[str],
    queries: int,
    keys: int,
    dim: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    heads: int = HEADS,
) -> tuple[list[Tensor], dict[str, Tensor], Tensor]:
    """Return (q, k, v), their lengths, and the gradient of out."""
    sizes = [(queries * len(kinds) + REST, heads), *[(keys * len(kinds) + REST, KV_HEADS)] * 2]
    q, k, v = (0.5 * torch.randn(*size, dim, generator=generator) for size in sizes)
    q[..., 0] = 1
    q[::2, heads // KV_HEADS :, 0] = LARGE
    for n, kind in enumerate(kinds):
        column = values(kind, (KV_HEADS, keys), dtype, generator).float()
        column = torch.where(column.isfinite(), column.clamp(-MOST, MOST), column)
        k[n * keys : (n + 1) * keys, :, 0] = column.T
    for x in (q, k, v):
        x[-REST:] = torch.nan
    d_out = torch.randn(q.shape, generator=generator).to(dtype)
    d_out[-REST:] = torch.nan
    starts = torch.arange(len(kinds) + 1, dtype=torch.int32)
    lengths = {"cu_seqlens": queries * starts, "cu_seqlens_k": keys * starts}
    return [x.to(dtype) for x in (q, k, v)], lengths, d_out


def fill_with_nan(device: torch.device) -> None:
    """Free memory of CUDA full of NaNs, which the next tensors of these sizes get. A CPU's allocator keeps less."""
    if device.type == "cuda":
        sizes = [1 << n for n in range(9, 24)]
        freed = [torch.full((size,), torch.nan, device=device) for size in sizes for _ in range(3)]
        del freed


def run(attention: Callable, tensors: Sequence[Tensor], lengths: dict[str, Tensor], d_out: Tensor, **keywords):
    """Return out, lse and the gradients of (out * d_out).sum() + 0.5 * lse.sum()."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse = attention(*leaves, **lengths, return_lse=True, **keywords)
    grads = torch.autograd.grad((out, lse), leaves, (d_out.to(out.dtype), torch.full_like(lse, 0.5)))
    return out, lse, *grads


def _bounds(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return how far each element of a sequence's (out, lse, dq, dk, dv) may be from float64, before its own rounding.

    Errors of scores, eps of float32 times their size, make an interval for each probability. The errors of the results
    follow from it. An interval is [0, 1] where the errors decide which score is the largest.
    """
    eps, eps32, group, scale = (
        torch.finfo(dtype).eps,
        torch.finfo(torch.float32).eps,
        q.shape[1] // KV_HEADS,
        q.shape[2] ** -0.5,
    )
    q, d_out = q.transpose(0, 1), d_out.transpose(0, 1)
    k, v = (x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))
    scores, dp = q @ k.mT * scale, d_out @ v.mT
    p, log_p = scores.softmax(-1), scores.log_softmax(-1)
    slope, out = (dp - (p * dp).sum(-1, keepdim=True) + 0.5).abs(), (p @ v).abs()  # ds is p * slope
    q, k, v, dp, d_out = (x.abs().nan_to_num(0, 0, 0) for x in (q, k, v, dp, d_out))
    blur = SCORE_ERRORS * eps32 * (q @ k.mT) * scale
    blur = blur + blur.amax(-1, keepdim=True)  # of a score less the largest
    above = torch.minimum((log_p + blur).clamp(max=0).exp() - p, 1 - p)
    below = torch.minimum(p - (log_p - blur).exp(), above.sum(-1, keepdim=True) - above)
    e = torch.maximum(above, below) + ROUNDINGS * eps * p + least(dtype)
    e_out = e @ v
    e_c = (e * dp).sum(-1, keepdim=True) + eps * (d_out * out).sum(-1, keepdim=True)
    e = e + p * blur.amax(-1, keepdim=True).clamp(max=MOST_OF_SUM)  # the backward relies on lse for a sum of 1
    e_ds = (e + eps * p) * slope + (p + e) * (e_c + SCORE_ERRORS * eps32 * (d_out @ v.mT)) + least(dtype)
    dk, dv = (x.unflatten(0, (KV_HEADS, group)).sum(1) for x in (e_ds.mT @ q * scale, e.mT @ d_out))
    e_lse = blur.amax(-1) + (1e-6 if dtype == torch.float32 else 1e-4)  # of 16 bits: approximate exponentials
    return e_out.transpose(0, 1), e_lse, (e_ds @ k).transpose(0, 1) * scale, dk.transpose(0, 1), dv.transpose(0, 1)


def least(dtype: torch.dtype) -> float:
    """Return what may become 0: half of the least number, or denormal numbers where they are treated as 0."""
    return 2.0**-24 if dtype == torch.float16 else LEAST


def check(
    got: Sequence[Tensor], tensors: Sequence[Tensor], lengths: dict[str, Tensor], d_out: Tensor, kinds: Sequence[str]
) -> None:
    """Check that `got`, from `run`, is as near to float64 as scores that are rounded to float32 allow."""
    exact, dtype = [x.double() for x in tensors], tensors[0].dtype
    want = run(reference.varlen_attention, exact, lengths, torch.nan_to_num(d_out))
    starts, starts_k = lengths["cu_seqlens"].tolist(), lengths["cu_seqlens_k"].tolist()
    for n, kind in enumerate(kinds):
        rows, keys = slice(starts[n], starts[n + 1]), slice(starts_k[n], starts_k[n + 1])
        parts = [x[part] for x, part in zip(exact, (rows, keys, keys), strict=True)]
        bounds = _bounds(*parts, d_out[rows].double(), dtype)
        for name, g, w, bound in zip(NAMES, got, want, bounds, strict=True):
            part = keys if name in ("dk", "dv") else rows
            g, w = (x[:, part] if name == "lse" else x[part] for x in (g.detach().cpu().double(), w))
            own = torch.float32 if name == "lse" else dtype
            allowed = bound + torch.finfo(own).eps * (w.abs() + bound) + least(own)
            most = torch.finfo(own).max  # what is larger has become inf
            near = (g.clamp(-most, most) - w.clamp(-most, most)).abs() <= allowed
            right = torch.where(w.isfinite(), near, ~g.isfinite())
            if w.isfinite().all() or not w.isnan().any() or name == "out":
                right &= (w.isnan() == g.isnan()) | (name == "lse")
            if not bool(right.all()):
                at = tuple((~right).nonzero()[0].tolist())
                raise AssertionError(
                    f"{kind}, {name}{list(at)}: {g[at].item()!r}, expected {w[at].item()!r} +- {allowed[at].item():.3g}; "
                    f"{int((~right).sum())} of {right.numel()} are wrong"
                )
    for name, x in zip(NAMES, got, strict=True):
        rest = x.detach().cpu()[..., -REST:] if name == "lse" else x.detach().cpu()[-REST:]
        if not bool((rest == (-torch.inf if name == "lse" else 0)).all()):
            raise AssertionError(f"{name} of rows of no sequence: {rest.flatten()[:4].tolist()} ...")
