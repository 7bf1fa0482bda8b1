"""Rows of logits for sample_tokens, and the op beside its specification, on any device."""

from __future__ import annotations

import torch
from sample_filters import to_host

import illada
from illada.ops import reference
from illada.testing import assert_close_like, plain_sample

ALL = ("entropy", "margin")


def make_rows(case, dtype, device, generator, layout="strided"):
    """Logits in the layout: packed, strided and misaligned with NaNs around every row, or one row for all."""
    count, vocab, spread = case
    values = (torch.randn(count, vocab, generator=generator) * spread).to(dtype)
    if layout == "packed":
        return values.to(device)
    if layout == "expanded":
        return values[:1].to(device).expand(count, vocab)
    wide = torch.full((count, vocab + 5), torch.nan, dtype=dtype)
    wide[:, 1 : vocab + 1] = values
    return wide.to(device)[:, 1 : vocab + 1]


def on(device, *tensors):
    return [t.to(device) for t in tensors]


def both(logits, **keywords):
    """The op and the reference on the same arguments, results on the host."""
    host = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
    if "logit_bias" in host:
        host["logit_bias"] = tuple(t.cpu() for t in host["logit_bias"])
    return to_host(illada.sample_tokens(logits, **keywords)), reference.sample_tokens(logits.cpu(), **host)


def assert_same(got, want, logits):
    assert got.token.dtype == torch.int64 and torch.equal(got.token, want.token)
    baseline = to_host(plain_sample(logits, want.token.to(logits.device)))
    for name, g, w, b in zip(got._fields[1:], got[1:], want[1:], baseline[1:], strict=True):
        assert (g is None) == (w is None), name
        if g is not None:
            assert_close_like(g, w, b, factor=2.0)
