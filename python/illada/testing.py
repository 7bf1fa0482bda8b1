"""Tolerances of the tests.

Errors are against float64, in units of the error that plain torch makes at the same dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from illada.ops.op_types import TokenSample


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return ||got - want|| / ||want|| in float64; positions where `want` is not finite must match exactly."""
    got, want = got.detach().double(), want.detach().double()
    if got.shape != want.shape:
        raise AssertionError(f"shape {list(got.shape)}, expected {list(want.shape)}")
    finite = want.isfinite()
    if not torch.equal(got[~finite].nan_to_num(nan=7.0), want[~finite].nan_to_num(nan=7.0)):
        raise AssertionError("infinities or NaNs differ from the reference")
    if not got[finite].isfinite().all():
        raise AssertionError("not finite where the reference is")
    scale = want[finite].norm()
    return float((got[finite] - want[finite]).norm() / scale) if scale > 0 else float(got[finite].norm())


def assert_close_like(got: Tensor, want: Tensor, baseline: Tensor, *, factor: float = 2.0) -> None:
    """Check that the error of `got` is at most `factor` times that of `baseline`, the formula in plain torch.

    Both are measured against `want`, in float64. An eighth of a rounding step of the dtype, and 1e-6 for float32
    accumulation, are allowed in any case: on a handful of numbers the baseline can be exact by luck.
    """
    if got.dtype != baseline.dtype:
        raise AssertionError(f"dtype {got.dtype}, the baseline has {baseline.dtype}")
    error, allowed = relative_error(got, want), factor * relative_error(baseline, want)
    allowed = max(allowed, torch.finfo(got.dtype).eps / 8, 1e-6)
    if error > allowed:
        raise AssertionError(f"relative error {error:.3g}, allowed {allowed:.3g}")


def plain_sample(logits: Tensor, token: Tensor, measure: str = "probability") -> TokenSample:
    """Return the fields of a TokenSample in plain torch, with a softmax in float32: the baseline of the samplers."""
    logprobs = logits.float().log_softmax(-1)
    probabilities = logprobs.exp()
    logprob = logprobs.gather(-1, token.unsqueeze(-1)).squeeze(-1)
    entropy = -torch.special.xlogy(probabilities, probabilities).sum(-1)
    top2 = probabilities.topk(min(2, logits.shape[-1]), dim=-1).values
    margin = top2[:, 0] - top2[:, 1] if logits.shape[-1] > 1 else top2[:, 0]
    confidence = {"probability": logprob.exp(), "margin": margin, "entropy": -entropy}[measure]
    return TokenSample(token, confidence, logprob, entropy, margin)
