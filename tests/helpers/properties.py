"""What every op but attention has to do with every kind of values (adversarial.py), on any device, against float64.

A call has all kinds at once, a row or two each: rows must not reach into each other either.
"""

from __future__ import annotations

from typing import Any

import torch
from adversarial import KINDS, NO_SOFTMAX, assert_near, values
from torch import Tensor

import illada
from illada.ops import raw, reference
from illada.ops.op_types import RemaskStatus, TokenSample

TEMPERATURES = (0.0, 0.7)
LOSSES = ("plain", "in place", "z-loss", "raw", "shards")
EPS = torch.finfo(torch.float32).eps


def rows_of_all_kinds(vocab: int, dtype: torch.dtype, generator: torch.Generator, each: int = 1) -> tuple[Tensor, Any]:
    """Return (logits with `each` rows of every kind, which of them have no softmax)."""
    logits = torch.cat([values(kind, (each, vocab), dtype, generator) for kind in KINDS])
    broken = torch.tensor([kind in NO_SOFTMAX for kind in KINDS]).repeat_interleave(each)
    return logits, broken


def softmax64(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (x - maximum, log of its sum of exponentials, probabilities) in float64: an offset costs no digits."""
    x = logits.double()
    shifted = x - x.amax(-1, keepdim=True)
    log_sum = shifted.logsumexp(-1, keepdim=True)
    return shifted, log_sum, (shifted - log_sum).exp()


def steps_of(dtype: torch.dtype, want: Tensor) -> Tensor:
    """Return the largest error of a value that is rounded to the dtype."""
    info = torch.finfo(dtype)
    return info.eps * want.abs().nan_to_num(nan=0.0) + info.smallest_normal * info.eps


# -------------------------------------------------------------------------------------------------------------- losses


def check_loss(
    way: str, dtype: torch.dtype, device: torch.device, generator: torch.Generator, vocab: int = 2500
) -> None:
    """Check nll, lse and gradient of each row. Rows without a weight hold NaN."""
    logits, broken = rows_of_all_kinds(vocab, dtype, generator, each=2)
    if way == "shards":  # their lse in float64 has no digits left beside these
        logits[logits.nan_to_num(0, 0, 0).abs().amax(-1) > 1e12] = 0.0
    likeliest = logits.nan_to_num(nan=-torch.inf).argmax(-1)
    targets = torch.randint(vocab, likeliest.shape, generator=generator)
    targets[::2] = likeliest[::2]
    weights = torch.rand(len(logits), generator=generator) + 0.5
    nans = logits.view(torch.int32 if dtype == torch.float32 else torch.int16)
    nans[logits.isnan() & (torch.rand(logits.shape, generator=generator) < 0.5)] = -1  # NaNs of other bits
    unowned = torch.full((3, vocab), torch.nan, dtype=dtype)
    logits, broken = torch.cat([logits, unowned]), torch.cat([broken, torch.zeros(3, dtype=torch.bool)])
    targets, weights = torch.cat([targets, torch.tensor([0, -5, vocab])]), torch.cat([weights, torch.zeros(3)])
    dlse = torch.randn(len(logits), generator=generator) if way == "z-loss" else torch.zeros(len(logits))

    loss, nll, lse, grad = _loss(way, logits.to(device), targets.to(device), weights.to(device), dlse.to(device))

    at = targets.clamp(0, vocab - 1).unsqueeze(-1)
    shifted, log_sum, probabilities = softmax64(logits)
    want_nll = (log_sum - shifted.gather(-1, at)).squeeze(-1)
    want_lse = (
        logits.double().logsumexp(-1).masked_fill(logits.isnan().any(-1) | (logits == torch.inf).any(-1), torch.nan)
    )
    factors, onehot = weights.double() / 7.0, torch.zeros(logits.shape, dtype=torch.float64).scatter(-1, at, 1.0)
    softmax_factors = (factors + dlse.double()).unsqueeze(-1)
    want = softmax_factors * probabilities - factors.unsqueeze(-1) * onehot
    want[-3:], want_nll[-3:], want_lse[-3:] = 0, 0, 0

    assert_near(nll, want_nll.float(), 4e-6 * (1 + want_nll.float().abs()), f"{way}: nll")
    assert_near(lse, want_lse.float(), 4e-6 + EPS * want_lse.abs(), f"{way}: lse")
    # 2^-100 of a probability counts as nothing; the exponent of a small one has few digits behind the point.
    allowed = 2e-5 * softmax_factors.abs() * probabilities + 4e-7 * onehot + 1e-30 + steps_of(dtype, want)
    assert_near(grad, want, allowed.nan_to_num(), f"{way}: gradient")
    assert not torch.isfinite(loss)  # a diverged model must show
    fine = ~broken & want_nll.float().isfinite()
    part = [t[fine].to(device) for t in (logits, targets, weights)]
    want_loss = (want_nll * factors)[fine].sum()
    if want_loss < torch.finfo(torch.float32).max:
        got = illada.masked_cross_entropy(*part, normalizer=7.0)
        assert_near(got, want_loss, 4e-6 * (1 + want_loss.abs()), f"{way}: loss")


def _loss(way: str, logits: Tensor, targets: Tensor, weights: Tensor, dlse: Tensor) -> tuple[Tensor, ...]:
    """Return (loss, nll, lse, gradient), computed by one of LOSSES."""
    if way == "raw":
        nll, lse, lse_parts = (weights.new_empty(len(logits), *columns) for columns in ((), (), (2,)))
        size = raw.masked_cross_entropy_workspace(*logits.shape, logits.device)
        grad = logits.clone()
        raw.masked_cross_entropy(
            *(grad, targets, weights), nll=nll, lse=lse, lse_parts=lse_parts, grad=grad, scale=1 / 7,
            workspace=grad.new_empty(size, dtype=torch.uint8),
        )  # fmt: skip
        return (nll * weights).sum() / 7, nll, lse, grad
    if way == "shards":
        starts = (0, logits.shape[1] // 3)
        parts = logits[:, : starts[1]], logits[:, starts[1] :]
        halves = [
            illada.masked_cross_entropy_shard(x, targets, weights, vocab_start=start)
            for x, start in zip(parts, starts, strict=True)
        ]
        lse = torch.stack([half[0] for half in halves]).logsumexp(0)
        lse = torch.where(weights == 0, 0.0, lse)
        nll = (lse - halves[0][1] - halves[1][1]).float()
        grads = [
            illada.masked_cross_entropy_shard_grad(x, targets, weights, lse, vocab_start=start, normalizer=7.0)
            for x, start in zip(parts, starts, strict=True)
        ]
        return (nll * weights).sum() / 7, nll, lse.float(), torch.cat(grads, dim=-1)
    leaf = logits.clone().requires_grad_()
    loss, nll, lse = illada.masked_cross_entropy(
        leaf * 1 if way == "in place" else leaf, targets, weights, normalizer=7.0, return_nll=True, return_lse=True,
        inplace_backward=way == "in place",
    )  # fmt: skip
    total = loss + (lse * dlse).sum() if way == "z-loss" else loss
    (grad,) = torch.autograd.grad(total, leaf)
    return loss, nll, lse, grad


#: Added to all logits by a column of the head; exact in every dtype, as are its products.
OFFSETS = (0.0, 2.0**13, -(2.0**13), 2.0**20)


def _head(
    vocab: int, offset: float, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (hidden, weight, logits in float64), all exact: halves, and an offset that column 0 adds."""
    hidden = torch.randint(-3, 4, (40, 16), generator=generator) / 2
    weight = torch.randint(-3, 4, (vocab, 16), generator=generator) / 2
    hidden[:, 0], weight[:, 0] = 1.0, offset
    logits = hidden.double() @ weight.double().T
    if dtype == torch.float16 and offset > 2**13:
        weight[:, 0], logits = 2.0**13, logits - offset + 2.0**13
    return hidden.to(device, dtype), weight.to(device, dtype), logits


def check_linear_loss(dtype: torch.dtype, device: torch.device, generator: torch.Generator, vocab: int = 301) -> None:
    """Check the linear loss of logits with a common offset, rows of NaN and inf, and rows without a weight."""
    for offset in OFFSETS:
        hidden, weight, logits = _head(vocab, offset, dtype, device, generator)
        targets = torch.randint(vocab, (len(hidden),), generator=generator)
        token_weights = torch.rand(len(hidden), generator=generator) + 0.5
        token_weights[3], token_weights[4] = 0, 0
        hidden[3], hidden[4] = torch.nan, torch.inf
        hidden.requires_grad_()
        weight.requires_grad_()
        fused = raw.linear_masked_cross_entropy_workspace(hidden, weight) if dtype == torch.bfloat16 else None
        if fused is None:
            logits = logits.to(dtype)
        logits[3:5] = 0
        shifted, log_sum, probabilities = softmax64(logits)
        at, owned = targets.unsqueeze(-1), (token_weights != 0).double()
        want_nll = (log_sum - shifted.gather(-1, at)).squeeze(-1) * owned
        onehot = torch.zeros(logits.shape, dtype=torch.float64).scatter(-1, at, 1.0)
        factors = (token_weights.double() / 7.0).unsqueeze(-1)
        grads = factors * (probabilities - onehot)
        moved, head = hidden.detach().cpu().double().nan_to_num(0, 0, 0), weight.detach().cpu().double()

        loss, nll = illada.linear_masked_cross_entropy(
            hidden, weight, targets.to(device), token_weights.to(device), normalizer=7.0, return_nll=True
        )
        d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))
        eps = 8 * torch.finfo(dtype).eps
        assert_near(nll, want_nll, 4e-6 * (1 + want_nll.abs()), f"offset {offset}: nll")
        assert_near(loss, (want_nll * factors.squeeze(-1)).sum(), 1e-4, f"offset {offset}: loss")
        spread = factors * (probabilities + onehot)  # what the products round
        assert_near(d_hidden, grads @ head, eps * (spread @ head.abs()), f"offset {offset}: hidden's gradient")
        assert_near(
            *(d_weight, grads.T @ moved, eps * (spread.T @ moved.abs()) + 1e-6), f"offset {offset}: weight's gradient"
        )
        for value in (torch.nan, torch.inf):
            broken = hidden.detach().clone()
            broken[7] = value
            total, nll = illada.linear_masked_cross_entropy(
                broken, weight, targets.to(device), token_weights.to(device), return_nll=True
            )
            assert not total.isfinite() and not nll[7].isfinite()
            others = torch.arange(len(nll)) != 7
            assert_near(nll.cpu()[others], want_nll[others], 4e-6 * (1 + want_nll[others].abs()), "nll beside a NaN")


