"""The functions of flash-attn and torch's varlen_attn against softmax(q k^T) v in float64."""

import inspect
from types import SimpleNamespace

import pytest
import torch

from illada.integrations import flash_attn
from illada.integrations.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
    varlen_attn,
)

try:
    from torch.nn.attention.varlen import AuxRequest
except ImportError:  # torch 2.9 and older; ours reads only this attribute
    AuxRequest = SimpleNamespace

BATCH, LENGTH, KEYS, HEADS, KV_HEADS, DIM = 3, 5, 7, 4, 2, 16


def attend(q, k, v, scale=None):
    """Return out [L, H, D] and lse [H, L] of one sequence, in float64."""
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    scores = q @ k.mT * (scale or q.shape[-1] ** -0.5)
    return (scores.softmax(-1) @ v).transpose(0, 1), scores.logsumexp(-1)


def close(got, want):
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.fixture
def batch(generator):
    q = torch.randn(BATCH, LENGTH, HEADS, DIM, generator=generator, requires_grad=True)
    k, v = torch.randn(2, BATCH, KEYS, KV_HEADS, DIM, generator=generator).requires_grad_()
    return q, k, v


@pytest.mark.parametrize("scale", [None, 0.3])
def test_a_batch(batch, scale):
    out, lse, mask = flash_attn_func(*batch, softmax_scale=scale, return_attn_probs=True)
    assert mask is None and torch.equal(out, flash_attn_func(*batch, 0.0, scale))
    want = [attend(*one, scale) for one in zip(*batch, strict=True)]
    close(out, torch.stack([one for one, _ in want]))
    close(lse, torch.stack([one for _, one in want]))
    probe = torch.arange(out.numel()).view_as(out) / out.numel()
    got = torch.autograd.grad((out * probe).sum(), batch[0])
    close(got[0], torch.autograd.grad((torch.stack([one for one, _ in want]) * probe).sum(), batch[0])[0].double())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_pack(dtype, generator):
    starts, starts_k = torch.tensor([0, 4, 4, 9], dtype=dtype), torch.tensor([0, 2, 3, 11], dtype=dtype)
    q = torch.randn(9, HEADS, DIM, generator=generator)
    k, v = torch.randn(2, 11, KV_HEADS, DIM, generator=generator)
    out, lse, _ = flash_attn_varlen_func(q, k, v, starts, starts_k, 5, 8, return_attn_probs=True)
    for i in (0, 2):
        at, at_k = slice(starts[i], starts[i + 1]), slice(starts_k[i], starts_k[i + 1])
        want, want_lse = attend(q[at], k[at_k], v[at_k])
        close(out[at], want)
        close(lse[:, at], want_lse)
    close(flash_attn_varlen_kvpacked_func(q, torch.stack([k, v], 1), starts, starts_k, 5, 8), out.double())
    twin = varlen_attn(q, k, v, starts, starts_k, 5, 8, enable_gqa=True, return_aux=AuxRequest(lse=True))
    assert torch.equal(twin[0], out) and torch.equal(twin[1], lse)


def test_stacked_arguments(generator):
    qkv = torch.randn(BATCH, LENGTH, 3, HEADS, DIM, generator=generator)
    want = flash_attn_func(*qkv.unbind(2))
    assert torch.equal(flash_attn_qkvpacked_func(qkv), want)
    assert torch.equal(flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:]), want)
    starts = torch.arange(BATCH + 1) * LENGTH
    assert torch.equal(flash_attn_varlen_qkvpacked_func(qkv.flatten(0, 1), starts, LENGTH), want.flatten(0, 1))


