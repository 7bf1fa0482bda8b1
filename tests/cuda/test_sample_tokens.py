"""sample_tokens on CUDA: ranges that take several steps of a thread, loads through shared memory, values that only CPUs check,
the same tokens as a CPU. The rest is in tests/ops/test_ops_sampling.py."""

import pytest
import torch
from sample_filters import to_host
from sampling_cases import ALL, assert_same, both, make_rows

import illada
from illada.ops.variants import use_variants

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STEPS_CASES = [
    (1060, 8999, 2.0),
    (140, 70000, 2.0),
]  # ranges so long that a thread takes several steps: one and many vocab tiles


@pytest.mark.parametrize("extras", [(), ALL], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("case", STEPS_CASES)
def test_several_steps_a_thread(case, temperature, extras, device, generator):
    logits = make_rows(case, torch.bfloat16, device, generator, "packed")
    got, want = both(logits, temperature=temperature, seed=3, extras=extras)
    assert_same(got, want, logits)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [(2, 2**20, 2.0), (40, 2**18 + 3, 5.0), (1, 2**22 - 1, 1.0)])
def test_large_vocabularies(case, dtype, temperature, device, generator):
    logits = make_rows(case, dtype, device, generator)
    got, want = both(logits, temperature=temperature, seed=3, extras=ALL)
    assert_same(got, want, logits)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_tokens_as_on_a_cpu(dtype, temperature, device, generator):
    host = make_rows((20, 5003, 0.5), dtype, torch.device("cpu"), generator)
    keywords = {"temperature": temperature, "seed": 12, "step": 3}
    want, got = illada.sample_tokens(host, **keywords), illada.sample_tokens(host.to(device), **keywords)
    assert torch.equal(got.token.cpu(), want.token)
    torch.testing.assert_close(got.confidence.cpu(), want.confidence, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("loads", ["shared_64k", "shared_128k"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [(3, 8, 1.0), (5, 8200, 1.0), (2, 60000, 3.0), (140, 40968, 3.0)], ids=str)
def test_how_logits_are_loaded_changes_nothing(case, dtype, temperature, loads, device, generator):
    # One vector; more than one vocab tile; one CTA per vocab tile; one CTA per row, with more steps than have room.
    logits = make_rows((min(case[0], 5), *case[1:]), dtype, device, generator)
    logits = logits[torch.arange(case[0], device=device) % len(logits)]
    bias = (torch.tensor([0, 7, case[1] - 1], dtype=torch.int32), torch.tensor([1.0, -torch.inf, 4.0]))
    for logit_bias in (None, tuple(t.to(device) for t in bias)):
        keywords = {"temperature": temperature, "seed": 3, "extras": ALL, "logit_bias": logit_bias}
        want = to_host(illada.sample_tokens(logits, **keywords))
        with use_variants(sample_tokens=loads):
            got = to_host(illada.sample_tokens(logits, **keywords))
        for name, field, other in zip(want._fields, got, want, strict=True):
            assert torch.equal(field, other), name  # bit for bit


@pytest.mark.parametrize("loads", ["shared_64k", "shared_128k"])
def test_rows_that_cannot_go_through_shared_memory(loads, device, generator):
    # Of an odd length; of 32-bit elements.
    odd = make_rows((3, 1001, 1.0), torch.bfloat16, device, generator)
    single = make_rows((3, 4096, 1.0), torch.float32, device, generator)
    for logits in (odd, single):
        want = to_host(illada.sample_tokens(logits, temperature=1.0, seed=3))
        with use_variants(sample_tokens=loads):
            got = to_host(illada.sample_tokens(logits, temperature=1.0, seed=3))
        assert torch.equal(got.token, want.token) and torch.equal(got.confidence, want.confidence)


def bias(device, ids, values):
    return torch.tensor(ids, dtype=torch.int32, device=device), torch.tensor(values, device=device)


@pytest.mark.parametrize("value", [9.0, -torch.inf, torch.inf, torch.nan])
def test_biased_ids_outside_of_the_vocabulary_are_skipped(value, device, generator):
    logits = make_rows((2, 2101, 1.0), torch.float32, device, generator)  # the last vector holds 2096 .. 2103
    plain = illada.sample_tokens(logits, logit_bias=bias(device, [2100], [0.5]))
    outside = illada.sample_tokens(
        logits, logit_bias=bias(device, [2100, 2101, 2103, 2**31 - 1, -1], [0.5] + [value] * 4)
    )
    for a, b in zip(plain[:3], outside[:3], strict=True):
        assert torch.equal(a, b)
