"""Rows of logits for sample_tokens, hidden and a head for linear_sample_tokens, and both ops beside their specification, on
any device."""

from __future__ import annotations

import numpy as np
import torch
from sample_filters import to_host

import illada
from illada.ops import reference
from illada.ops.op_types import TokenSample
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


# ------------------------------------------------------------------------------------------ linear_sample_tokens


def make_head(case, dtype, device, generator):
    """Return hidden and weight, strided with NaNs around every row, and rows in any order."""
    total, count, width, vocab = case

    def strided(rows, scale):
        wide = torch.full((rows + 2, width + 24), torch.nan, dtype=dtype)
        wide[1:-1, 8 : width + 8] = (torch.randn(rows, width, generator=generator) * scale).to(dtype)
        return wide.to(device)[1:-1, 8 : width + 8]

    rows = None if count is None else torch.randint(total, (count,), generator=generator, dtype=torch.int32).to(device)
    return strided(total, 3.0 / width**0.5), strided(vocab, 1.0), rows


def exact_sample(logits, token):
    """The fields of a TokenSample, in the precision of the logits."""
    logprobs = logits.log_softmax(-1)
    logprob, p = logprobs.gather(1, token[:, None])[:, 0], logprobs.exp()
    top2 = p.topk(min(2, p.shape[1]), dim=-1).values
    margin = top2[:, 0] - top2[:, 1] if p.shape[1] > 1 else top2[:, 0]
    return TokenSample(token, logprob.exp(), logprob, -torch.special.xlogy(p, p).sum(-1), margin)


def check_linear(hidden, weight, rows, **keywords):
    """The token's noisy logit is the largest within the rounding of 16-bit logits; the measures are as of plain torch."""
    got = illada.linear_sample_tokens(hidden, weight, rows=rows, **keywords)
    selected = hidden if rows is None else hidden[rows.long()]
    exact = selected.cpu().double() @ weight.cpu().double().T
    plain = (selected @ weight.T).cpu()
    if (bias := keywords.get("logit_bias")) is not None:
        ids, values = (t.cpu().expand(len(exact), t.shape[-1]) for t in bias)
        used = torch.where(ids < 0, 0.0, values)
        exact = exact.scatter_add(1, ids.clamp(min=0).long(), used.double())
        plain = plain.float().scatter_add(1, ids.clamp(min=0).long(), used)
    count, vocab = exact.shape
    noisy = exact.clone()
    numbers = [keywords.get(name, default) for name, default in (("temperature", 0.0), ("seed", 0), ("step", 0))]
    row_ids = keywords.get("row_ids")
    per_row = [torch.as_tensor(a).cpu().expand(count).tolist() for a in numbers]
    per_row.append((torch.arange(count) if row_ids is None else row_ids.cpu()).tolist())
    for n, (temperature, seed, step, row_id) in enumerate(zip(*per_row, strict=True)):
        if temperature > 0:
            noisy[n] -= temperature * torch.from_numpy(
                np.log(-np.log1p(-reference.uniform64(seed, row_id, step, vocab)))
            )
    token = got.token.cpu()
    assert token.dtype == torch.int64 and ((token >= 0) & (token < vocab)).all()
    chosen = noisy.gather(1, token[:, None])[:, 0]
    rounding = torch.finfo(hidden.dtype).eps * exact.abs().nan_to_num(posinf=0.0).amax(1)
    assert (chosen >= noisy.amax(1) - rounding).all()

    want, baseline = exact_sample(exact, token), plain_sample(plain, token)
    of = {"probability": "confidence", "margin": "margin", "entropy": "entropy"}[keywords.get("measure", "probability")]
    sign = -1.0 if of == "entropy" else 1.0
    assert_close_like(sign * got.confidence.cpu(), getattr(want, of), getattr(baseline, of), factor=2.0)
    for name in ("logprob", *keywords.get("extras", ())):
        assert_close_like(getattr(got, name).cpu(), getattr(want, name), getattr(baseline, name), factor=2.0)
