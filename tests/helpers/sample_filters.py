"""Checks of top_k, top_p and confidence_at_temperature that hold on every device."""

from __future__ import annotations

import torch
from torch import Tensor

import illada
from illada.ops import reference
from illada.ops.op_types import TokenSample

ALL = ("entropy", "margin")
CASES = [  # N, V, spread: what the rows are for
    (8, 1, 1.0),  # one word
    (9, 7, 1.0),  # less than a vector
    (8, 1025, 4.0),
    (9, 20003, 2.0),  # several vocab tiles, an odd length
]
#: Settings that a batch of rows takes in turn: temperature, top_k, top_p. The first three rows ask for nothing.
SETTINGS = [
    (0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 2**31 - 1, 1.0), (1.0, 5, 1.0), (1.5, 0, 0.9), (0.7, 40, 0.5), (2.0, 1, 0.3),
    (0.0, 3, 0.4), (0.05, 300, 0.999), (3.0, 700, 0.99), (1.0, 0, 1e-30), (1e-40, 0, 0.9),
]  # fmt: skip


def per_row(count: int, device: torch.device) -> dict[str, Tensor]:
    """Return the arguments of `count` rows from SETTINGS."""
    temperature, top_k, top_p = zip(*(SETTINGS[n % len(SETTINGS)] for n in range(count)), strict=True)
    return {
        "temperature": torch.tensor(temperature, device=device),
        "top_k": torch.tensor(top_k, dtype=torch.int32, device=device),
        "top_p": torch.tensor(top_p, device=device),
    }


def to_host(sample: TokenSample) -> TokenSample:
    return TokenSample(*(None if field is None else field.cpu() for field in sample))


