"""masked_cross_entropy_from_labels against F.cross_entropy."""

import pytest
import torch
import torch.nn.functional as F

import illada

SHAPES = [(6,), (2, 3), (2, 3, 2)]
IGNORED = -100


def problem(shape, generator):
    hidden = torch.randn(*shape, 8, generator=generator, requires_grad=True)
    head = torch.randn(11, 8, generator=generator, requires_grad=True)
    labels = torch.randint(11, shape, generator=generator)
    labels.view(-1)[[0, 3]] = IGNORED
    return hidden, head, labels, torch.rand(shape, generator=generator)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_mean_of_the_labels_that_count(shape, fused, weighted, generator):
    hidden, head, labels, weights = problem(shape, generator)
    nll = F.cross_entropy((hidden @ head.T).flatten(0, -2), labels.flatten(), reduction="none", ignore_index=IGNORED)
    want = (nll * (weights.flatten() if weighted else 1)).sum() / (labels != IGNORED).sum()
    inputs, keywords = (hidden, {"head": head}) if fused else (hidden @ head.T, {})
    weights = weights.double() if weighted else None
    got = illada.masked_cross_entropy_from_labels(inputs, labels, weights=weights, **keywords)
    torch.testing.assert_close(got, want)
    if not weighted:
        torch.testing.assert_close(got, F.cross_entropy((hidden @ head.T).flatten(0, -2), labels.flatten()))
    for a, b in zip(*(torch.autograd.grad(loss, (hidden, head)) for loss in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_another_number_and_another_ignored_label(generator):
    hidden, head, labels, weights = problem((2, 3), generator)
    labels = labels.masked_fill(labels == IGNORED, 0).int()
    got = illada.masked_cross_entropy_from_labels(
        hidden, labels, head=head, weights=weights > 0.5, ignore_index=0, normalizer=7
    )
    counts = (labels.flatten() != 0) & (weights.flatten() > 0.5)
    nll = F.cross_entropy((hidden @ head.T).flatten(0, -2), labels.flatten().long(), reduction="none")
    torch.testing.assert_close(got, nll[counts].sum() / 7)


def test_nothing_to_learn(generator):
    hidden, head, labels, _ = problem((2, 3), generator)
    loss = illada.masked_cross_entropy_from_labels(hidden, torch.full_like(labels, IGNORED), head=head)
    assert loss == 0 and not torch.autograd.grad(loss, hidden)[0].any()


def test_errors(generator):
    hidden, head, labels, weights = problem((2, 3), generator)
    loss = illada.masked_cross_entropy_from_labels
    for error, match, call in [
        (ValueError, r"labels must have shape \[2, 3\], got \[6\]", lambda: loss(hidden, labels.flatten(), head=head)),
        (
            ValueError,
            r"weights must have shape \[2, 3\], got \[2\]",
            lambda: loss(hidden, labels, weights=weights[:, 0]),
        ),
        (ValueError, "must have at least 2 dimensions, got", lambda: loss(hidden[0, 0], labels[0, 0])),
        (
            ValueError,
            "weights must not require grad; pass weights.detach",
            lambda: loss(hidden, labels, head=head, weights=weights.clone().requires_grad_()),
        ),
        (
            TypeError,
            "weights must be real, got complex64",
            lambda: loss(hidden, labels, head=head, weights=weights + 0j),
        ),
        (TypeError, "labels must be int64, int32, got float32", lambda: loss(hidden, labels.float(), head=head)),
        (ValueError, r"targets?.* is 11", lambda: loss(hidden, labels.fill_(11), head=head)),
    ]:
        with pytest.raises(error, match=match):
            call()
