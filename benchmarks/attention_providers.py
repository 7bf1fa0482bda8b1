"""The providers of attention on packed sequences: illada, and its peers as their users call them.

    illada                   the public op with its plan
    illada raw               the kernels alone, into buffers that are there
    illada deterministic     the op with gradients that are bitwise repeatable; where there are gradients

Peers get for nothing what depends on the lengths alone (masks, host-side lengths), as illada gets its plan, and use
grouped-query attention (GQA) natively unless it says otherwise here:

    sdpa flash, sdpa cudnn   torch's dense kernels: one call where all sequences are equally long, else one for each
                             and a concatenation; sdpa flash is what illada runs on a CPU
    sdpa padded              a padded batch under a mask, as transformers runs it: keys and values repeated for GQA
                             where there is a mask; the padding itself is not timed
    varlen_attn              torch.nn.attention.varlen (FlashAttention 2); keys of slots are packed before, not timed
    cudnn varlen             torch's private _cudnn_attention_forward with cu_seqlens; keys of slots as above
    flex                     flex_attention, compiled, with a block mask of documents
    fa3, fa4                 the packages fa3-fwd (forward only) and flash-attn-4, where they are installed
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import illada
from illada.ops import raw
from illada.ops.attention import recompute_scores_for_dq

from .runner import compiled, generator
from .timing import CPU

GEMMS = {"fwd": 2, "bwd": 5, "fwdbwd": 7}  # matrix products over all query-key pairs


@dataclass(frozen=True)
class Pack:
    """Sequences of `lengths` queries; their keys are the same tokens, or `used` of each slot of `slot` keys."""

    name: str
    lengths: tuple[int, ...]
    used: tuple[int, ...] | None = None
    slot: int = 0

    @property
    def keys(self) -> tuple[int, ...]:
        """The number of keys of each sequence."""
        return self.lengths if self.used is None else self.used

    @property
    def pairs(self) -> int:
        """The number of query-key pairs of one head."""
        return sum(q * k for q, k in zip(self.lengths, self.keys, strict=True))


def equal(count: int, length: int) -> Pack:
    """Return a pack of `count` sequences of the same `length`."""
    return Pack(f"{count}x{length}", (length,) * count)


def listed(*lengths: int) -> Pack:
    """Return a pack of sequences of these lengths, which its name lists."""
    return Pack("+".join(map(str, lengths)), lengths)


def given(lengths: Sequence[int]) -> Pack:
    """Return a pack of sequences of any lengths.

    More than eight unequal ones are named by their number and the range of their lengths.
    """
    if len(set(lengths)) == 1:
        return equal(len(lengths), lengths[0])
    if len(lengths) <= 8:
        return listed(*lengths)
    return Pack(f"{len(lengths)} of {min(lengths)} to {max(lengths)}, {sum(lengths)} tokens", tuple(lengths))


def ragged(total: int) -> Pack:
    """Return a pack of `total` tokens in sequences of log-normal lengths, the same in every run.

    No drawn length is a multiple of 128.
    """
    random = np.random.default_rng(0)
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        length = min(int(random.lognormal(math.log(total / 48), 1.0)) + 1, total // 4)
        length += length % 128 == 0
        lengths.append(left if left - length < 8 else length)  # no sequence below 8 tokens at the end
    return Pack(f"ragged {total}", tuple(lengths))


def cached(count: int, length: int, least: int, slot: int) -> Pack:
    """Return a pack of `count` blocks of `length` queries against cache slots of `slot` keys.

    Of a slot's keys, `least` to `slot` are used.
    """
    used = tuple(round(x) for x in np.linspace(least, slot, count)) if count > 1 else (slot,)
    return Pack(f"cached {count}x{length}", (length,) * count, used, slot)


@dataclass(frozen=True)
class Job:
    """A pack and what attends to it: q [T, H, D], k and v [Tk, G, D]."""

    pack: Pack
    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype = torch.bfloat16
    device: torch.device = CPU

    @property
    def name(self) -> str:
        """The job's part of the names of cases."""
        return f"{self.pack.name} {self.heads}/{self.kv_heads} D{self.dim}"

    @property
    def total_q(self) -> int:
        """The number T of queries."""
        return sum(self.pack.lengths)

    @property
    def total_k(self) -> int:
        """The number Tk of keys, with the unused ones in slots."""
        return self.pack.slot * len(self.pack.lengths) if self.pack.used else self.total_q

    @property
    def gqa(self) -> bool:
        """Return whether query heads share keys."""
        return self.heads != self.kv_heads

    def cumulative(self, lengths: Sequence[int]) -> Tensor:
        """Return the cumulative lengths, int32 [S + 1] on the device."""
        return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=self.device)

    @cached_property
    def lengths(self) -> dict[str, Any]:
        """Return the lengths as keyword arguments of illada's functions."""
        found = {"cu_seqlens": self.cumulative(self.pack.lengths)}
        if self.pack.used:
            found["cu_seqlens_k"] = self.cumulative([self.pack.slot] * len(self.pack.lengths))
            found["seqused_k"] = torch.tensor(self.pack.used, dtype=torch.int32, device=self.device)
        return found

    def key_parts(self, x: Tensor) -> Sequence[Tensor]:
        """Return the keys or values of each sequence, as views."""
        if self.pack.used is None:
            return x.split(self.pack.lengths)  # whose gradient is one concatenation
        return [part[:n] for part, n in zip(x.split(self.pack.slot), self.pack.used, strict=True)]

    def flops(self, direction: str) -> float:
        """Return the floating-point operations of the matrix products, of real query-key pairs only."""
        return 2.0 * GEMMS[direction] * self.heads * self.dim * self.pack.pairs

    def bytes(self, direction: str) -> int:
        """Return the bytes that must be read or written, each counted once.

        These are q and out, k and v (used ones) and lse; in a backward also their gradients.
        """
        rows = 2 * self.total_q * self.heads * self.dim * self.dtype.itemsize
        keys = 2 * sum(self.pack.keys) * self.kv_heads * self.dim * self.dtype.itemsize
        once = rows + keys + 4 * self.heads * self.total_q
        # the backward reads all of that and dout, and writes dq, dk and dv
        return {"fwd": once, "bwd": once + rows + keys, "fwdbwd": 2 * once + rows + keys}[direction]

    def inputs(self, seed: int = 0) -> tuple[Tensor, ...]:
        """Return random q, k, v and the gradient of out, normally distributed."""
        random = generator(self.device, seed)
        q, k = (self.total_q, self.heads, self.dim), (self.total_k, self.kv_heads, self.dim)
        return tuple(
            torch.randn(shape, generator=random, device=self.device, dtype=torch.float32).to(self.dtype)
            for shape in (q, k, k, q)
        )


