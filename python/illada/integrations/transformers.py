"""`attn_implementation="illada"` for models of `transformers` 5: bidirectional attention on `illada.varlen_attention`.

    from illada.integrations.transformers import register

    register()
    model = AutoModel.from_pretrained("bert-base-uncased", attn_implementation="illada")

Encoders are bidirectional as they are; a decoder becomes so by `is_causal=False` in its config (from 5.2 on).
Padding masks are honoured: padded keys are never read. What the kernels do not do raises, naming the argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from illada.ops import AttentionPlan, attention_plan, varlen_attention
from illada.ops._library import may_read

#: The `attn_implementation` that `register` adds.
NAME = "illada"
_ASKED = f"attn_implementation={NAME!r}"  # in what errors say


def register() -> None:
    """Make "illada" known as an `attn_implementation`.

    Calling this again does nothing.

    Raises:
        ImportError: transformers is not installed, or is older than 5.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import create_bidirectional_mask  # noqa: F401 (there from 5.0 on)
    except ImportError as error:
        raise ImportError(f"{_ASKED} needs transformers 5: pip install 'transformers>=5'") from error
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_mask(
    batch_size: int,
    q_length: int = 0,
    kv_length: int = 0,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | None = None,
    cache_position: Tensor | None = None,
    **unused: Any,
) -> Tensor | None:
    """Return what `transformers` hands to every layer: the padding mask, bool [B, L]; compiled and without one, None.

    The layers keep on this tensor what they share: see `_Shared`.

    Raises:
        NotImplementedError: a pattern that is not bidirectional (causal, sliding window, packed by position_ids).
        ValueError: a mask with holes between the tokens of a sequence. To see that, a mask on a GPU is read: once a
            forward pass, as `transformers` itself does for FlashAttention. Compiled, it is an assertion on the device.
    """
    from transformers.masking_utils import bidirectional_mask_function

    if mask_function is not bidirectional_mask_function:
        pattern = getattr(mask_function, "__qualname__", repr(mask_function)).split(".")[0]
        raise NotImplementedError(
            f"{_ASKED} is bidirectional, and the model asks for {pattern}; set is_causal=False in "
            "the config of a decoder, and use another implementation for sliding windows and packed position_ids"
        )
    if attention_mask is None:
        if torch.compiler.is_compiling():
            return None
        if cache_position is not None:  # transformers 5.0, which gives it in place of q_length and device
            device = cache_position.device
        return _shared(torch.ones(batch_size, kv_length, dtype=torch.bool, device=device), padding=False)
    empty = max(0, kv_offset + kv_length - attention_mask.shape[1])  # slots of a static cache that nothing is in yet
    mask = torch.nn.functional.pad(attention_mask.bool(), (0, empty))[:, kv_offset : kv_offset + kv_length]
    steps = (mask[:, 1:] != mask[:, :-1]).sum(1)  # of padding at most one on either side, each with a token at its end
    around = mask[:, 0].int() + mask[:, -1].int()
    whole, said = (steps + around <= 2).all(), f"{_ASKED} takes padding on the left or right"
    if torch.compiler.is_compiling():
        torch._assert_async(whole, f"{said}; attention_mask has holes")
        return mask
    has_no_holes, has_no_padding = torch.stack([whole, mask.all()]).tolist()  # one copy from the device
    if not has_no_holes:
        raise ValueError(f"{said}; attention_mask has holes")
    return _shared(mask, padding=not has_no_padding)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return a layer's attention: query [B, H, L, D], key and value [B, G, Lk, D]; the result is [B, L, H, D].

    `cu_seq_lens_q` and `cu_seq_lens_k` (of `DataCollatorWithFlattening`) say where sequences start in a batch of one.
    `position_ids`, which decoders pass to their layers, are looked at once a forward pass: see `_check_positions`.

    Raises:
        NotImplementedError: dropout, causal, sliding, softcap, sinks, biases, chosen keys, returned weights.
        ValueError: an attention_mask that is not [B, Lk]; cu_seq_lens_q with more than one row or with padding;
            position_ids that start anew within a row, without cu_seq_lens_q. On a GPU, and compiled, the last one is an
            assertion on the device.
    """
    config = getattr(module, "config", None)
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", False)) and getattr(config, "is_causal", True)
    asked = {"dropout": dropout, "is_causal": is_causal, "sliding_window": sliding_window, "softcap": softcap}
    for name in ("s_aux", "sinks", "position_bias", "head_mask", "indices", "block_indices", "output_attentions"):
        asked[name] = others.get(name)
    for name, value_of_it in asked.items():
        if isinstance(value_of_it, Tensor) or value_of_it:
            got = "a tensor" if isinstance(value_of_it, Tensor) else repr(value_of_it)
            raise NotImplementedError(f"{_ASKED} has no {name}, got {got}")
    batch, length, keys = query.shape[0], query.shape[2], key.shape[2]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    if cu_seq_lens_q is not None and batch != 1:
        raise ValueError(f"cu_seq_lens_q is for a batch of one row, got {batch}")
    if cu_seq_lens_q is None and cu_seq_lens_k is not None:
        raise ValueError("cu_seq_lens_k needs cu_seq_lens_q, got None")
    shared = _shared_of(attention_mask)
    if cu_seq_lens_q is not None and shared is not None and shared.padding:
        raise ValueError("attention_mask must have no padding beside cu_seq_lens_q: leave the padding out of the pack")
    if cu_seq_lens_q is None:
        _check_positions(module, others.get("position_ids"), attention_mask, shared, (batch, length, keys))
    shape = (batch, length, keys, query.shape[1], key.shape[1], query.shape[3])
    starts, starts_k, used, plan = _lengths(attention_mask, cu_seq_lens_q, cu_seq_lens_k, shape, q.device)
    out = varlen_attention(q, k, v, starts, cu_seqlens_k=starts_k, seqused_k=used, plan=plan, softmax_scale=scaling)
    assert isinstance(out, Tensor)
    return out.unflatten(0, (batch, length)), None


# ------------------------------------------------------------------------------ what the layers of a forward pass share

_Lengths = tuple[Tensor, Tensor | None, Tensor | None, AttentionPlan]


class _Shared:
    """What the layers of a forward pass share: lengths and plans, by what they were made from.

    `attention_mask` puts it on the mask, with which it goes; the first layer fills it.

    version: of the mask when it was looked at; one that was written to since is looked at anew.
    """

    def __init__(self, mask: Tensor, padding: bool):
        self.version, self.padding = _version(mask), padding
        self.checked: tuple[Tensor, int] | None = None  # position_ids, and their version then
        self.made: dict[tuple[Any, ...], tuple[_Lengths, tuple[Tensor | None, ...]]] = {}


def _shared(mask: Tensor, padding: bool) -> Tensor:
    mask._illada = _Shared(mask, padding)  # type: ignore[attr-defined]
    return mask


def _shared_of(mask: Tensor | None) -> _Shared | None:
    """Return what `_shared` put on the mask.

    It is None when compiled, and on a mask of the caller's.
    """
    return None if torch.compiler.is_compiling() else getattr(mask, "_illada", None)


def _version(tensor: Tensor | None) -> int:
    """Return a number that changes when the tensor is written to.

    It is 0 without a tensor, and for a tensor of inference mode, which keeps no such number.
    """
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def _lengths(
    mask: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, shape: tuple[int, ...], device: torch.device
) -> _Lengths:
    """Return (starts of queries, starts of keys, keys in use, plan) of a layer; `shape`: B, L, Lk, H, G, D."""
    shared = _shared_of(mask)
    if shared is None or shared.version != _version(mask):  # a mask of the caller's, a copy, or one that was changed
        return _make_lengths(mask, cu_q, cu_k, shape, device)
    key = (shape, device, *((id(x), _version(x)) for x in (cu_q, cu_k)))
    if key not in shared.made:  # beside the tensors whose ids are in the key, so that these stay theirs
        made = _make_lengths(mask if shared.padding else None, cu_q, cu_k, shape, device)
        shared.made[key] = made, (cu_q, cu_k)
    lengths: _Lengths = shared.made[key][0]
    return lengths


def _make_lengths(
    mask: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, shape: tuple[int, ...], device: torch.device
) -> _Lengths:
    batch, length, keys, heads, kv_heads, head_dim = shape
    count = torch.arange(batch + 1, dtype=torch.int32, device=device)
    starts, starts_k, used = count * length, None if keys == length else count * keys, None
    if cu_q is not None:
        starts, starts_k = cu_q, None if cu_k is cu_q else cu_k
    elif mask is not None:
        starts_k, used = _slots(mask, batch, keys)
    plan = attention_plan(
        starts, cu_seqlens_k=starts_k, seqused_k=used, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
        total_q=batch * length, total_k=batch * keys,
    )  # fmt: skip
    return starts, starts_k, used, plan


def starts_anew(position_ids: Tensor, tokens: Tensor | None) -> Tensor:
    """Return bool, 0-dim: whether positions [B or 1, L] do not ascend between two tokens; tokens: bool [B, L]."""
    anew = position_ids[..., 1:] <= position_ids[..., :-1]
    if tokens is not None:
        anew = anew & tokens[:, 1:] & tokens[:, :-1]  # those of padding may be anything
    return anew.any()


#: What a row of several sequences is told that position_ids alone tell apart.
STARTS_ANEW = (
    "position_ids start anew within a row: attention would cross the sequences; pass cu_seq_lens_q and cu_seq_lens_k "
    "as well (DataCollatorWithFlattening(return_flash_attn_kwargs=True))"
)


def _check_positions(
    module: torch.nn.Module, position_ids: Any, mask: Tensor | None, shared: _Shared | None, shape: tuple[int, int, int]
) -> None:
    """Raise ValueError for `STARTS_ANEW`; on a GPU, and compiled, an assertion on the device, for which nothing waits.

    Not looked at: positions of several axes, such as those of images, and rows with padding beside a cache.
    """
    batch, length, keys = shape
    if not isinstance(position_ids, Tensor) or position_ids.shape not in ((batch, length), (1, length)):
        return
    compiling = torch.compiler.is_compiling()
    if compiling and getattr(module, "layer_idx", None):  # nothing is shared between layers: the first one looks
        return
    tokens = mask if shared is None or shared.padding else None
    if tokens is not None and (tokens.dtype != torch.bool or tokens.shape != (batch, keys) or keys != length):
        return
    if shared is not None:
        if shared.checked is not None and shared.checked[0] is position_ids:
            if shared.checked[1] == _version(position_ids):
                return
        shared.checked = position_ids, _version(position_ids)
    if may_read(position_ids):
        if bool(starts_anew(position_ids, tokens)):
            raise ValueError(STARTS_ANEW)
    elif not position_ids.is_meta:
        torch._assert_async(~starts_anew(position_ids, tokens), STARTS_ANEW)


def _slots(mask: Tensor, batch: int, keys: int) -> tuple[Tensor, Tensor]:
    """Return where each sequence's keys start, int32 [B + 1], and their number, int32 [B]; mask: bool [B, Lk]."""
    if mask.dtype != torch.bool or tuple(mask.shape) != (batch, keys):
        raise ValueError(
            f"attention_mask must be a padding mask [{batch}, {keys}], which reaches the layers as bool; got "
            f"{str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}"
        )
    used = mask.sum(1, dtype=torch.int32)
    first = mask.int().argmax(1).to(torch.int32) + torch.arange(batch, dtype=torch.int32, device=mask.device) * keys
    return torch.nn.functional.pad(first, (0, 1), value=batch * keys), used
