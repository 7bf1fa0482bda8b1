"""Values that break kernels, on CUDA alone: large vocabularies, factors beyond 16 bits, version counters. The rest is in
tests/ops/test_ops_properties.py."""

import properties
import pytest
import torch

import illada


@pytest.mark.slow
@pytest.mark.parametrize("op", ["loss", "sampler"])
def test_more_ids_than_one_range_of_the_vocabulary(op, device, generator):
    """More than 2^14 ids: the fused head's kernels share out the vocabulary, and its last tile is cut."""
    if op == "loss":
        properties.check_linear_loss(torch.bfloat16, device, generator, vocab=16_389)
    else:
        properties.check_linear_sampler(0.7, torch.bfloat16, device, generator, vocab=16_389)


def test_gradients_in_16_bits_take_factors_that_they_cannot_hold(device, generator):
    """65536 is inf in float16, and 1 + 2^-9 is 1 in bfloat16."""
    for dtype, factor in ((torch.float16, 65536.0), (torch.bfloat16, 1 + 2**-9)):
        grad = (torch.randn(40, generator=generator) / 1024).to(dtype)
        got, _ = torch.ops.illada.linear_masked_ce_bwd(
            torch.tensor(factor, device=device), grad.to(device), grad[:0].to(device)
        )
        assert torch.equal(got.cpu(), (grad.double() * factor).to(dtype))


def test_grad_weight_changes_its_version(device, generator):
    hidden, weight = (torch.randn(n, 8, generator=generator).to(device, torch.bfloat16) for n in (3, 33))
    targets, weights = torch.tensor([1, 4, 0], device=device), torch.ones(3, device=device)
    total = torch.zeros(33, 8, device=device)
    kept = total * torch.ones((), device=device, requires_grad=True)
    illada.linear_masked_cross_entropy(hidden, weight, targets, weights, grad_weight=total)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()
