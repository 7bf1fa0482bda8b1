"""The plan of attention: who works on what, against what the lengths say.

Layout: csrc/attention/plan.h. A plan is right when its items cover every (query, key-value head) and every key of it once,
in an order that balances; how it is cut is the kernels' business.
"""

import collections
import itertools

import pytest
import torch

import illada
from illada.ops import raw
from illada.ops.attention import plan_rows

ITEM = ("q_start", "q_count", "k_start", "k_count", "kv_head", "split", "splits", "first_slot")
Item = collections.namedtuple("Item", ITEM)
SLOTS = 320


def cut(lengths, keys, starts_k=None):
    """Return [(q_start, q_count, k_start, k_count)] of each sequence."""
    starts = list(itertools.accumulate(lengths, initial=0))
    starts_k = list(itertools.accumulate(keys, initial=0)) if starts_k is None else starts_k
    return list(zip(starts, lengths, starts_k, keys, strict=False))


class Plan:
    """The content of a plan's tensor."""

    def __init__(self, work, capacity):
        rows = work.cpu()
        forward, backward, sequences, flags = rows[0].tolist()
        self.has_idle_keys = bool(flags & 0xFFFF)
        self.sequences = rows[len(rows) - sequences :].tolist()
        first = 1 + 2 * capacity
        self.forward = [Item(*x) for x in rows[1 : 1 + 2 * forward].reshape(-1, 8).tolist()]
        self.backward = [Item(*x) for x in rows[first : first + 2 * backward].reshape(-1, 8).tolist()]


def capacity(total_q, sequences, heads, kv_heads):
    """Return the number of forward items that there is room for."""
    return (plan_rows(total_q, None, sequences, heads, kv_heads) - 1 - sequences) // 2


def make(lengths, device, *, heads=8, kv_heads=2, dim=128, **slots):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    slots = {name: torch.tensor(x, dtype=torch.int32, device=device) for name, x in slots.items()}
    total_k = {} if not slots else {"total_k": int(slots["cu_seqlens_k"].max())}
    plan = illada.attention_plan(
        cu_seqlens, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, total_q=sum(lengths), **slots, **total_k
    )
    return Plan(plan.work, capacity(sum(lengths), len(lengths), heads, kv_heads))


def check(plan, sequences, kv_heads):
    """Check a plan against `sequences`, which `cut` gives."""
    wanted = collections.Counter()
    for q, q_count, k, k_count in sequences:
        for token, head in itertools.product(range(q, q + q_count), range(kv_heads)):
            wanted[token, head, k, k_count] += 1
    seen = collections.Counter()
    slots = []
    splits = collections.defaultdict(list)
    for item in plan.forward:
        assert item.q_count > 0 and 0 <= item.split < item.splits
        splits[item.q_start, item.q_count, item.kv_head].append(item)
    for (q, q_count, head), parts in splits.items():
        assert [part.split for part in sorted(parts, key=lambda part: part.split)] == list(range(parts[0].splits))
        parts.sort(key=lambda part: part.split)
        for a, b in itertools.pairwise(parts):
            assert a.k_start + a.k_count == b.k_start and a.first_slot == b.first_slot
        if len(parts) > 1:
            assert all(part.k_count > 0 for part in parts)
            slots += range(parts[0].first_slot, parts[0].first_slot + len(parts))
        for token in range(q, q + q_count):
            seen[token, head, parts[0].k_start, sum(part.k_count for part in parts)] += 1
    assert seen == wanted
    assert sorted(slots) == list(range(len(slots))) and len(slots) <= SLOTS
    costs = [item.k_count for item in plan.forward]
    if not slots:
        assert costs == sorted(costs, reverse=True)
    if 0 in costs:
        assert not any(costs[costs.index(0) :])
    assert sorted(plan.sequences) == sorted([q, q + n, k, k + m] for q, n, k, m in sequences)
    keys = [row[3] - row[2] for row in plan.sequences]
    assert keys == sorted(keys, reverse=True)


def check_backward(plan, sequences, kv_heads):
    wanted = collections.Counter(
        (key, head, q, n) for q, n, k, m in sequences for key in range(k, k + m) for head in range(kv_heads)
    )
    seen = collections.Counter(
        (key, item.kv_head, item.q_start, item.q_count)
        for item in plan.backward
        for key in range(item.k_start, item.k_start + item.k_count)
    )
    assert seen == wanted and all(0 < item.k_count <= 128 for item in plan.backward)
    keys_of = {key: (k, m) for _, _, k, m in sequences for key in range(k, k + m)}
    for item in plan.backward:  # a sequence's tiles know how many they are
        first, count = keys_of[item.k_start]
        assert (item.split, item.splits) == ((item.k_start - first) // 128, -(-count // 128))
    queries = [item.q_count for item in plan.backward]
    assert queries == sorted(queries, reverse=True)


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (8, 2), (7, 1), (16, 2), (64, 1)])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_every_query_and_key_once(heads, kv_heads, dim, device):
    lengths = [300, 0, 1, 65, 129, 0, 64]
    plan = make(lengths, device, heads=heads, kv_heads=kv_heads, dim=dim)
    check(plan, cut(lengths, lengths), kv_heads)
    check_backward(plan, cut(lengths, lengths), kv_heads)


