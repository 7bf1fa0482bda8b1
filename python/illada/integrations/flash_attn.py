"""flash-attn 2's functions and torch's `varlen_attn` on `illada.varlen_attention`: same names, arguments, shapes.

    from illada.integrations.flash_attn import flash_attn_varlen_func

Arguments that ask for what this library does not do raise NotImplementedError, which names them: causal masks, windows,
dropout, softcap, ALiBi slopes, paged caches. max_seqlen arguments are accepted and not needed. Differences in what
comes back: the log-sum-exp of a query without keys is -inf (flash-attn has +inf), and of the three that
return_attn_probs=True gives the third, flash-attn's dropout mask, is None.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from illada.ops import varlen_attention
from illada.ops._library import may_read

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "varlen_attn",
]

_WINDOW = (-1, -1)  # no limit on either side


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = _WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Attend within packed sequences: q [T, H, D], k and v [Tk, G, D], cu_seqlens int32 or int64 [S + 1].

    Returns:
        out [T, H, D]; with `return_attn_probs` (out, lse float32 [H, T], None).
    """
    _refuse(
        "flash_attn_varlen_func", dropout_p=dropout_p, causal=causal, window_size=window_size, softcap=softcap,
        alibi_slopes=alibi_slopes, block_table=block_table,
    )  # fmt: skip
    out, lse = _attend(
        q, k, v, cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, softmax_scale=softmax_scale, deterministic=deterministic
    )
    return (out, lse, None) if return_attn_probs else out


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = _WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attend within a batch without padding: q [B, L, H, D], k and v [B, Lk, G, D].

    Returns:
        out [B, L, H, D]; with `return_attn_probs` (out, lse float32 [B, H, L], None).
    """
    _refuse(
        "flash_attn_func", dropout_p=dropout_p, causal=causal, window_size=window_size, softcap=softcap,
        alibi_slopes=alibi_slopes,
    )  # fmt: skip
    batch, length = _sizes("flash_attn_func", q, k, v)
    out, lse = _attend(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        _starts(batch, length, q.device),
        cu_seqlens_k=_starts(batch, k.shape[1], q.device),
        softmax_scale=softmax_scale,
        deterministic=deterministic,
    )
    out = out.unflatten(0, (batch, length))
    return (out, lse.unflatten(1, (batch, length)).transpose(0, 1), None) if return_attn_probs else out


def _followed_by_those_of(base: Callable[..., Any], tensors: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Say in a function's signature that its *args are the arguments of `base` behind its first `tensors`."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        own = [p for p in inspect.signature(function).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
        rest = [p for p in inspect.signature(base).parameters.values() if p.name != "block_table"][tensors:]
        function.__signature__ = inspect.Signature([*own, *rest])  # type: ignore[attr-defined]
        return function

    return decorate


@_followed_by_those_of(flash_attn_func, 3)
def flash_attn_qkvpacked_func(qkv: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Apply `flash_attn_func` to qkv [B, L, 3, H, D], which is read in place."""
    q, k, v = qkv.unbind(2)
    return flash_attn_func(q, k, v, *args, **kwargs)