# ------------------------------------------------------------------------------------------------------------ samplers


def _assert_sample(got: TokenSample, logits: Tensor, want_token: Tensor, name: str) -> None:
    """Assert all fields of a sample with entropy and margin, of these logits in float64."""
    shifted, log_sum, probabilities = softmax64(logits)
    broken = ~probabilities.sum(-1).isfinite()
    token = got.token.cpu()
    if not torch.equal(token, want_token):
        row = int((token != want_token).nonzero()[0])
        raise AssertionError(f"{name}: token {int(token[row])} of row {row}, expected {int(want_token[row])}")
    logprob = (shifted - log_sum).gather(-1, token.unsqueeze(-1)).squeeze(-1)
    entropy = -torch.special.xlogy(probabilities, probabilities).sum(-1)
    top = probabilities.topk(2, dim=-1).values
    nothing = {"confidence": -torch.inf, "logprob": -torch.inf, "entropy": torch.nan, "margin": torch.nan}
    want = {"confidence": logprob.exp(), "logprob": logprob, "entropy": entropy, "margin": top[:, 0] - top[:, 1]}
    for field, value in want.items():
        value = value.masked_fill(broken, nothing[field]).float()
        scale = value.abs().nan_to_num(0, 0, 0) + (1.0 if field in ("logprob", "entropy") else 0.0)
        assert_near(getattr(got, field), value, 1e-5 * scale + 1e-7, f"{name}: {field}")