@pytest.mark.parametrize("lengths", [[300, 0, 65], [0], []])
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (8, 2), (7, 1)])
@pytest.mark.parametrize("rest", [1, 200])
def test_queries_behind_the_last_sequence(rest, heads, kv_heads, lengths, device):
    """They are a part of their own, without keys: behind all that has keys, in no tile of keys, and no sequence."""
    owned = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": 64, "total_q": owned + rest}
    room = capacity(owned + rest, len(lengths), heads, kv_heads)
    plan = Plan(illada.attention_plan(cu_seqlens, **sizes).work, room)
    sequences = cut(lengths, lengths)
    assert len(plan.sequences) == len(lengths)
    plan.sequences.append([owned, owned + rest, 0, 0])  # what `check` expects of a part
    check(plan, [*sequences, (owned, rest, 0, 0)], kv_heads)
    check_backward(plan, sequences, kv_heads)
    behind = [item for item in plan.forward if item.q_start >= owned]
    assert behind == plan.forward[len(plan.forward) - len(behind) :] and all(item.splits == 1 for item in behind)
    assert len(plan.forward) <= room and plan.has_idle_keys  # the keys of the same tokens


@pytest.mark.parametrize("sequences", [1, 10])
def test_queries_behind_split_sequences(sequences, device):
    """There is room for them beside the key splits, and they are not split."""
    rest, keys = 300, [9000, *[8] * (sequences - 1)]
    lengths, starts_k = [32] * sequences, [0, *itertools.accumulate(keys)]
    cu_seqlens, cu_seqlens_k = (torch.tensor(x).int().to(device) for x in (range(0, 32 * sequences + 1, 32), starts_k))
    total, heads, kv_heads = 32 * sequences + rest, 32, 8
    work = illada.attention_plan(
        cu_seqlens, cu_seqlens_k=cu_seqlens_k, num_heads=heads, num_kv_heads=kv_heads, head_dim=64, total_q=total
    ).work
    plan = Plan(work, capacity(total, sequences, heads, kv_heads))
    assert any(item.splits > 1 for item in plan.forward)
    plan.sequences.append([32 * sequences, total, 0, 0])
    check(plan, [*cut(lengths, keys), (32 * sequences, rest, 0, 0)], kv_heads)


def test_idle_keys(device):
    """Whether there are keys that no sequence uses, whose gradients somebody must write."""
    for lengths, starts, used, idle in (
        ([5, 40], [0, 100, 300], [100, 200], False),
        ([5, 40], [0, 100, 300], [100, 199], True),
        ([5, 40], [1, 100, 300], [99, 200], True),
        ([0, 40], [0, 100, 300], [100, 200], False),
    ):
        assert make(lengths, device, cu_seqlens_k=starts, seqused_k=used).has_idle_keys == idle
    assert not make([5, 0, 40], device).has_idle_keys


def test_slots_that_start_anywhere_and_are_partly_used(device):
    lengths, starts, used = [5, 40, 0, 3, 9], [7, 107, 150, 150, 1000, 3000], [100, 0, 0, 700, 1999]
    plan = make(lengths, device, cu_seqlens_k=starts, seqused_k=used)
    check(plan, cut(lengths, used, starts), 2)
    check_backward(plan, cut(lengths, used, starts), 2)


def test_more_sequences_than_a_block_of_threads(device):
    lengths = [(7 * i) % 23 for i in range(600)]
    plan = make(lengths, device, heads=4, kv_heads=1)
    check(plan, cut(lengths, lengths), 1)
    check_backward(plan, cut(lengths, lengths), 1)


def test_a_long_sequence_is_not_split_and_its_tiles_share_keys(device):
    lengths = [4000, 100]
    plan = make(lengths, device, heads=32, kv_heads=8)
    check(plan, cut(lengths, lengths), 8)
    assert all(item.splits == 1 for item in plan.forward)
    heads = [item.kv_head for item in plan.forward if item.k_count == 4000]
    assert heads == sorted(heads)  # what runs at the same time reads the same keys