@pytest.mark.parametrize("left", [None, torch.tensor([0, 1, 2], dtype=torch.int32)])
def test_a_cache(left, generator):
    q = torch.randn(BATCH, 2, HEADS, DIM, generator=generator)
    cache = torch.randn(2, BATCH, KEYS, KV_HEADS, DIM, generator=generator)
    new = torch.randn(2, BATCH, 2, KV_HEADS, DIM, generator=generator)
    used, before = torch.tensor([5, 3, 4], dtype=torch.int32), cache.clone()
    options = {"cache_leftpad": left, "return_softmax_lse": True}
    out, lse = flash_attn_with_kvcache(q, *cache, *new, cache_seqlens=used, **options)
    for i, count in enumerate(used.tolist()):
        assert torch.equal(cache[:, i, count : count + 2], new[:, i])
        assert torch.equal(cache[:, i, :count], before[:, i, :count])
        keys = cache[:, i, 0 if left is None else int(left[i]) : count + 2]
        want, want_lse = attend(q[i], *keys)
        close(out[i], want)
        close(lse[i], want_lse)
    close(flash_attn_with_kvcache(q, *before), torch.stack([attend(*one)[0] for one in zip(q, *before, strict=True)]))
    close(flash_attn_with_kvcache(q, *before, cache_seqlens=3), flash_attn_func(q, *before[:, :, :3]).double())