def _as_is(x: Tensor, keys: bool) -> Tensor:
    return x


@dataclass
class AttentionProvider:
    """The functions by which one provider computes attention.

    attend: (q, k, v) -> out, all as `arrange` makes them of packed tensors; `restore` makes packed ones again. Neither
        of the two is timed. Their second argument says whether the tensor is one of keys.
    differentiate: (out, (q, k, v), dout, retain_graph=) -> (dq, dk, dv) of the last `attend`, as torch.autograd.grad.
    """

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    arrange: Callable[[Tensor, bool], Tensor] = _as_is
    restore: Callable[[Tensor, bool], Tensor] = _as_is
    differentiate: Callable[..., tuple[Tensor, ...]] = torch.autograd.grad


# ------------------------------------------------------------------------------------------------------------ providers


def make_plan(job: Job) -> Any:
    """Return illada's plan of a job."""
    return illada.attention_plan(
        **job.lengths, num_heads=job.heads, num_kv_heads=job.kv_heads, head_dim=job.dim, total_q=job.total_q
    )


def illada_provider(job: Job, deterministic: bool = False) -> AttentionProvider:
    """Return the provider of the public op with its plan."""
    arguments: dict[str, Any] = {**job.lengths, "plan": make_plan(job), "deterministic": deterministic}
    attend: Any = partial(illada.varlen_attention, **arguments)  # without return_lse the result is one tensor
    return AttentionProvider(attend)