def check_sampler(
    temperature: float, dtype: torch.dtype, device: torch.device, generator: torch.Generator, vocab: int = 2500
) -> None:
    """Check tokens and their measures. If nothing is above -inf, the token is the first id and never committed."""
    keywords = {"temperature": temperature, "seed": 2**40 + 3, "step": -2, "extras": ("entropy", "margin")}
    logits, _ = rows_of_all_kinds(vocab, dtype, generator)
    for part in (logits, logits[:, :5]):  # fewer ids than a vector has
        want = reference.sample_tokens(part.double(), **keywords)
        got = illada.sample_tokens(part.to(device), **keywords)
        _assert_sample(got, part, want.token, f"temperature {temperature}, {part.shape[1]} ids")


def check_linear_sampler(
    temperature: float, dtype: torch.dtype, device: torch.device, generator: torch.Generator, vocab: int = 301
) -> None:
    """Check the fused sampler on logits with a common offset, with -inf for some or all ids, and on rows of NaN."""
    keywords = {"temperature": temperature, "seed": 5, "extras": ("entropy", "margin")}
    rows = torch.tensor([3, 0, 39, 7, 7], dtype=torch.int32)
    for offset in OFFSETS:
        hidden, weight, logits = _head(vocab, offset, dtype, device, generator)
        hidden[39], logits[39] = torch.nan, torch.nan
        if raw.linear_sample_tokens_workspace(hidden, weight, None) is None:
            logits = logits.to(dtype)
        want = reference.sample_tokens(logits[rows.long()].double(), **keywords)
        got = illada.linear_sample_tokens(hidden, weight, rows=rows.to(device), **keywords)
        _assert_sample(got, logits[rows.long()], want.token, f"offset {offset}")
    for first in (vocab // 2, 0):  # from which id on there is nothing but -inf
        hidden, weight, logits = _head(vocab, 0.0, dtype, device, generator)
        weight[first:, 0], logits[:, first:] = -torch.inf, -torch.inf
        if raw.linear_sample_tokens_workspace(hidden, weight, None) is None:
            logits = logits.to(dtype)
        want = reference.sample_tokens(logits.double(), **keywords)
        got = illada.linear_sample_tokens(hidden, weight, **keywords)
        _assert_sample(got, logits, want.token, f"-inf from {first} on")


def check_remask(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    """Check confidences and entropies of every kind, sequences without rows, positions of no sequence."""
    kinds = list(KINDS)
    lengths = [n for i in range(len(kinds)) for n in ((9, 0) if i % 4 == 0 else (9,))]
    confidence = torch.cat([values(kind, (9,), torch.float32, generator) for kind in kinds])
    entropy = torch.cat([values(kind, (9,), torch.float32, generator) for kind in kinds]).abs()
    count = len(confidence)
    tokens = torch.full((2 * count,), 5, dtype=dtype)
    tokens[torch.rand(2 * count, generator=generator) < 0.2] = 9
    rows = torch.randperm(2 * count, generator=generator)[:count].sort().values.int()
    cu_rows = torch.tensor([0, *lengths]).cumsum(0).int()
    sample = TokenSample(torch.arange(100, 100 + count), confidence, confidence, entropy)
    ends = torch.tensor([104, 150])
    moved = TokenSample(*(t.to(device) for t in sample[:4]))
    for rule in ({"quota": 3}, {"threshold": 0.5}, {"factor": 1.5}, {"entropy_bound": 2.0}):
        keywords = {"mask_id": 5, "return_status": True, **rule}
        want_tokens, got_tokens = tokens.clone(), tokens.to(device, copy=True)
        want = reference.remask(want_tokens, rows, cu_rows, sample, end_ids=ends, **keywords)
        got = illada.remask(got_tokens, rows.to(device), cu_rows.to(device), moved, end_ids=ends.to(device), **keywords)
        assert torch.equal(got_tokens.cpu(), want_tokens), rule
        for field, g, w in zip(RemaskStatus._fields, got, want, strict=True):
            assert torch.equal(g.cpu(), w), (rule, field)
