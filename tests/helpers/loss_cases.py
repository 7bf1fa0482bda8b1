"""Rows of logits with targets and token weights, and what the losses of them are, on any device."""

from __future__ import annotations

import torch

from illada.ops import reference
from illada.testing import assert_close_like


def make_rows(case, dtype, device, generator, token_dtype=torch.int64):
    """Logits strided, misaligned, with NaNs around every row and in rows without a weight; targets at both ends."""
    tokens, vocab, share, spread = case
    wide = torch.full((tokens, vocab + 5), torch.nan, dtype=dtype)
    wide[:, 1 : vocab + 1] = (torch.randn(tokens, vocab, generator=generator) * spread).to(dtype)
    targets = torch.randint(vocab, (tokens,), generator=generator).to(token_dtype)
    targets[:1], targets[-1:] = 0, vocab - 1
    masked = torch.rand(tokens, generator=generator) < share
    weights = torch.where(masked, 10 ** (3 * torch.rand(tokens, generator=generator)), 0.0)  # 1 / t at t = 1e-3
    wide[weights == 0] = torch.nan
    return wide.to(device)[:, 1 : vocab + 1], targets.to(device), weights.to(device)


def results_of(function, logits, *args, lse_factor=0.0, **keywords):
    """loss, nll, lse and the gradient of loss + lse_factor * sum(lse^2), on the host."""
    leaf = logits.detach().requires_grad_()
    loss, nll, lse = function(leaf, *args, return_nll=True, return_lse=True, **keywords)
    total = loss + lse_factor * lse.square().sum() if lse_factor else loss
    (grad,) = torch.autograd.grad(total, leaf)
    return tuple(t.detach().cpu() for t in (loss, nll, lse, grad))


def plain_results(logits, targets, weights, **keywords):
    """The same in float64 and in plain torch (in float32, the gradient rounded to the logits' dtype), with zeros in
    place of what nobody may read."""

    def upcast(x, *args, **keywords):
        return reference.masked_cross_entropy(x.float(), *args, **keywords)

    clean = torch.where(weights[:, None] != 0, logits, 0).cpu()
    arguments = (targets.cpu(), weights.cpu())
    want = results_of(reference.masked_cross_entropy, clean.double(), *arguments, **keywords)
    return want, results_of(upcast, clean, *arguments, **keywords)


def assert_like_plain(got, want, baseline):
    for name, g, w, b in zip(("loss", "nll", "lse", "gradient"), got, want, baseline, strict=True):
        try:
            assert_close_like(g.to(b.dtype), w, b)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
