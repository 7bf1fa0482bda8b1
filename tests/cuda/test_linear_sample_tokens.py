"""The fused kernel of linear_sample_tokens: many tiles of rows, and the plan that shares the work out. The rest is in
tests/ops/test_ops_linear_sampling.py."""

import numpy as np
import pytest
import torch
from sampling_cases import make_head

import illada
from illada.ops import raw, reference


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("count", [257, 1280, 1409, 5153])
def test_many_row_tiles(count, temperature, device, generator):
    # 3, 10, 12 (one of a single row) and 41 row tiles: odd and even, in one group and in two.
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("the fused kernel needs compute capability 9.0; elsewhere the logits are rounded to 16 bits")
    hidden, weight, rows = make_head((40, count, 8, 3000), torch.bfloat16, device, generator)
    ids = torch.arange(count, device=device) % 40
    got = illada.linear_sample_tokens(hidden, weight, rows=rows, row_ids=ids, temperature=temperature, seed=5)
    exact = hidden[rows.long()].cpu().double() @ weight.cpu().double().T
    if temperature:
        noise = [np.log(-np.log1p(-reference.uniform64(5, n, 0, 3000))) for n in range(40)]
        noisy = exact - torch.from_numpy(np.stack(noise))[ids.cpu()]
    else:
        noisy = exact
    assert torch.equal(got.token.cpu(), noisy.argmax(1))
    want = exact.log_softmax(1).gather(1, got.token.cpu()[:, None])[:, 0]
    torch.testing.assert_close(got.logprob.cpu().double(), want, rtol=1e-5, atol=1e-4)


TILE_ROWS, TILE_IDS, SLICE_IDS = 128, 256, 32
ITEM_COST, CTA_COST = 0.2, 0.1  # in tiles: an item's and a CTA's beginning and end


def busy_share(row_tiles, vocab_size, sm_count):
    """Return the work of real rows and ids, divided by multiprocessors x the busiest one's work and waiting."""
    _, _, _, tasks = raw.head_plan(row_tiles * TILE_ROWS, vocab_size, sm_count)
    load = [CTA_COST] * sm_count
    for cta, _, _, _, tiles in tasks:
        load[cta] += tiles + ITEM_COST
    return row_tiles * -(-vocab_size // TILE_IDS) / (sm_count * max(load))


def check_plan(row_tiles, vocab_size, sm_count):
    """Check that row tiles meet every range once, and pairs of CTAs are in step on neighbouring tiles or ranges."""
    rows = row_tiles * TILE_ROWS
    cluster, ranges, slices, tasks = raw.head_plan(rows, vocab_size, sm_count)
    done = sorted((tile, vocab_range) for _, tile, vocab_range, _, _ in tasks if vocab_range < ranges)
    assert done == [(tile, vocab_range) for tile in range(row_tiles) for vocab_range in range(ranges)]
    assert (ranges - 1) * slices * SLICE_IDS < vocab_size <= ranges * slices * SLICE_IDS
    assert 48 * ranges <= 8192  # bytes of records of a row
    for cta, _, vocab_range, tiles, steps in tasks:
        ids = max(min((vocab_range + 1) * slices * SLICE_IDS, vocab_size) - vocab_range * slices * SLICE_IDS, 0)
        assert 0 <= cta < sm_count and tiles == -(-ids // TILE_IDS) <= steps
    if cluster == 2:
        for (cta, tile, vocab_range, _, steps), (other, other_tile, other_range, _, other_steps) in zip(
            tasks[::2], tasks[1::2], strict=True
        ):
            assert cta % 2 == 0 and other == cta + 1 and steps == other_steps
            assert (other_tile - tile, other_range - vocab_range) in {(1, 0), (0, 1)}


@pytest.mark.parametrize("sm_count", [132, 114, 78])
@pytest.mark.parametrize("vocab_size", [155136, 126464, 50304, 1000])
def test_plan_covers_everything_once(vocab_size, sm_count):
    for row_tiles in (*range(1, 40), 67, 68, 95, 131, 255, 256):
        check_plan(row_tiles, vocab_size, sm_count)


@pytest.mark.parametrize("sm_count", [132, 114, 78])
@pytest.mark.parametrize(
    ("vocab_size", "many", "few"), [(155136, 0.96, 0.88), (126464, 0.96, 0.9), (50304, 0.92, 0.8), (32000, 0.9, 0.66)]
)
def test_multiprocessors_are_busy(vocab_size, many, few, sm_count):
    # All numbers of rows from 1 to 32,768: those of a row tile have the same plan.
    shares = {row_tiles: busy_share(row_tiles, vocab_size, sm_count) for row_tiles in range(2, 257)}
    assert min(share for row_tiles, share in shares.items() if row_tiles >= 32) >= many
    assert min(shares.values()) >= few
    # One row tile waits for the weight and nothing else: its bytes are what is shared out.
    _, ranges, slices, _ = raw.head_plan(1, vocab_size, sm_count)
    assert vocab_size / (sm_count * slices * SLICE_IDS) >= few and ranges <= sm_count


@pytest.mark.parametrize("sm_count", [132, 114, 78])
def test_small_vocabularies_lose_less_than_a_tile_each(sm_count):
    for row_tiles in range(2, 257):
        _, _, _, tasks = raw.head_plan(row_tiles * TILE_ROWS, 1000, sm_count)
        tiles = [0] * sm_count
        for cta, _, _, _, steps in tasks:
            tiles[cta] += steps
        assert max(tiles) <= -(-row_tiles * 4 // sm_count) + 1