def assert_close(got: TokenSample, want: TokenSample) -> None:
    assert torch.equal(got.token.cpu(), want.token)
    for name, g, w in zip(got._fields[1:], got[1:], want[1:], strict=True):
        torch.testing.assert_close(
            g.cpu().double(), w, rtol=1e-5, atol=2e-6, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def check_reference(
    logits: Tensor, device: torch.device, *, at_temperature: bool, logit_bias=None, measure="probability"
) -> None:
    """Check rows with their own settings; rows without filters equal those of a call without filters."""
    settings = per_row(len(logits), torch.device("cpu"))
    keywords = {"seed": 2**40 + 3, "step": 5, "extras": ALL, "measure": measure}
    want = reference.sample_tokens(
        logits, **settings, **keywords, logit_bias=logit_bias, confidence_at_temperature=at_temperature
    )
    moved = None if logit_bias is None else tuple(t.to(device) for t in logit_bias)
    settings = {name: tensor.to(device) for name, tensor in settings.items()}
    got = illada.sample_tokens(
        logits.to(device), **settings, **keywords, logit_bias=moved, confidence_at_temperature=at_temperature
    )
    assert_close(got, want)
    plain = illada.sample_tokens(logits.to(device), temperature=settings["temperature"], **keywords, logit_bias=moved)
    for name, g, p in zip(got._fields, got, plain, strict=True):
        if name == "token" or not at_temperature:
            assert torch.equal(g[:3], p[:3]), name  # bit for bit


def check_kept_ids(device: torch.device) -> None:
    """Check that adversarial rows sample all the ids that they may, and no others."""
    inf = torch.inf
    cases = [  # row, temperature, top_k, top_p, kept
        ([0.0, 0.0, 0.0, 0.0], 1.0, 0, 0.4, [0, 1]),  # ties: the lowest ids
        ([0.0, 0.0, 0.0, 0.0], 1.0, 0, 0.5, [0, 1]),  # 0.5 is reached
        ([-0.0, 0.0, -0.0, 0.0], 1.0, 0, 0.7, [0, 1, 2]),
        ([0.0, 5.0, 0.0, 5.0], 1.0, 1, 1.0, [1, 3]),  # ties of top_k: all
        ([0.0, 0.2, 0.0, 0.2], 2.0, 3, 1.0, [0, 1, 2, 3]),
        ([0.0, 0.2, 0.0, 0.2], 2.0, 2, 0.3, [1]),  # top_p of what top_k leaves
        ([1.0, 2.0, 1.5], 1.0, 9, 1.0, [0, 1, 2]),
        ([1.0, 3.0, 2.0], 1.0, 0, 1e-30, [1]),
        ([1e30, 3.0, -1e30], 1e30, 0, 0.7, [0, 1]),
        ([-inf, 3.0, 2.0], 1.0, 3, 1.0, [1, 2]),
        ([-inf, 3.0, -inf], 1.0, 2, 0.99, [1]),
        ([3e38, -3e38, 3e38, 2.9e38], 1e37, 2, 1.0, [0, 2]),
        ([0.0, -50.0, -50.5, -51.0], 100.0, 2, 1.0, [0, 1]),
        ([0.1 * (n % 3) for n in range(99)], 1.0, 0, 0.2, list(range(2, 56, 3))),
    ]  # fmt: skip
    for row, temperature, top_k, top_p, kept in cases:
        logits = torch.tensor([row], device=device)
        many = logits.expand(25 * len(kept) + 40, -1)
        sample = illada.sample_tokens(many, temperature=temperature, top_k=top_k, top_p=top_p, seed=4)
        assert sorted(set(sample.token.tolist())) == kept, (row, top_k, top_p)
        x = torch.tensor(row, dtype=torch.float64)
        specified = reference.kept_ids(x, temperature, top_k, top_p) & (x > -inf)
        assert specified.nonzero()[:, 0].tolist() == kept, (row, top_k, top_p)


def check_entropy_of_one_kept_id(device: torch.device) -> None:
    """Check that one kept id has entropy exactly 0, wherever it is: such rows tie in confidence."""
    logits = torch.zeros(6, 301)
    logits[torch.arange(6), torch.tensor([0, 7, 15, 160, 299, 300])] = 40.0
    removed = torch.where(logits > 0, logits, -torch.inf)
    for row_logits, options in ((logits, {"top_k": 1}), (logits, {"top_p": 0.9}), (removed, {})):
        got = illada.sample_tokens(
            row_logits.to(device), temperature=0.1, **options, seed=3, extras=("entropy",), measure="entropy",
            confidence_at_temperature=True,
        )  # fmt: skip
        assert (got.entropy == 0).all() and (got.confidence == 0).all()


def check_broken_rows(device: torch.device) -> None:
    """Check that a row without a softmax has the token that it has without filters, and is never committed."""
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor([[nan, 1.0, 2.0], [inf, 1.0, inf], [-inf, -inf, -inf], [1.0, inf, nan]], device=device)
    for temperature in (0.0, 0.5):
        plain = illada.sample_tokens(logits, temperature=temperature, seed=3)
        for at_temperature in (False, True):
            got = illada.sample_tokens(
                logits, temperature=temperature, seed=3, top_k=1, top_p=0.5, extras=ALL,
                confidence_at_temperature=at_temperature,
            )  # fmt: skip
            assert torch.equal(got.token, plain.token)
            assert got.confidence.tolist() == [-inf] * 4 == got.logprob.tolist()
            assert got.entropy.isnan().all() and got.margin.isnan().all()


def check_frequencies(device: torch.device, generator: torch.Generator, draws: int = 60_000) -> None:
    """Check by chi-square that frequencies are the renormalised softmax of what top_k and then top_p leave."""
    logits = torch.randn(65, generator=generator) * 1.5
    temperature, top_k, top_p = 2.0, 50, 0.9
    tokens = illada.sample_tokens(
        logits.to(device).expand(draws, -1), temperature=temperature, top_k=top_k, top_p=top_p, seed=11
    ).token.cpu()
    kept = reference.kept_ids(logits.double(), temperature, top_k, torch.tensor(top_p).item())
    observed = torch.bincount(tokens, minlength=65)
    assert 10 < int(kept.sum()) < 50 and not observed[~kept].any()
    expected = (logits.double() / temperature)[kept].softmax(0) * draws
    chi_square = float(((observed[kept] - expected) ** 2 / expected).sum())
    freedom = int(kept.sum()) - 1
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5
