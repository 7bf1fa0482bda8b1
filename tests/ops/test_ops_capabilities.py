"""`illada.why_not`: its answers, and that the ops agree with them."""

import contextlib

import pytest
import torch

import illada
from illada._native import native
from illada.ops import capabilities, raw
from illada.ops.capabilities import logits_dtypes

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def answers(function):
    try:
        function()
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_on_a_cpu_agrees(dtype):
    q = torch.zeros(3, 2, 16, dtype=dtype)
    cu_seqlens = torch.tensor([0, 3], dtype=torch.int32)
    served = illada.why_not("varlen_attention", "cpu", dtype, head_dim=16, num_heads=2, num_kv_heads=2) is None
    assert answers(lambda: illada.varlen_attention(q, q, q, cu_seqlens)) == served == (dtype != torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loss_and_the_sampler_on_a_cpu_agree(dtype):
    logits, targets, weights = torch.zeros(2, 5, dtype=dtype), torch.zeros(2, dtype=torch.int64), torch.ones(2)
    by_loss = answers(lambda: illada.masked_cross_entropy(logits, targets, weights))
    by_sampler = answers(lambda: illada.sample_tokens(logits, temperature=0.0))
    for op in ("masked_cross_entropy", "linear_masked_cross_entropy", "sample_tokens", "linear_sample_tokens"):
        assert (illada.why_not(op, "cpu", dtype) is None) == by_loss == by_sampler == (dtype in logits_dtypes(logits))


@pytest.mark.parametrize("dtype", raw.DTYPES)
def test_python_and_cpp_list_the_same_dtypes_of_cpu_kernels(dtype):
    """LOGITS_DTYPES of Python, `has_kernels` of C++: the checks of illada.ops come before the native ones."""
    logits, targets, weights = torch.zeros(2, 5, dtype=dtype), torch.zeros(2, dtype=torch.int64), torch.ones(2)
    q = torch.zeros(3, 2, 16, dtype=dtype)
    plan = torch.tensor([[0, 3, 0, 3], [3, 3, 3, 3]], dtype=torch.int32)
    served = dtype in capabilities.LOGITS_DTYPES["cpu"]
    for error, call in (
        (ValueError, lambda: raw.masked_cross_entropy(logits, targets, weights, nll=torch.empty(2))),
        (NotImplementedError, lambda: raw.varlen_attention(q.clone(), torch.empty(2, 3), q, q, q, plan, 1, 1.0)),
    ):
        with contextlib.nullcontext() if served else pytest.raises(error, match="on a CPU"):
            call()


@pytest.mark.parametrize("dim", [native().MAX_HEAD_DIM_CPU, native().MAX_HEAD_DIM_CPU + 1])
def test_the_largest_head_dim_of_cpu_kernels(dim):
    """What the module exports is the limit of the kernels; torch serves larger head dims."""
    q = torch.zeros(3, 1, dim)
    plan = torch.tensor([[0, 3, 0, 3], [3, 3, 3, 3]], dtype=torch.int32)
    refused = pytest.raises(NotImplementedError, match="head dims up to")
    with contextlib.nullcontext() if dim == native().MAX_HEAD_DIM_CPU else refused:
        raw.varlen_attention(q.clone(), torch.empty(1, 3), q, q, q, plan, 1, 1.0)
    assert illada.varlen_attention(q, q, q, torch.tensor([0, 3], dtype=torch.int32)).shape == q.shape


def test_reasons(monkeypatch):
    assert illada.why_not("masked_cross_entropy", "cpu") is None
    why = illada.why_not("sample_tokens", "cpu", torch.float16)
    assert why == "sample_tokens on cpu takes float32 or bfloat16, got float16"
    with pytest.raises(ValueError, match="op must be one of varlen_attention, .*, got 'softmax'"):
        illada.why_not("softmax", "cpu")
    with pytest.raises(ValueError, match="device must be cpu or cuda, got 'meta'"):
        illada.why_not("sample_tokens", "meta")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert illada.why_not("sample_tokens", "cuda") == "torch sees no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(capabilities, "has_cuda", lambda: False)
    assert "without CUDA kernels" in illada.why_not("sample_tokens", "cuda")
    monkeypatch.setattr(capabilities, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert illada.why_not("sample_tokens", "cuda:1").endswith("compute capability 8.0, and Tesla T4 has less")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert illada.why_not("sample_tokens", "cuda", torch.float16) is None
    why = illada.why_not("varlen_attention", "cuda", torch.float32, head_dim=64)
    assert why == "varlen_attention on cuda takes bfloat16 or float16, got float32"