def test_few_queries_and_many_keys_are_split(device):
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    plan = make([32], device, heads=32, kv_heads=8, cu_seqlens_k=[0, 8192], seqused_k=[8192])
    check(plan, cut([32], [8192]), 8)
    assert 0.6 * multiprocessors <= len(plan.forward) <= SLOTS
    # Enough tiles for every multiprocessor: nothing is gained by splitting them evenly long.
    plan = make([32] * 33, device, heads=32, kv_heads=8, cu_seqlens_k=[64 * i for i in range(34)], seqused_k=[64] * 33)
    check(plan, cut([32] * 33, [64] * 33), 8)
    assert all(item.splits == 1 for item in plan.forward)


def test_splits_follow_the_lengths(device):
    """Where every multiprocessor has two tiles, long with short ones, nothing is split; one that outweighs all is."""

    def made(used):
        starts = list(itertools.accumulate(used, initial=0))
        plan = make([32] * len(used), device, heads=4, kv_heads=1, cu_seqlens_k=starts, seqused_k=used)
        check(plan, cut([32] * len(used), used), 1)
        return plan.forward

    count = 2 * torch.cuda.get_device_properties(device).multi_processor_count - 8
    assert all(item.splits == 1 for item in made([1024 + 7168 * i // count for i in range(count)]))
    items = made([100] * 40 + [30_000] + [130] * 40)
    splits = [item for item in items if item.splits > 1]
    assert len(items) - len(splits) == 80 and max(item.k_count for item in splits) < 2000


def test_lengths_that_make_no_sense_stay_inside(device):
    """They are cut, never followed: no item reaches beyond the tensors, and no more items than there is room for."""
    total, heads, kv_heads = 50, 8, 2
    for values in ([0, 60, 20, 70], [-5, 10, 1 << 30, 50], [50, 0, 50, 0], [0, 50, 0, 50], [-1, -2, -3, -4]):
        starts = torch.tensor(values, dtype=torch.int32, device=device)
        for slots in ({}, {"seqused_k": torch.tensor([-7, 1 << 30, 5], dtype=torch.int32, device=device)}):
            work = illada.attention_plan(
                starts, num_heads=heads, num_kv_heads=kv_heads, head_dim=64, total_q=total, **slots
            ).work
            plan = Plan(work, capacity(total, 3, heads, kv_heads))
            assert len(plan.forward) <= capacity(total, 3, heads, kv_heads)
            for item in plan.forward + plan.backward:
                assert 0 <= item.q_start and item.q_start + item.q_count <= total and item.q_count >= 0
                assert 0 <= item.k_start and item.k_start + item.k_count <= total and item.k_count >= 0
                assert 0 <= item.kv_head < kv_heads


def test_replays_see_other_lengths(device):
    first, second = [100, 0, 40, 7], [7, 90, 0, 50]
    cu_seqlens = torch.tensor([0, *first]).cumsum(0).int().to(device)
    total = 147

    def call():
        return illada.attention_plan(cu_seqlens, num_heads=8, num_kv_heads=2, head_dim=128, total_q=total).work

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work = call()
    for lengths in (first, second):
        cu_seqlens.copy_(torch.tensor([0, *lengths]).cumsum(0))
        graph.replay()
        check(Plan(work, capacity(total, 4, 8, 2)), cut(lengths, lengths), 2)


def test_rows_are_those_of_the_native_side():
    """The shape that torch.compile believes in."""
    for total_q, total_k, sequences, (heads, kv_heads), dim in itertools.product(
        (0, 1, 127, 4096, 100_000),
        (None, 0, 5000),
        (1, 33, 700),
        ((1, 1), (7, 1), (32, 8), (32, 32), (12, 4), (64, 1)),
        (64, 96, 128, 256),
    ):
        native = raw.attention_plan_rows(total_q, total_k, sequences, heads, kv_heads, dim)
        assert native == plan_rows(total_q, total_k, sequences, heads, kv_heads)


def test_raw_call_checks_its_output(device):
    starts = torch.tensor([0, 5], dtype=torch.int32, device=device)
    rows = raw.attention_plan_rows(5, 5, 1, 4, 2, 64)
    with pytest.raises(ValueError, match=f"out must have {rows} rows"):
        raw.attention_plan(starts.new_empty(rows - 1, 4), starts, None, None, 5, 5, 4, 2, 64)
    with pytest.raises(ValueError, match="the raw call takes CUDA tensors"):
        raw.attention_plan(starts.new_empty(rows, 4).cpu(), starts.cpu(), None, None, 5, 5, 4, 2, 64)
    out = starts.new_empty(rows, 4)
    raw.attention_plan(out, starts, None, None, 5, 5, 4, 2, 64)
    want = illada.attention_plan(starts, num_heads=4, num_kv_heads=2, head_dim=64, total_q=5).work
    assert Plan(out, capacity(5, 1, 4, 2)).forward == Plan(want, capacity(5, 1, 4, 2)).forward