@_followed_by_those_of(flash_attn_func, 3)
def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Apply `flash_attn_func` to q and kv [B, Lk, 2, G, D], which is read in place."""
    k, v = kv.unbind(2)
    return flash_attn_func(q, k, v, *args, **kwargs)


@_followed_by_those_of(flash_attn_varlen_func, 7)
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *args: Any, **kwargs: Any
) -> Any:
    """Apply `flash_attn_varlen_func` to qkv [T, 3, H, D], which is read in place."""
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *args, **kwargs)


@_followed_by_those_of(flash_attn_varlen_func, 7)
def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Apply `flash_attn_varlen_func` to q and kv [Tk, 2, G, D], which is read in place."""
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *args, **kwargs)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = _WINDOW,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attend from q [B, L, H, D] to a cache [B, Lk, G, D], after new k and v are put there.

    New k and v are [B, N, G, D].

    Args:
        q: [B, L, H, D], last dimension contiguous.
        k_cache: [B, Lk, G, D], the cache of keys.
        v_cache: Like `k_cache`, of values.
        k: [B, N, G, D], new keys, written to the cache behind those in use; default: none.
        v: Like `k`, new values; given if `k` is.
        rotary_cos: Must be None.
        rotary_sin: Must be None.
        cache_seqlens: keys in use before the new ones, for all sequences or int32 [B] each; default: all rows are.
        cache_batch_idx: Must be None.
        cache_leftpad: int32 [B], rows at the beginning of each slot that are not looked at.
        block_table: Must be None.
        softmax_scale: Factor of the scores; default 1 / sqrt(D).
        causal: Must be False.
        window_size: Must be (-1, -1).
        softcap: Must be 0.
        rotary_interleaved: Accepted and not needed.
        alibi_slopes: Must be None.
        num_splits: Accepted and not needed.
        return_softmax_lse: Also return lse.

    Returns:
        out [B, L, H, D]; with `return_softmax_lse` (out, lse float32 [B, H, L]). Not differentiable.
    """
    op = "flash_attn_with_kvcache"
    _refuse(
        op, rotary_cos=rotary_cos, rotary_sin=rotary_sin, cache_batch_idx=cache_batch_idx, block_table=block_table,
        causal=causal, window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
    )  # fmt: skip
    batch, length = _sizes(op, q, k_cache, v_cache)
    rows = k_cache.shape[1]
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if batch > 1 and cache.stride(0) != rows * cache.stride(1):
            raise ValueError(f"{op}: the sequences of {name} must follow each other, got strides {cache.stride()}")
    if (k is None) != (v is None):
        raise ValueError(f"{op}: k and v must be given together")
    if k is not None and cache_seqlens is None:
        raise ValueError(f"{op}: cache_seqlens must say where the new k and v go")
    count = 0 if k is None else k.shape[1]
    for name, new, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if new is not None and (new.shape != (batch, count, *cache.shape[2:]) or new.dtype != cache.dtype):
            raise ValueError(
                f"{op}: {name} must be {cache.dtype} [{batch}, N, {cache.shape[2]}, {cache.shape[3]}], as its cache is "
                f"and the other one, got {new.dtype} {list(new.shape)}"
            )
    for name, lengths in (("cache_seqlens", cache_seqlens), ("cache_leftpad", cache_leftpad)):
        if isinstance(lengths, Tensor) and (lengths.is_floating_point() or tuple(lengths.shape) != (batch,)):
            raise ValueError(f"{op}: {name} must be int32 [{batch}], got {lengths.dtype} {list(lengths.shape)}")
    starts = _starts(batch, rows, q.device)
    with torch.no_grad():
        if not isinstance(cache_seqlens, Tensor):  # filled there: a copy from the host would wait for the device
            cache_seqlens = starts.new_full((batch,), rows if cache_seqlens is None else cache_seqlens)
        used = cache_seqlens
        if k is not None and v is not None:
            if may_read(used) and not bool(((used >= 0) & (used <= rows - count)).all()):
                raise ValueError(
                    f"{op}: cache_seqlens must be in [0, {rows - count}], which leaves room for {count} new keys in "
                    f"{rows}, got {used.tolist()}"
                )
            at = (used[:, None] + torch.arange(count, device=q.device)).long()
            at = torch.where(at < 0, rows, at)  # below 0 it would mean the cache's end; beyond it is the device's error
            sequence = torch.arange(batch, device=q.device)[:, None]
            k_cache[sequence, at], v_cache[sequence, at] = k, v
            used = used + count
        if cache_leftpad is not None:
            used = (used - cache_leftpad).clamp(min=0)
            starts = starts + torch.nn.functional.pad(cache_leftpad, (0, 1))
        out, lse = _attend(
            q.flatten(0, 1),
            k_cache.flatten(0, 1),
            v_cache.flatten(0, 1),
            _starts(batch, length, q.device),
            cu_seqlens_k=starts.int(),
            seqused_k=used.int(),
            softmax_scale=softmax_scale,
        )
    out = out.unflatten(0, (batch, length))
    return (out, lse.unflatten(1, (batch, length)).transpose(0, 1)) if return_softmax_lse else out


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = _WINDOW,
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Any:
    """Compute `torch.nn.attention.varlen.varlen_attn`: query [T, H, D], key and value [Tk, G, D].

    Returns:
        out [T, H, D]; where `return_aux.lse` is true (out, lse float32 [H, T]).
    """
    op = "varlen_attn"
    _refuse(op, window_size=window_size, block_table=block_table)
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError(f"{op}: query has {query.shape[1]} heads and key {key.shape[1]}; pass enable_gqa=True")
    out, lse = _attend(query, key, value, cu_seq_q, cu_seqlens_k=cu_seq_k, seqused_k=seqused_k, softmax_scale=scale)
    return (out, lse) if getattr(return_aux, "lse", False) else out


def _attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    if options.get("cu_seqlens_k") is cu_seqlens and k.shape[0] == q.shape[0]:
        del options["cu_seqlens_k"]  # self-attention, for which there are faster plans
    result = varlen_attention(q, k, v, cu_seqlens, return_lse=True, **options)
    assert isinstance(result, tuple)
    return result


def _starts(batch: int, length: int, device: torch.device) -> Tensor:
    """Return int32 [B + 1]: where each of `batch` sequences of one length starts."""
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * length


def _sizes(op: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int]:
    """Return B and L.

    ValueError: the shape is not [B, L, heads, D], or batches differ.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or x.shape[0] != q.shape[0]:
            raise ValueError(f"{op}: {name} must have shape [{q.shape[0]}, L, heads, D], got {list(x.shape)}")
    return q.shape[0], q.shape[1]


_NEUTRAL = {"dropout_p": 0.0, "causal": False, "window_size": _WINDOW, "softcap": 0.0}


def _refuse(op: str, **arguments: Any) -> None:
    """Raise NotImplementedError for the first argument that asks for what the kernels do not do."""
    for name, value in arguments.items():
        neutral = _NEUTRAL.get(name)
        if name == "window_size":
            asked = value is None or isinstance(value, int) or tuple(value) != _WINDOW
        else:
            asked = value is not None and (isinstance(value, Tensor) or value != neutral)
        if asked:
            got = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise NotImplementedError(f"{op}: {name} must be {neutral!r}, got {got}; attention here is bidirectional")
