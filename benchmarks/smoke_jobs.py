"""Small jobs that together launch every kernel, each checked against float64 on the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import illada
from illada.ops import raw, reference
from illada.ops.attention import recompute_scores_for_dq
from illada.ops.variants import use_variants
from illada.testing import relative_error

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROW_TOLERANCE = {BF16: 2**-6, FP16: 2**-9}  # of the worst row of a 16-bit tensor: 4 roundings
NORM_TOLERANCE = {BF16: 2**-6, FP16: 2**-9, FP32: 2**-14}  # of the norm of all
FP32_TOLERANCE = 1e-4  # of results in float32 from sums of many terms

Checks = dict[str, tuple[float, float]]  # what: (error, allowed)


@dataclass(frozen=True)
class Job:
    """A job that launches kernels and compares their results.

    kernels: what it launches on compute capability 9.0, named as in csrc without "illada_"; portable: on others. Empty:
    the job is not for such a GPU.
    """

    name: str
    kind: str  # as in `choices`
    run: Callable[[torch.device], Checks]
    kernels: tuple[str, ...]
    portable: tuple[str, ...] = ()
    dim: int | None = None


def random(seed: int = 0) -> torch.Generator:
    """Return a generator of the host, which gives the same numbers wherever the job runs."""
    return torch.Generator().manual_seed(seed)


def row_error(got: Tensor, want: Tensor) -> float:
    """Return the largest error of a row.

    The error of a row is |got - want| / max(|want|, root mean square of |want|).
    """
    got, want = got.detach().cpu().double(), want.double()
    size = want.norm(dim=-1)
    least = size.square().mean().sqrt().clamp(min=1e-30)
    return float(((got - want).norm(dim=-1) / size.clamp(min=least)).max())


def norm_error(got: Tensor, want: Tensor) -> float:
    """Return the relative error of all numbers together.

    It is inf where a number is not finite that should be.
    """
    try:
        return relative_error(got.cpu(), want)
    except AssertionError:
        return math.inf


# ------------------------------------------------------------------------------------------------------------ attention


@dataclass(frozen=True)
class Pack:
    """Sequences for attention.

    keys: of each sequence, where they are not its queries' tokens.
    """

    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    keys: tuple[int, ...] | None = None


PLAIN = Pack((20,) * 64, 16, 8)  # many short sequences: nothing split, nothing shared
PAIRS = Pack((240,), 128, 32)  # tiles enough for clusters of two CTAs
SPLIT = Pack((32, 7), 8, 2, keys=(1500, 129))  # few queries, many keys
LONG = Pack((300, 290), 32, 16)  # a tile of keys a CTA
FEW = Pack((300, 290), 8, 2)  # tiles of keys shared by several CTAs
SHORT = Pack((100, 0, 64, 129), 8, 2)  # short: the scores are recomputed for dq


def pack_tensors(pack: Pack, dim: int, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    """Return q, k, v and the gradient of out in a list, and the lengths."""
    total_q, total_k = sum(pack.lengths), sum(pack.keys or pack.lengths)
    generator = random()
    shapes = [(total_q, pack.heads), (total_k, pack.kv_heads), (total_k, pack.kv_heads), (total_q, pack.heads)]
    tensors = [torch.randn(*shape, dim, generator=generator).to(dtype) for shape in shapes]
    lengths = {"cu_seqlens": torch.tensor([0, *pack.lengths]).cumsum(0).int()}
    if pack.keys:
        lengths["cu_seqlens_k"] = torch.tensor([0, *pack.keys]).cumsum(0).int()
    return tensors, lengths


def plan_of(device: torch.device) -> Checks:
    """Check the plan's sequences, which stand at its end, longest first."""
    lengths = [40, 0, 300, 129]
    cumulative = torch.tensor([0, *lengths]).cumsum(0).int()
    plan = illada.attention_plan(
        cumulative.to(device), num_heads=8, num_kv_heads=2, head_dim=128, total_q=sum(lengths)
    ).work.cpu()
    ends = cumulative.tolist()
    want = sorted(([ends[i], ends[i + 1]] * 2 for i in range(4)), key=lambda row: row[0] - row[1])
    return {"sequences": (float(plan[-4:].tolist() != want), 0.0)}


