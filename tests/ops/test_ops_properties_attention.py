"""varlen_attention on values that break kernels, on every device, against float64. New memory of CUDA holds NaN."""

import pytest
import torch
from adversarial import FINITE, KINDS, MINUS_INFINITY, assert_near
from attention_cases import DTYPES, ON_CPU, ON_CUDA
from attention_properties import HEADS, NAMES, check, fill_with_nan, make, run

import illada
from illada.ops import reference

# Few queries of many keys are split over the keys on CUDA: whole key splits are -inf.
# Groups of 1, 4 and 7 heads fill the kernels' tiles of rows up in other places.
OF_CUDA = {
    "several tiles": (150, 200, list(KINDS), HEADS),
    "key splits": (2, 700, ["-inf first", "-inf last", "huge", "two +inf"], HEADS),
    **{f"groups of {n}": (45, 70, ["normal", "offset 1e6", *MINUS_INFINITY], 2 * n) for n in (1, 4, 7)},
}
OF_CPUS = {
    f"{queries} of {keys}": (queries, keys, list(KINDS), HEADS) for queries, keys in ((7, 5), (3, 70), (33, 150))
}
# Only the kernels of sm_90a sum dq.
WAYS = [*((dim, way) for dim in (64, 128) for way in ("sums", "recompute")), (96, "recompute"), (256, "recompute")]
CASES = [
    *(pytest.param(shape, 32, "sums", marks=ON_CPU, id=f"{shape}-32") for shape in OF_CPUS),
    *(pytest.param(shape, *way, marks=ON_CUDA, id=f"{shape}-{way[0]}-{way[1]}") for shape in OF_CUDA for way in WAYS),
]


@pytest.fixture(params=["sums"])
def _way(request, monkeypatch):
    monkeypatch.setattr(illada.ops.attention.cuda, "_REPEATABLE_LENGTH", 1 << 20 if request.param == "recompute" else 0)


def run_on(device, tensors, lengths, d_out, **keywords):
    on_device = [x.to(device) for x in tensors], {name: x.to(device) for name, x in lengths.items()}, d_out.to(device)
    fill_with_nan(device)
    return run(illada.varlen_attention, *on_device, **keywords)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, dim, _way", CASES, indirect=["_way"])
def test_values(shape, dim, dtype, device, generator):
    queries, keys, kinds, heads = {**OF_CUDA, **OF_CPUS}[shape]
    tensors, lengths, d_out = make(kinds, queries, keys, dim, dtype, generator, heads)
    check(run_on(device, tensors, lengths, d_out), tensors, lengths, d_out, kinds)


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


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, *(pytest.param(x, marks=ON_CPU) for x in (torch.float16, torch.float32))]
)
@pytest.mark.parametrize(
    "queries, keys, dim, _way",
    [
        pytest.param(7, 5, 32, "sums", marks=ON_CPU),
        pytest.param(7, 70, 32, "sums", marks=ON_CPU),
        *(pytest.param(n, keys, 64, way, marks=ON_CUDA) for n, keys in ((7, 70), (3, 1500)) for way in ("sums", "recompute")),
    ],
    indirect=["_way"],
)  # fmt: skip
def test_huge_scores_that_tie(queries, keys, dim, dtype, device, generator):
    """Of scores that are the same to the last bit, in any order of sums, every key has the same part."""
    q, k = torch.zeros(queries, 2, dim), torch.zeros(keys, 2, dim)
    q[..., 0], k[..., 0] = 2.0**13, 2.0**15
    v, d_out = torch.randn(keys, 2, dim, generator=generator), torch.randn(queries, 2, dim, generator=generator)
    leaves = [x.to(dtype) for x in (q, k, v)]
    lengths = {"cu_seqlens": torch.tensor([0, queries]).int(), "cu_seqlens_k": torch.tensor([0, keys]).int()}
    got = run_on(device, leaves, lengths, d_out, softmax_scale=1.0)
    want = run(reference.varlen_attention, [x.double() for x in leaves], lengths, d_out.to(dtype), softmax_scale=1.0)
    if device.type == "cpu":
        for name, g, w in zip(NAMES, got, want, strict=True):
            assert_near(g, w, 16 * torch.finfo(dtype).eps * w.abs().amax(), name)
        return
    for name, g, w in zip(("out", "lse"), got, want, strict=False):
        assert_near(g, w, 2.0**-7 * w.abs().amax(), name)
    # The logarithm of the number of keys has no digits beside such an lse: each key's part is 1 in the backward.
    assert_near(got[NAMES.index("dv")], d_out.to(dtype).double().sum(0).expand(keys, 2, dim), 2.0**-6, "dv")
