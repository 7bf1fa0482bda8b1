"""The forward process: a pure function of (seed, sample index), with the right probabilities."""

import numpy as np
import pytest
import torch

from illada.diffusion import (
    _ROUND,
    DiffusionConfig,
    _source_of_draw,
    draw_masks,
    make_batch,
    make_validation_batch,
    permutation,
    shares,
    window_of_sample,
    window_of_weighted_sample,
)

MASK, EOS = 5, 2
PLAIN = DiffusionConfig(split_probability=0.0)


def windows_of(samples, length=64):
    return 10 + (np.asarray(samples)[:, None] * 7 + np.arange(length)) % 50


def batch_of(samples, config=PLAIN, length=64, **kwargs):
    samples = np.asarray(samples)
    return make_batch(windows_of(samples, length), samples, seed=3, mask_id=MASK, config=config, **kwargs)


def sequences(batch):
    """Return (targets, weights) of each sequence."""
    bounds = batch.cu_seqlens.tolist()
    return [(batch.targets[a:b], batch.token_weights[a:b]) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def test_fields_agree():
    batch = batch_of(range(20), DiffusionConfig())
    masked = batch.token_weights > 0
    assert torch.equal(batch.rows.long(), masked.nonzero().squeeze(-1)) and batch.rows.dtype == torch.int32
    assert torch.equal(batch.tokens, torch.where(masked, MASK, batch.targets))
    assert batch.num_tokens == 20 * 64 == batch.cu_seqlens[-1]
    assert batch.targets.reshape(20, 64).tolist() == windows_of(range(20)).tolist()
    for start, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        assert batch.position_ids[start:end].tolist() == list(range(end - start))
        weights = batch.token_weights[start:end]
        assert len(weights[weights > 0].unique()) <= 1  # one t for each sequence
    moved = batch.to("cpu")
    assert torch.equal(moved.tokens, batch.tokens)


@pytest.mark.parametrize(
    "config",
    [
        DiffusionConfig(),
        DiffusionConfig(t_sampling="low_discrepancy"),
        DiffusionConfig(mask_count="exact"),
        DiffusionConfig(complementary=True, t_sampling="low_discrepancy"),
        DiffusionConfig(isolate_documents=True),
        DiffusionConfig(t_limit=0.2, t_limit_windows=4),
    ],
    ids=str,
)
def test_does_not_depend_on_batching(config):
    samples = np.array([0, 1, 2, 3, 2**33, 2**33 + 1])
    extra = {"eos_id": 17, "global_batch": 4}
    whole = batch_of(samples, config, **extra)
    parts = [batch_of(samples[i : i + 1], config, **extra) for i in range(6)]
    assert torch.equal(whole.tokens, torch.cat([p.tokens for p in parts]))
    assert torch.equal(whole.token_weights, torch.cat([p.token_weights for p in parts]))
    lengths = [p.cu_seqlens.diff() for p in parts]
    assert torch.equal(whole.cu_seqlens.diff(), torch.cat(lengths))
    other = make_batch(windows_of(samples), samples, seed=4, mask_id=MASK, config=config, **extra)
    assert not torch.equal(whole.tokens, other.tokens)


def test_masking_probability_and_weight():
    batch = batch_of(range(400), length=256)
    masked = batch.tokens.reshape(400, 256) == MASK
    weights = batch.token_weights.reshape(400, 256).amax(1)
    p = 1 / weights[weights > 0].double()
    rate = masked[weights > 0].double().mean(1)
    deviation = (rate - p) / (p * (1 - p) / 256).sqrt()
    assert deviation.abs().mean() < 1.0 and abs(deviation.mean()) < 0.25  # binomial: mean |z| is 0.8
    assert p.min() >= 1e-3 and abs(p.mean() - 0.5) < 0.06  # t is uniform
    # Unbiased: sum of weights estimates the number of tokens.
    assert abs(batch.token_weights.double().sum() / batch.num_tokens - 1) < 0.1


def test_split_rate_and_points():
    batch = batch_of(range(2000), DiffusionConfig(), length=33)
    lengths = batch.cu_seqlens.diff()
    assert abs((len(lengths) - 2000) / 2000 - 0.3) < 0.03
    assert lengths.min() >= 1 and set(range(1, 34)) == set(lengths.tolist())
    assert len(batch_of(range(50), DiffusionConfig(split_probability=1.0), length=1).cu_seqlens) == 51


def test_low_discrepancy_covers_the_unit_interval():
    batch = batch_of(range(16), DiffusionConfig(split_probability=0.0, t_sampling="low_discrepancy"), 512, global_batch=16)  # fmt: skip
    p = np.sort([1 / float(weights.max()) for _, weights in sequences(batch)])
    np.testing.assert_allclose(np.diff(p), 0.999 / 16, rtol=1e-3)
    with pytest.raises(ValueError, match="make_batch: t_sampling = 'low_discrepancy' needs global_batch"):
        batch_of(range(2), DiffusionConfig(t_sampling="low_discrepancy"))


@pytest.mark.parametrize("t_sampling", ["independent", "low_discrepancy"])
def test_t_has_a_limit_that_rises_to_one(t_sampling):
    config = DiffusionConfig(t_sampling=t_sampling, split_probability=0.0, t_limit=0.2, t_limit_windows=512)
    plain = DiffusionConfig(t_sampling=t_sampling, split_probability=0.0)
    samples = np.arange(1024)

    def times(config):  # of p = (1 - eps) t + eps, whose inverse is the weight
        found = sequences(batch_of(samples, config, length=2048, global_batch=8))
        return (np.array([1 / float(weights.max()) for _, weights in found]) - config.eps) / (1 - config.eps)

    expected = times(plain) * np.minimum(1, 0.2 + 0.8 * samples / 512)
    seen = times(config)
    enough = expected > 0.02  # some token of the sequence is masked, whatever the limit
    assert enough.mean() > 0.9
    np.testing.assert_allclose(seen[enough], expected[enough], rtol=1e-4)


def test_exact_count():
    batch = batch_of(range(200), DiffusionConfig(split_probability=0.0, mask_count="exact"), length=40)
    counts = []
    for _, weights in sequences(batch):
        count = int((weights > 0).sum())
        counts.append(count)
        assert weights.max() == np.float32(40 / count)
    assert min(counts) <= 2 and max(counts) >= 39 and abs(np.mean(counts) - 20.5) < 2.5


def test_complementary_pairs():
    config = DiffusionConfig(complementary=True)
    batch = make_batch(np.repeat(windows_of(range(5)), 2, axis=0), np.arange(10), seed=3, mask_id=MASK, config=config)
    masked = (batch.tokens == MASK).reshape(5, 2, 64)
    assert torch.equal(masked[:, 0], ~masked[:, 1])
    weights = batch.token_weights.reshape(5, 2, 64)
    assert weights.isfinite().all() and weights.max() <= 1 / 1e-3
    pairs = window_of_sample(np.arange(10), 100, 3, config).reshape(5, 2)
    assert (pairs[:, 0] == pairs[:, 1]).all()


def test_isolated_documents():
    tokens = np.array([[10, 11, EOS, 12, EOS, 13, 14, EOS]])
    config = DiffusionConfig(split_probability=0.0, isolate_documents=True)
    batch = make_batch(tokens, np.array([0]), seed=0, mask_id=MASK, config=config, eos_id=EOS)
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 8]
    with pytest.raises(ValueError, match="needs eos_id"):
        make_batch(tokens, np.array([0]), seed=0, mask_id=MASK, config=config)


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 1000])
def test_permutation(size):
    order = permutation(np.arange(size), size, seed=1, epoch=0)
    assert sorted(order.tolist()) == list(range(size))
    if size >= 1000:
        assert (order != permutation(np.arange(size), size, seed=1, epoch=1)).mean() > 0.9
        assert (order != permutation(np.arange(size), size, seed=2, epoch=0)).mean() > 0.9
        assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.1
    assert permutation(np.array([0]), 2**40, seed=0, epoch=3)[0] < 2**40