def attention_forward(device: torch.device, pack: Pack, dim: int, dtype: torch.dtype) -> Checks:
    """Check out and lse."""
    (*qkv, _), lengths = pack_tensors(pack, dim, dtype)
    want, want_lse = reference.varlen_attention(*(x.double() for x in qkv), **lengths, return_lse=True)
    on_device: dict[str, Any] = {name: x.to(device) for name, x in lengths.items()}
    out, lse = illada.varlen_attention(*(x.to(device) for x in qkv), **on_device, return_lse=True)
    return {
        "out": (row_error(out, want), ROW_TOLERANCE[dtype]),
        "lse": (float((lse.cpu().double() - want_lse).abs().max()), 0.01),
    }


def attention_backward(
    device: torch.device, pack: Pack, dim: int, dtype: torch.dtype, deterministic: bool = False
) -> Checks:
    """Check the gradients from the reference's out and lse.

    So the forward kernel has no part in them.
    """
    (*qkv, dout), lengths = pack_tensors(pack, dim, dtype)
    leaves = [x.double().requires_grad_() for x in qkv]
    out, lse = reference.varlen_attention(*leaves, **lengths, return_lse=True)
    want = torch.autograd.grad(out, leaves, dout.double())
    q, k, v, dout, out, lse = (x.detach().to(device) for x in (*qkv, dout, out.to(dtype), lse.float()))
    plan = illada.attention_plan(
        lengths["cu_seqlens"].to(device), num_heads=pack.heads, num_kv_heads=pack.kv_heads, head_dim=dim, total_q=len(q)
    ).work
    sequences, recompute = len(pack.lengths), recompute_scores_for_dq(len(q), len(pack.lengths))
    shape = (len(q), len(k), sequences, pack.heads, pack.kv_heads, dim)
    size = raw.varlen_attention_backward_workspace(*shape, deterministic, recompute, device.index or 0)
    got = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    raw.varlen_attention_backward(
        *(*got, dout, None, q, k, v, out, lse.contiguous(), plan, sequences, dim**-0.5),
        workspace=torch.empty(size, dtype=torch.uint8, device=device),
        deterministic=deterministic,
        recompute_scores_for_dq=recompute,
    )
    names = ("dq", "dk", "dv")
    return {n: (row_error(g, w), ROW_TOLERANCE[dtype]) for n, g, w in zip(names, got, want, strict=True)}


# ----------------------------------------------------------------------------------------------------------------- loss