def illada_raw_provider(job: Job) -> AttentionProvider:
    """Return the provider of the raw kernels alone, on CUDA.

    It calls them with out-parameters, on buffers that exist before the call.
    """
    plan, sequences, scale = make_plan(job).work, len(job.pack.lengths), job.dim**-0.5
    shape = (sequences, job.heads, job.kv_heads, job.dim)
    recompute = recompute_scores_for_dq(job.total_q, sequences)  # as the op does

    def bytes_of(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=job.device)

    workspace = bytes_of(raw.varlen_attention_workspace(job.total_q, *shape))
    out = torch.empty(job.total_q, job.heads, job.dim, dtype=job.dtype, device=job.device)
    lse = torch.empty(job.heads, job.total_q, device=job.device)

    @lru_cache(maxsize=1)  # made by the first call: the forward of a large cache has no room for them
    def backward_buffers() -> tuple[Tensor, ...]:
        index = job.device.index or 0
        size = raw.varlen_attention_backward_workspace(job.total_q, job.total_k, *shape, False, recompute, index)
        dk, dv = (torch.empty(job.total_k, job.kv_heads, job.dim, dtype=job.dtype, device=job.device) for _ in "kv")
        return torch.empty_like(out), dk, dv, bytes_of(size)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raw.varlen_attention(out, lse, q, k, v, plan, sequences, scale, workspace=workspace)
        return out

    def differentiate(
        out: Tensor, inputs: Sequence[Tensor], dout: Tensor, retain_graph: bool = False
    ) -> tuple[Tensor, ...]:
        dq, dk, dv, workspace = backward_buffers()
        q, k, v = inputs
        raw.varlen_attention_backward(
            *(dq, dk, dv, dout, None, q, k, v, out, lse, plan, sequences, scale),
            workspace=workspace,
            recompute_scores_for_dq=recompute,
        )
        return dq, dk, dv

    return AttentionProvider(attend, differentiate=differentiate)


def sdpa_provider(job: Job, backend: SDPBackend) -> AttentionProvider:
    """Return the provider of torch's dense attention with one backend.

    Sequences of one length are a batch; others are computed one after the other.
    """
    lengths = job.pack.lengths
    dense = partial(F.scaled_dot_product_attention, enable_gqa=job.gqa)
    is_batch = job.pack.used is None and len(set(lengths)) == 1

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            if is_batch:
                queries, keys, values = (x.unflatten(0, (len(lengths), -1)).transpose(1, 2) for x in (q, k, v))
                return dense(queries, keys, values).transpose(1, 2).flatten(0, 1)
            parts = zip(q.split(lengths), job.key_parts(k), job.key_parts(v), strict=True)
            sequences = ([x.transpose(0, 1)[None] for x in part] for part in parts if len(part[0]))
            outs = [dense(queries, keys, values) for queries, keys, values in sequences]
            return torch.cat([out[0].transpose(0, 1) for out in outs])

    return AttentionProvider(attend)