def test_every_window_once_an_epoch():
    windows = window_of_sample(np.arange(30), 10, seed=5, config=PLAIN).reshape(3, 10)
    for epoch in windows:
        assert sorted(epoch.tolist()) == list(range(10))
    assert windows[0].tolist() != windows[1].tolist()


def test_validation_batch_is_fixed():
    windows = windows_of(range(8), 200)
    first = make_validation_batch(windows, np.arange(8), stratum=1, strata=4, mask_id=MASK)
    again = make_validation_batch(windows[4:], np.arange(4, 8), stratum=1, strata=4, mask_id=MASK)
    assert torch.equal(first.tokens[800:], again.tokens)
    p = 0.999 * 0.375 + 0.001
    assert first.token_weights.max() == np.float32(1 / p)
    assert abs(float((first.tokens == MASK).float().mean()) - p) < 0.05
    assert first.cu_seqlens.tolist() == list(range(0, 1601, 200))


def test_errors():
    for options, match in (
        ({"eps": 0.0}, "diffusion.eps must be positive, got 0.0"),
        ({"split_probability": 1.5}, "diffusion.split_probability must be at most 1, got 1.5"),
        ({"t_sampling": "x"}, "diffusion.t_sampling must be independent or low_discrepancy, got 'x'"),
        ({"mask_count": "x"}, "diffusion.mask_count must be bernoulli or exact"),
        ({"mask_count": "exact", "complementary": True}, "complementary needs"),
        ({"t_limit": 0.0, "t_limit_windows": 8}, "diffusion.t_limit must be positive, got 0.0"),
        ({"t_limit": 0.5}, "t_limit below 1 and diffusion.t_limit_windows above 0 go together, got 0.5 and 0"),
        ({"t_limit_windows": 8}, "go together, got 1.0 and 8"),
        ({"t_limit": 0.5, "t_limit_windows": 8, "complementary": True}, "complementary needs t_limit = 1"),
    ):
        with pytest.raises(ValueError, match=match):
            DiffusionConfig(**options)
    with pytest.raises(ValueError, match=r"shape \[B, L\]"):
        make_batch(np.zeros((2, 0)), np.arange(2), seed=0, mask_id=MASK)
    with pytest.raises(ValueError, match=r"draw_validation_masks: stratum must be in \[0, 4\), got 4"):
        make_validation_batch(np.zeros((1, 4)), np.arange(1), stratum=4, strata=4, mask_id=MASK)
    with pytest.raises(ValueError, match="draw_masks: t_sampling = 'low_discrepancy' needs global_batch"):
        draw_masks(np.arange(1), 4, seed=0, config=DiffusionConfig(t_sampling="low_discrepancy"))
    ramp = {"t_limit": 0.5, "t_limit_windows": 8}
    for option in ({"complementary": True}, {"isolate_documents": True}, {"mask_count": "exact"}, ramp):
        with pytest.raises(
            ValueError, match="draw_masks: config may set eps and t_sampling alone, got DiffusionConfig"
        ):
            draw_masks(np.arange(1), 4, seed=0, config=DiffusionConfig(**option))
    with pytest.raises(ValueError, match="size must be at least 1"):
        permutation(np.arange(1), 0, 0, 0)
    with pytest.raises(ValueError, match=r"positions must be in \[0, 3\)"):
        permutation(np.array([3]), 3, 0, 0)


