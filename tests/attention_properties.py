"""Attention on values that break kernels, for the tests of every device: what is expected, and how near.

A pack has a sequence for each kind of `adversarial`, and rows of no sequence at its end, which hold NaN. The kind is a
rule for a row of scores: it stands in one column of the keys, against a column of the queries that is 1 in every other
head and 2^13 in the rest, so that scores reach far beyond what the dtype holds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from adversarial import values
from torch import Tensor

from illada.ops import reference

HEADS, KV_HEADS, REST = 4, 2, 9
LARGE = 2.0**13
MOST = 2.0**90  # of a key: products of scores and gradients stay within float32
NAMES = ("out", "lse", "dq", "dk", "dv")


def make(
    kinds: Sequence[str], queries: int, keys: int, dim: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[list[Tensor], dict[str, Tensor], Tensor]:
    """(q, k, v), their lengths, and the gradient of out."""
    sizes = [(queries * len(kinds) + REST, HEADS), *[(keys * len(kinds) + REST, KV_HEADS)] * 2]
    q, k, v = (0.5 * torch.randn(*size, dim, generator=generator) for size in sizes)
    q[:, ::2, 0], q[:, 1::2, 0] = 1, LARGE
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


def run(attention: Callable, tensors: Sequence[Tensor], lengths: dict[str, Tensor], d_out: Tensor, **keywords):
    """out, lse and the gradients of (out * d_out).sum() + 0.5 * lse.sum()."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse = attention(*leaves, **lengths, return_lse=True, **keywords)
    grads = torch.autograd.grad((out, lse), leaves, (d_out.to(out.dtype), torch.full_like(lse, 0.5)))
    return out, lse, *grads


def check(
    got: Sequence[Tensor],
    tensors: Sequence[Tensor],
    lengths: dict[str, Tensor],
    d_out: Tensor,
    kinds: Sequence[str],
    without_keys: Collection[str] = (),
) -> None:
    """`got`, from `run`, is near float64: as near as scores that are rounded to float32 allow.

    The gradients of keys and values of the kinds `without_keys` are not looked at.
    """
    exact = [x.double() for x in tensors]
    want = run(reference.varlen_attention, exact, lengths, torch.nan_to_num(d_out))
    eps, scale = torch.finfo(tensors[0].dtype).eps, tensors[0].shape[2] ** -0.5
    group = HEADS // KV_HEADS
    starts, starts_k = lengths["cu_seqlens"].tolist(), lengths["cu_seqlens_k"].tolist()
    for n, kind in enumerate(kinds):
        rows, keys = slice(starts[n], starts[n + 1]), slice(starts_k[n], starts_k[n + 1])
        q, k, v = (x[part].abs().nan_to_num(0, 0, 0) for x, part in zip(exact, (rows, keys, keys), strict=True))
        k_of_heads, v_most = k.repeat_interleave(group, dim=1), v.amax()
        size = torch.einsum("ihd,jhd->ihj", q, k_of_heads).amax(-1) * scale  # of the scores, [rows, H]
        blur = 16 * torch.finfo(torch.float32).eps * size  # of their logarithms
        error = (4 * eps + 2 * blur.clamp(max=1)).unsqueeze(-1)  # of probabilities
        per_row = d_out[rows].double().abs().sum(-1) * v_most + 1  # of ds, over its probability
        per_score = (error.squeeze(-1) * per_row).sum(0).amax()
        tolerances = (
            error * v_most,
            (blur + 1e-4).T,  # exponentials of 16-bit kernels
            error * per_row.unsqueeze(-1) * k.amax() * scale * len(k) + eps,
            2 * per_score * q.amax() * scale + eps,
            2 * (error * d_out[rows].double().abs()).sum(0).amax() + eps,
        )
        for name, g, w, tolerance in zip(NAMES, got, want, tolerances, strict=True):
            part = keys if name in ("dk", "dv") else rows
            if part is keys and kind in without_keys:
                continue
            g, w = (x[:, part] if name == "lse" else x[part] for x in (g.detach().cpu().double(), w))
            allowed = torch.as_tensor(tolerance).expand_as(w)
            right = torch.where(w.isfinite(), (g - w).abs() <= allowed, ~g.isfinite())
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