def padded_provider(job: Job) -> AttentionProvider:
    """Return the provider of dense attention on padded tensors [S, heads, longest, D].

    A mask hides the keys that are padding; there is none without padding.
    """

    def valid(lengths: Sequence[int]) -> Tensor:
        return torch.arange(max(lengths), device=job.device) < torch.tensor(lengths, device=job.device)[:, None]

    queries, keys = valid(job.pack.lengths), valid(job.pack.keys)
    mask = None if bool(keys.all()) else keys[:, None, None, :]

    def arrange(x: Tensor, is_keys: bool) -> Tensor:
        where = keys if is_keys else queries
        padded = x.new_zeros(*where.shape, *x.shape[1:])
        padded[where] = torch.cat(list(job.key_parts(x))) if is_keys else x
        return padded.transpose(1, 2)

    def restore(x: Tensor, is_keys: bool) -> Tensor:
        return x.transpose(1, 2)[keys if is_keys else queries]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if mask is None:
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=job.gqa)
        # No fused kernel of torch takes a mask and shared keys.
        k, v = (x.repeat_interleave(job.heads // job.kv_heads, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return AttentionProvider(attend, arrange, restore)


def _pack_keys(job: Job, x: Tensor, is_keys: bool) -> Tensor:
    """Return the used keys of all slots end to end, for kernels that know no slots."""
    return torch.cat(list(job.key_parts(x))) if is_keys and job.pack.used else x


def varlen_attn_provider(job: Job) -> AttentionProvider:
    """Return the provider of `torch.nn.attention.varlen.varlen_attn`."""
    varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn  # torch >= 2.10
    # Early versions have no such argument, and share keys unasked.
    gqa = {"enable_gqa": job.gqa} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    cu_q, cu_k = job.cumulative(job.pack.lengths), job.cumulative(job.pack.keys)
    longest = {"max_q": max(job.pack.lengths), "max_k": max(job.pack.keys)}
    return AttentionProvider(
        partial(varlen_attn, cu_seq_q=cu_q, cu_seq_k=cu_k, **longest, **gqa), partial(_pack_keys, job)
    )


def cudnn_varlen_provider(job: Job) -> AttentionProvider:
    """Return the provider of torch's private cuDNN call, as `varlen_attn` would make it."""
    cu_q, cu_k = job.cumulative(job.pack.lengths), job.cumulative(job.pack.keys)
    longest = (max(job.pack.lengths), max(job.pack.keys))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # no bias; lse, no dropout, not causal, no debug mask
        return torch.ops.aten._cudnn_attention_forward(q, k, v, None, cu_q, cu_k, *longest, True, 0.0, False, False)[0]

    return AttentionProvider(attend, partial(_pack_keys, job))


@lru_cache(maxsize=1)
def _compiled_flex(*shape: int) -> Callable[..., Tensor]:
    """Return `flex_attention`, compiled anew for each shape.

    The result of a shape is cached; cases of the same shape follow one another.
    """
    return compiled(importlib.import_module("torch.nn.attention.flex_attention").flex_attention)


def flex_provider(job: Job) -> AttentionProvider:
    """Return the provider of `flex_attention` with a mask that separates the sequences."""
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    sequences = torch.arange(len(job.pack.lengths), device=job.device)
    document_q = sequences.repeat_interleave(torch.tensor(job.pack.lengths, device=job.device))
    document_k = document_q
    if job.pack.used:
        unused = torch.arange(job.pack.slot, device=job.device) >= job.lengths["seqused_k"][:, None]
        document_k = sequences[:, None].masked_fill(unused, -1).flatten()

    def same(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return document_q[i] == document_k[j]

    mask = flex.create_block_mask(same, None, None, job.total_q, job.total_k, device=str(job.device))
    function = _compiled_flex(job.total_q, job.total_k, job.heads, job.kv_heads, job.dim)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return function(q, k, v, block_mask=mask, enable_gqa=job.gqa)[0].transpose(0, 1)

    return AttentionProvider(attend)


def flash_provider(job: Job, module: str, package: str, **more: Any) -> AttentionProvider:
    """Return the provider of a package's `flash_attn_varlen_func`.

    FlashAttention 3 and 4 have the same names for the arguments that are used here.
    """
    try:
        function = importlib.import_module(module).flash_attn_varlen_func
    except ImportError as error:
        raise ImportError(f"{error}; pip install {package} for this peer") from error
    lengths = job.lengths
    arguments = {
        "cu_seqlens_q": lengths["cu_seqlens"],
        "cu_seqlens_k": lengths.get("cu_seqlens_k", lengths["cu_seqlens"]),
        "seqused_k": lengths.get("seqused_k"),
        "max_seqlen_q": max(job.pack.lengths),
        "max_seqlen_k": max(job.pack.keys),
        **more,
    }

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(q, k, v, **arguments)
        return out[0] if isinstance(out, tuple) else out  # some versions return lse as well

    return AttentionProvider(attend)


def fa3_provider(job: Job) -> AttentionProvider:
    """Return the provider of fa3-fwd.

    By default it does not split keys; for a key-value cache, which has few queries, it is asked to choose.
    """
    return flash_provider(job, "fa3_fwd_interface", "fa3-fwd", num_splits=0 if job.pack.used else 1)


def fa4_provider(job: Job) -> AttentionProvider:
    """Return the provider of flash-attn-4."""
    return flash_provider(job, "flash_attn.cute", "flash-attn-4")


CPU_PROVIDERS: dict[str, Callable[[Job], AttentionProvider]] = {
    "illada": illada_provider,
    "sdpa flash": partial(sdpa_provider, backend=SDPBackend.FLASH_ATTENTION),
    "sdpa padded": padded_provider,
}
PROVIDERS: dict[str, Callable[[Job], AttentionProvider]] = {
    **CPU_PROVIDERS,
    "illada raw": illada_raw_provider,
    "sdpa cudnn": partial(sdpa_provider, backend=SDPBackend.CUDNN_ATTENTION),
    "varlen_attn": varlen_attn_provider,
    "cudnn varlen": cudnn_varlen_provider,
    "flex": flex_provider,  # runs on CPUs as well, but compiles for some 15 s a shape
    "fa3": fa3_provider,
    "fa4": fa4_provider,
}
BACKWARD_PROVIDERS: dict[str, Callable[[Job], AttentionProvider]] = {
    **PROVIDERS,
    "illada deterministic": partial(illada_provider, deterministic=True),
}