WEIGHTED = [
    ([30, 300, 7], [1.0, 0.5, 2.0]),
    ([30, 300, 7], [1.0, 0.0, 2.0]),
    ([1, 10**6], [1.0, 2.0]),
    ([0, 5, 9], [3.0, 1.0, 2.0]),
    ([4], [2.5]),
]


def test_the_order_without_weights_is_that_of_earlier_runs():
    expected = [237, 28, 377, 379, 847, 148, 834, 285, 161, 623, 172, 241]
    assert window_of_sample(np.arange(12), 1000, 7, PLAIN).tolist() == expected
    for windows, weights in ([1000], [1.0]), ([300, 700], [1.0, 1.0]), ([300, 0, 700], [2.0, 0.0, 2.0]):
        assert window_of_weighted_sample(np.arange(12), windows, weights, 7, PLAIN).tolist() == expected


@pytest.mark.parametrize(("windows", "weights"), WEIGHTED)
def test_weighted_sources(windows, weights):
    """Shares in every stretch, whole epochs of each source in the order of draws, and access to any draw alone."""
    draws = np.arange(_ROUND - 500, _ROUND + 1000)
    found = window_of_weighted_sample(draws, windows, weights, 3, PLAIN)
    sources = np.searchsorted(np.cumsum(windows), found, side="right")
    drawn = shares(windows, weights)
    assert sum(drawn) == _ROUND
    parts = np.array(windows) * np.array(weights)
    np.testing.assert_allclose(drawn, _ROUND * parts / parts.sum(), atol=len(windows))
    for stretch in sources.reshape(-1, 250):
        np.testing.assert_allclose(np.bincount(stretch, minlength=len(windows)), 250 * parts / parts.sum(), atol=8)
    first = window_of_weighted_sample(np.arange(1000), windows, weights, 3, PLAIN)
    for source, (size, begin) in enumerate(zip(windows, np.cumsum([0, *windows]), strict=False)):
        mine = first[(first >= begin) & (first < begin + size)] - begin
        assert 0 < drawn[source] < 100 or (len(mine) > 0) == (drawn[source] > 0)
        for epoch in range(len(mine) // size if size else 0):
            assert sorted(mine[epoch * size : (epoch + 1) * size]) == list(range(size))
    shuffled = np.random.default_rng(0).permutation(len(draws))
    for chunk in np.array_split(shuffled, 20):
        again = window_of_weighted_sample(draws[chunk], windows, weights, 3, PLAIN)
        np.testing.assert_array_equal(again, found[chunk])
    if sum(part > 0 for part in parts) > 1:
        assert (window_of_weighted_sample(draws, windows, weights, 4, PLAIN) != found).mean() > 0.2


def test_weighted_draws_are_numbered_as_they_are_counted():
    draws = np.arange(2 * _ROUND)
    sources, numbers = _source_of_draw(draws, [5, _ROUND - 12345, 12340], seed=9)
    for source, of_round in enumerate([5, _ROUND - 12345, 12340]):
        np.testing.assert_array_equal(numbers[sources == source], np.arange(2 * of_round))


def test_complementary_samples_share_a_window_of_a_weighted_source():
    pairs = window_of_weighted_sample(np.arange(100), [5, 9], [1.0, 2.0], 3, DiffusionConfig(complementary=True))
    assert (pairs[::2] == pairs[1::2]).all() and len(set(pairs.tolist())) > 5


def test_weights_that_leave_nothing():
    for windows, weights in ([3, 4], [0.0, 0.0]), ([0, 4], [1.0, 0.0]):
        with pytest.raises(ValueError, match="0 sources have a weight and a window"):
            window_of_weighted_sample(np.arange(3), windows, weights, 0, PLAIN)