@pytest.mark.parametrize("used", [[-1, 0, 0], [0, KEYS - 1, 0], -2])
def test_a_cache_without_room(used, generator):
    q, new = torch.randn(2, BATCH, 2, KV_HEADS, DIM, generator=generator)
    cache = torch.zeros(BATCH, KEYS, KV_HEADS, DIM)
    used = used if isinstance(used, int) else torch.tensor(used, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cache_seqlens must be in \[0, 5\], which leaves room for 2 new keys in 7"):
        flash_attn_with_kvcache(q, cache, cache, new, new, cache_seqlens=used)
    assert not cache.any()


def test_a_cache_whose_padding_leaves_no_key(batch):
    q, k, v = batch
    used, left = torch.tensor([2, 3, 4], dtype=torch.int32), torch.tensor([4, 3, 0], dtype=torch.int32)
    out = flash_attn_with_kvcache(q, k, v, cache_seqlens=used, cache_leftpad=left)
    assert not out[:2].any()
    close(out[2], attend(q[2], k[2, :4], v[2, :4])[0])


TENSOR = torch.zeros(2)
UNSUPPORTED = [
    (flash_attn_func, "dropout_p", 0.1), (flash_attn_func, "causal", True), (flash_attn_func, "softcap", 30.0),
    (flash_attn_func, "window_size", (4, 4)), (flash_attn_func, "window_size", None), (flash_attn_func, "alibi_slopes", TENSOR),
    (flash_attn_varlen_func, "dropout_p", 0.1), (flash_attn_varlen_func, "causal", True),
    (flash_attn_varlen_func, "window_size", (-1, 0)), (flash_attn_varlen_func, "softcap", 30.0),
    (flash_attn_varlen_func, "alibi_slopes", TENSOR), (flash_attn_varlen_func, "block_table", TENSOR),
    (flash_attn_with_kvcache, "rotary_cos", TENSOR), (flash_attn_with_kvcache, "rotary_sin", TENSOR),
    (flash_attn_with_kvcache, "cache_batch_idx", TENSOR), (flash_attn_with_kvcache, "block_table", TENSOR),
    (flash_attn_with_kvcache, "causal", True), (flash_attn_with_kvcache, "window_size", (0, 0)),
    (flash_attn_with_kvcache, "softcap", 30.0), (flash_attn_with_kvcache, "alibi_slopes", TENSOR),
    (flash_attn_qkvpacked_func, "causal", True), (flash_attn_kvpacked_func, "causal", True),
    (flash_attn_varlen_qkvpacked_func, "causal", True), (flash_attn_varlen_kvpacked_func, "causal", True),
    (varlen_attn, "window_size", (-1, 0)), (varlen_attn, "block_table", TENSOR),
]  # fmt: skip


@pytest.mark.parametrize("function,name,value", UNSUPPORTED, ids=lambda x: getattr(x, "__name__", str(x)))
def test_what_is_not_done_is_refused_by_name(function, name, value):
    x = torch.zeros(1, 2, 3, 2, 16)
    x = x[0] if "varlen" in function.__name__ else x
    arguments = {"qkv": x, "kv": x.narrow(-3, 0, 2), "cu_seqlens": torch.tensor([0, 1]), "max_seqlen": 1}
    given = [
        arguments.get(parameter.name, x.select(-3, 0))
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    with pytest.raises(NotImplementedError, match=rf"^flash_attn\w*|varlen_attn: {name} must be .*, got "):
        function(*given, **{name: value})


def test_wrong_shapes(batch):
    q, k, v = batch

    def cached(new_k, new_v, used=1):
        return flash_attn_with_kvcache(q, k.clone(), v.clone(), new_k, new_v, cache_seqlens=used)

    for error, match, call in [
        (ValueError, r"flash_attn_func: q must have shape \[5, L, heads, D\], got", lambda: flash_attn_func(q[0], k, v)),
        (ValueError, r"k must have shape \[3, L, heads, D\], got \[2,", lambda: flash_attn_func(q, k[:2], v)),
        (ValueError, "k and v must be given together", lambda: flash_attn_with_kvcache(q, k, v, k)),
        (ValueError, "cache_seqlens must say where", lambda: flash_attn_with_kvcache(q, k, v, k, v)),
        (ValueError, r"k must be torch.float32 \[3, N, 2, 16\], .* got torch.float32 \[1, 2, 2, 16\]", lambda: cached(k[:1, :2], v[:1, :2])),
        (ValueError, r"v must be torch.float32 .* got torch.float32 \[3, 3, 2, 16\]", lambda: cached(k[:, :2], v[:, :3])),
        (ValueError, r"v must be torch.float32 .* got torch.bfloat16", lambda: cached(k[:, :2], v[:, :2].bfloat16())),
        (ValueError, r"cache_seqlens must be int32 \[3\], got torch.int64 \[1\]", lambda: cached(None, None, torch.tensor([2]))),
        (ValueError, r"cache_seqlens must be int32 \[3\], got torch.float32 \[3\]", lambda: cached(None, None, torch.ones(3))),
        (ValueError, "sequences of k_cache must follow each other", lambda: flash_attn_with_kvcache(q, k[:, ::2], v[:, ::2])),
        (ValueError, "query has 4 heads and key 2; pass enable_gqa=True", lambda: varlen_attn(q[0], k[0], v[0], None, None, 1, 1)),
    ]:  # fmt: skip
        with pytest.raises(error, match=match):
            call()


def test_signature_is_torchs():
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch has varlen_attn from 2.10 on")
    mine, theirs = (inspect.signature(function).parameters for function in (flash_attn.varlen_attn, varlen.varlen_attn))
    assert [(p.name, p.default, p.kind) for p in mine.values()] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ]


def test_signatures_are_those_of_flash_attn():
    """Names and order of flash-attn 2.8."""
    tail = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"
    lengths = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
    cache = "cache_seqlens cache_batch_idx cache_leftpad block_table softmax_scale causal window_size softcap"
    for function, names in {
        flash_attn_func: f"q k v {tail}",
        flash_attn_varlen_func: f"q k v {lengths} {tail} block_table",
        flash_attn_qkvpacked_func: f"qkv {tail}",
        flash_attn_kvpacked_func: f"q kv {tail}",
        flash_attn_varlen_qkvpacked_func: f"qkv cu_seqlens max_seqlen {tail}",
        flash_attn_varlen_kvpacked_func: f"q kv {lengths} {tail}",
        flash_attn_with_kvcache: f"q k_cache v_cache k v rotary_cos rotary_sin {cache} rotary_interleaved alibi_slopes "
        "num_splits return_softmax_lse",
    }.items():
        assert list(inspect.signature(function).parameters) == names.split()