def loss_inputs(rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Return targets and token_weights; each fourth token has no weight."""
    generator = random(1)
    targets = torch.randint(vocab, (rows,), generator=generator)
    weights = 1 + torch.rand(rows, generator=generator)
    weights[3::4] = 0
    return targets, weights


def masked_cross_entropy(device: torch.device, dtype: torch.dtype, at_once: bool = False) -> Checks:
    """Check nll and the gradient, made by two kernels or in place by one."""
    rows, vocab = 6, 20000
    logits = (3 * torch.randn(rows, vocab, generator=random())).to(dtype)
    targets, weights = loss_inputs(rows, vocab)
    leaf = logits.double().requires_grad_()
    loss, nll = reference.masked_cross_entropy(leaf, targets, weights, return_nll=True)
    (want,) = torch.autograd.grad(loss, leaf)
    mine, targets, weights = logits.to(device), targets.to(device), weights.to(device)
    size = raw.masked_cross_entropy_workspace(rows, vocab, device)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    got_nll, lse = (torch.full((rows, *columns), torch.nan, device=device) for columns in ((), (2,)))
    arguments: dict[str, Any] = {"nll": got_nll, "lse_parts": lse, "workspace": workspace}
    if at_once:
        grad = mine
        raw.masked_cross_entropy(mine, targets, weights, grad=grad, **arguments)
    else:
        grad = torch.full_like(mine, torch.nan)
        raw.masked_cross_entropy(mine, targets, weights, **arguments)
        raw.masked_cross_entropy_backward(grad, mine, targets, weights, lse)
    return {
        "nll": (norm_error(got_nll, nll), FP32_TOLERANCE),
        "gradient": (norm_error(grad, want), NORM_TOLERANCE[dtype]),
    }


def weighted_sum(device: torch.device) -> Checks:
    """Check the sum of all tokens' losses."""
    nll, (_, weights) = torch.rand(5000, generator=random()), loss_inputs(5000, 2)
    loss = torch.full((), torch.nan, device=device)
    raw.weighted_sum(loss, nll.to(device), weights.to(device), normalizer=torch.tensor(7.0, device=device))
    return {"loss": (norm_error(loss, nll.double().dot(weights.double()) / 7), 1e-6)}


def scale(device: torch.device, dtype: torch.dtype) -> Checks:
    """Check a gradient times a number on the device."""
    data = torch.randn(5003, generator=random()).to(dtype)
    got = data.to(device)
    raw.scale(got, torch.tensor(0.5, device=device))
    return {"data": (norm_error(got, data.double() / 2), 0.0)}


def linear_loss(
    device: torch.device, rows: int = 300, width: int = 264, vocab: int = 4096, *, spread: float = 3.0,
    gradients: bool = True, given_rows: bool = False, **options: Any,
) -> Checks:  # fmt: skip
    """Check the loss, nll and both gradients.

    Where filter_eps is given, the gradients may miss as much as its bound.
    """
    generator = random(2)
    hidden = (spread * width**-0.5 * torch.randn(rows, width, generator=generator)).to(BF16)
    weight = torch.randn(vocab, width, generator=generator).to(BF16)
    targets, weights = loss_inputs(rows, vocab)
    leaves = [x.double().requires_grad_() for x in (hidden, weight)]
    loss, nll = reference.linear_masked_cross_entropy(
        leaves[0], leaves[1], targets, weights, normalizer=12.5, return_nll=True
    )
    want = torch.autograd.grad(loss, leaves)
    mine = [x.to(device).requires_grad_(gradients) for x in (hidden, weight)]
    if given_rows:
        options["rows"] = weights.nonzero().squeeze(-1).int().to(device)
    got_loss, got_nll = illada.linear_masked_cross_entropy(
        mine[0], mine[1], targets.to(device), weights.to(device), normalizer=12.5, return_nll=True, **options
    )
    checks = {
        "loss": (norm_error(got_loss, loss.detach()), FP32_TOLERANCE),
        "nll": (norm_error(got_nll, nll), FP32_TOLERANCE),
    }
    if not gradients:
        return checks
    got = torch.autograd.grad(got_loss, mine)
    if eps := options.get("filter_eps", 0.0):
        factors = weights.double() / 12.5
        bounds = [
            factors[:, None] * (eps * weight.double().abs().sum(0)),
            eps * (factors @ hidden.double().abs()).expand(vocab, -1),
        ]
        for name, g, w, bound in zip(("dX", "dW"), got, want, bounds, strict=True):
            over = ((g.cpu().double() - w).abs() - bound).clamp(min=0)
            checks[f"{name} beyond the bound"] = (float(over.norm() / w.norm()), NORM_TOLERANCE[BF16])
    else:
        for name, g, w in zip(("dX", "dW"), got, want, strict=True):
            checks[name] = (norm_error(g, w), NORM_TOLERANCE[BF16])
    return checks


# --------------------------------------------------------------------------------------------------- sample and remask


def sample_tokens(
    device: torch.device,
    rows: int,
    vocab: int,
    dtype: torch.dtype,
    temperature: float,
    extras: bool = False,
    **filters: Any,
) -> Checks:
    """Check tokens exactly, noise included, and the measures. filters: top_k, top_p."""
    logits = (2 * torch.randn(rows, vocab, generator=random())).to(dtype)
    extra = ("entropy", "margin") if extras else ()
    keywords = {"temperature": temperature, "seed": 2**33 + 1, "extras": extra, **filters}
    want = reference.sample_tokens(logits, **keywords)
    got = illada.sample_tokens(logits.to(device), **keywords)
    checks = {"token": (float((got.token.cpu() != want.token).sum()), 0.0)}
    for name in ("confidence", "logprob", *extra):
        checks[name] = (norm_error(getattr(got, name), getattr(want, name)), FP32_TOLERANCE)
    return checks


def linear_sample_tokens(
    device: torch.device, rows: int, dtype: torch.dtype, temperature: float, given_rows: bool = False
) -> Checks:
    """Check tokens and confidences of the fused head.

    A token's noisy logit must be the largest within the rounding of 16-bit logits.
    """
    width, vocab, seed, generator = 72, 5000, 3, random()
    hidden = (3 * width**-0.5 * torch.randn(2 * rows if given_rows else rows, width, generator=generator)).to(dtype)
    weight = torch.randn(vocab, width, generator=generator).to(dtype)
    index = torch.randperm(len(hidden), generator=generator)[:rows].int() if given_rows else None
    exact = (hidden if index is None else hidden[index.long()]).double() @ weight.double().T
    more: dict[str, Any] = {} if index is None else {"rows": index.to(device)}
    got = illada.linear_sample_tokens(hidden.to(device), weight.to(device), temperature=temperature, seed=seed, **more)
    token = got.token.cpu()
    noisy = exact.clone()
    for n in range(rows if temperature else 0):
        uniform = reference.uniform64(seed, n, 0, vocab)
        noisy[n] -= temperature * torch.from_numpy(np.log(-np.log1p(-uniform)))
    missed = noisy.amax(1) - noisy.gather(1, token[:, None]).squeeze(1)
    rounding = torch.finfo(dtype).eps * exact.abs().amax(1)
    want = exact.softmax(-1).gather(1, token[:, None]).squeeze(1)
    return {
        "token": (float((missed / rounding).max()), 1.0),
        "confidence": (norm_error(got.confidence, want), NORM_TOLERANCE[dtype]),
    }


def linear_loss_by_mm(device: torch.device) -> Checks:
    """Check the linear loss with the products of the gradients by torch.mm."""
    with use_variants(loss_gradients="mm"):
        return linear_loss(device)


LIMITS = {"quota": 3, "threshold": 0.9, "factor": 0.5, "entropy_bound": 0.7}


def remask(device: torch.device, rows: int, rule: str) -> Checks:
    """Check the canvas and the counts exactly.

    There are one sequence of `rows` candidates, and a short one.
    """
    lengths, mask_id, generator = (rows, 9), 5, random()
    total = sum(lengths)
    confidence = torch.rand(total, generator=generator)
    token = torch.randint(10, 99, (total,), generator=generator)
    sample = illada.TokenSample(token, confidence, confidence.log(), 0.01 + torch.rand(total, generator=generator))
    canvas, positions = torch.full((total,), mask_id), torch.arange(total, dtype=torch.int32)
    cu_rows = torch.tensor([0, *lengths]).cumsum(0).int()
    keywords: dict[str, Any] = {rule: LIMITS[rule], "mask_id": mask_id}
    want_canvas, got_canvas = canvas.clone(), canvas.to(device)
    want = reference.remask(want_canvas, positions, cu_rows, sample, **keywords)
    fields: dict[str, Any] = {name: x if x is None else x.to(device) for name, x in sample._asdict().items()}
    on_device = illada.TokenSample(**fields)
    got = illada.remask(got_canvas, positions.to(device), cu_rows.to(device), on_device, **keywords)
    return {
        "tokens": (float((got_canvas.cpu() != want_canvas).sum()), 0.0),
        "committed": (float(torch.as_tensor(got.cpu() != want).sum()), 0.0),
    }


# ----------------------------------------------------------------------------------------------------------------- list


def jobs() -> list[Job]:
    """Return all jobs, first those whose answer matters most."""
    found: list[Job] = []

    def add(name: str, kind: str, run: Callable[[torch.device], Checks], kernels: str, portable: str = "",
            dim: int | None = None) -> None:  # fmt: skip
        found.append(Job(name, kind, run, tuple(kernels.split()), tuple((portable or kernels).split()), dim))

    names = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
    rows_kernel = "attention_plan_sm80 attention_backward_preprocess_sm80"
    keys_sm90, queries_sm90 = "attention_backward_keys_sm90", "attention_backward_queries_sm90"
    sm80 = f"{rows_kernel} attention_backward_keys_sm80 attention_backward_queries_sm80"
    for dtype in (BF16, FP16):
        for dim in (128, 64):
            what = f"D{dim} {names[dtype]}"
            for text, pack in (("", PLAIN), (" in clusters", PAIRS), (" split over keys", SPLIT)):
                more = " attention_combine_sm80" if pack is SPLIT else ""
                add(f"attention forward {what}{text}", "attention_forward",
                    partial(attention_forward, pack=pack, dim=dim, dtype=dtype),
                    f"attention_plan_sm80 attention_forward_sm90{more}",
                    f"attention_plan_sm80 attention_forward_sm80{more}", dim)  # fmt: skip
            for text, pack, deterministic, kernels in (
                (" summed", LONG, False, keys_sm90),
                (" in order", LONG, True, keys_sm90),
                (" recompute", SHORT, False, f"{keys_sm90} {queries_sm90}"),
                (" tiles shared", FEW, False, f"{keys_sm90} attention_backward_finish_sm80"),
                (" in order, tiles shared", FEW, True, f"{keys_sm90} attention_backward_finish_sm80"),
            ):
                run = partial(attention_backward, pack=pack, dim=dim, dtype=dtype, deterministic=deterministic)
                add(
                    f"attention backward {what}{text}", "attention_backward", run, f"{rows_kernel} {kernels}", sm80, dim
                )
    add("attention plan", "attention_forward", plan_of, "attention_plan_sm80")

    ce, linear = "masked_cross_entropy", "linear_masked_cross_entropy"
    logits = f"{linear}_select {linear}_gather {linear}_logits_sm90 {linear}_statistics {ce}_sum_sm80"
    fused = f"{logits} {linear}_hidden_grad_sm90 {linear}_scatter {linear}_weight_grad_sm90 {ce}_scale_sm80"
    portable = f"{ce}_forward_sm80 {ce}_backward_sm80 {ce}_sum_sm80 {ce}_scale_sm80"
    for text, options, kernels in (
        ("", {}, fused),
        (" without gradients", {"gradients": False}, logits),
        (" in chunks", {"rows": 600, "width": 64, "vocab": 700, "chunk_rows": 256}, fused),
        (" of given rows", {"given_rows": True}, fused.replace(f"{linear}_select ", "")),
        (" filtered", {"filter_eps": 2**-12}, fused),
        (" far from its references", {"width": 64, "vocab": 777, "spread": 300.0}, fused),
    ):
        without = f"{ce}_forward_sm80 {ce}_sum_sm80" if "without" in text else portable
        add(f"linear loss{text}", "linear_loss", partial(linear_loss, **options), kernels, without)
    add("linear loss by torch.mm", "linear_loss", linear_loss_by_mm,
        f"{logits} {linear}_clear {linear}_scatter {ce}_scale_sm80", portable)  # fmt: skip
    for dtype in (BF16, FP16, FP32):
        add(f"cross-entropy {names[dtype]}", "loss", partial(masked_cross_entropy, dtype=dtype),
            f"{ce}_forward_sm80 {ce}_combine_sm80 {ce}_backward_sm80")  # fmt: skip
        add(f"cross-entropy {names[dtype]} at once", "loss", partial(masked_cross_entropy, dtype=dtype, at_once=True),
            f"{ce}_fused_sm80", f"{ce}_forward_sm80 {ce}_combine_sm80 {ce}_backward_sm80")  # fmt: skip
        add(f"scale {names[dtype]}", "loss", partial(scale, dtype=dtype), f"{ce}_scale_sm80")
    add("weighted sum", "loss", weighted_sum, f"{ce}_sum_sm80")

    for temperature in (0.0, 1.0):
        for dtype in (BF16, FP16, FP32):
            what = f"{names[dtype]} T={temperature:g}"
            add(f"sample_tokens {what}", "sample_tokens",
                partial(sample_tokens, rows=5, vocab=8000, dtype=dtype, temperature=temperature),
                "sample_tokens_sm80")  # fmt: skip
            add(f"sample_tokens {what} of split rows", "sample_tokens",
                partial(sample_tokens, rows=3, vocab=70000, dtype=dtype, temperature=temperature, extras=True),
                "sample_tokens_sm80 sample_tokens_combine_sm80")  # fmt: skip
            if temperature:
                add(f"sample_tokens {what} of the likeliest", "sample_tokens",
                    partial(sample_tokens, rows=5, vocab=8000, dtype=dtype, temperature=temperature, top_k=50,
                            top_p=0.9),
                    "sample_filters_sm80 sample_tokens_sm80")  # fmt: skip
        for dtype in (BF16, FP16):
            for text, rows, given in (("", 40, False), (" in clusters", 200, False), (" of given rows", 40, True)):
                add(f"linear_sample_tokens {names[dtype]} T={temperature:g}{text}", "linear_sample_tokens",
                    partial(linear_sample_tokens, rows=rows, dtype=dtype, temperature=temperature, given_rows=given),
                    ("gather_rows_sm90 " if given else "clear_bounds_sm90 " if temperature else "")
                    + "linear_sample_tokens_sm90 sample_tokens_combine_sm80",
                    "sample_tokens_sm80")  # fmt: skip
    for rule in LIMITS:
        for rows in (300, 3000):
            add(f"remask {rule} of {rows}", "remask", partial(remask, rows=rows, rule=rule), "remask_sm80")
    return found
