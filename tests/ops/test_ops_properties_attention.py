"""varlen_attention on the CPU, on values that break kernels, against float64."""

import pytest
import torch
from adversarial import FINITE, KINDS, assert_near
from attention_properties import NAMES, check, make, run

import illada
from illada.ops import reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries, keys", [(7, 5), (3, 70), (33, 150)])
def test_values(queries, keys, dtype, generator):
    kinds = list(KINDS)
    tensors, lengths, d_out = make(kinds, queries, keys, 32, dtype, generator)
    check(run(illada.varlen_attention, tensors, lengths, d_out), tensors, lengths, d_out, kinds)


#: Scores so large that float32 cannot say which is the largest: nothing but [0, 1] bounds a probability.
BEYOND_FLOAT32 = {"huge", "largest", "largest and lowest", "lowest", "offset 1e6"}
FALSE = {"out": lambda out: 0 * out, "dq": lambda dq: 0 * dq, "dk": lambda dk: -dk, "dv": lambda dv: 2 * dv}


@pytest.mark.parametrize("name", FALSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_false_results_are_found(dtype, name, generator):
    """float64's own results pass, and do not with one that is wrong, whatever the kind of the values."""
    for kind in [*FINITE, "half -inf", "offset 1e4 and -inf"]:
        tensors, lengths, d_out = make([kind], 7, 5, 32, dtype, generator)
        exact = run(reference.varlen_attention, [x.double() for x in tensors], lengths, torch.nan_to_num(d_out))
        check(exact, tensors, lengths, d_out, [kind])
        if kind not in BEYOND_FLOAT32:
            at = NAMES.index(name)
            with pytest.raises(AssertionError, match=f"{kind}, {name}"):
                check([*exact[:at], FALSE[name](exact[at]), *exact[at + 1 :]], tensors, lengths, d_out, [kind])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keys", [5, 70])
def test_huge_scores_that_tie(keys, dtype, generator):
    """Of scores that are the same to the last bit, in any order of sums, every key has the same part."""
    q, k = torch.zeros(7, 2, 32), torch.zeros(keys, 2, 32)
    q[..., 0], k[..., 0] = 2.0**13, 2.0**15
    v, d_out = torch.randn(keys, 2, 32, generator=generator), torch.randn(7, 2, 32, generator=generator)
    leaves = [x.to(dtype) for x in (q, k, v)]
    lengths = {"cu_seqlens": torch.tensor([0, 7]).int(), "cu_seqlens_k": torch.tensor([0, keys]).int()}
    got = run(illada.varlen_attention, leaves, lengths, d_out, softmax_scale=1.0)
    want = run(reference.varlen_attention, [x.double() for x in leaves], lengths, d_out.to(dtype), softmax_scale=1.0)
    for name, g, w in zip(NAMES, got, want, strict=True):
        assert_near(g, w, 16 * torch.finfo(dtype).eps * w.abs().amax(), name)
