"""Rows of logits, or of hidden and a head, with targets and token weights, and what the losses of them are, on any device."""

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


# ------------------------------------------------------------------------------------------------- the linear loss


def make_head(case, dtype, device, generator):
    """Return hidden, head, targets, weights, rows; NaNs surround hidden's rows and fill those without a weight."""
    tokens, width, vocab, share, spread = case
    hidden = torch.full((tokens, width + 8), torch.nan, dtype=dtype)
    hidden[:, :width] = (torch.randn(tokens, width, generator=generator) * spread / width**0.5).to(dtype)
    weight = torch.randn(vocab, width, generator=generator).to(dtype)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    targets[0], targets[-1] = 0, vocab - 1
    masked = torch.rand(tokens, generator=generator) < share
    masked[0] = True
    weights = torch.where(masked, 10 ** (3 * torch.rand(tokens, generator=generator)), 0.0)  # 1 / t at t = 1e-3
    hidden[~masked] = torch.nan
    rows = masked.nonzero().squeeze(-1).int()
    return tuple(t.to(device) for t in (hidden, weight, targets, weights, rows)), width


def head_results(function, hidden, weight, *args, **keywords):
    """Return loss, nll, d_hidden and d_weight on the host."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    loss, nll = function(*leaves, *args, return_nll=True, **keywords)
    return tuple(t.detach().cpu() for t in (loss, nll, *torch.autograd.grad(loss, leaves)))


def plain_head(hidden, weight, *args, **keywords):
    """Compute the loss as a user would write it: logits in the inputs' dtype, their softmax in float32."""
    return reference.masked_cross_entropy((hidden @ weight.T).float(), *args, **keywords)


def expected_head(hidden, weight, targets, weights, normalizer, dtype=None):
    """Return (float64, plain torch) on the host, with zeros for what nobody may read."""
    hidden = torch.where(weights[:, None] != 0, hidden, 0)
    hidden, weight, targets, weights = (t.cpu() for t in (hidden, weight, targets, weights))
    arguments = {"targets": targets, "token_weights": weights, "normalizer": normalizer}
    want = head_results(reference.linear_masked_cross_entropy, hidden.double(), weight.double(), **arguments)
    if dtype is None:
        return want, head_results(plain_head, hidden, weight, **arguments)
    return want, head_results(lambda h, w, **k: plain_head(h.to(dtype), w.to(dtype), **k), hidden, weight, **arguments)


def assert_head_like_plain(got, want, baseline):
    for name, g, w, b in zip(("loss", "nll", "d_hidden", "d_weight"), got, want, baseline, strict=True):
        try:
            assert_close_like(g, w, b)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
