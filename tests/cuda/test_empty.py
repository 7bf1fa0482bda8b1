"""Sizes of 0 in every op: defined results, and never a launch of an empty grid, which CUDA refuses.

What the public functions give on a GPU is what they give on a CPU. The raw calls are the C++ API one to one; they get
buffers that hold something else before.
"""

import itertools

import pytest
import torch

import illada
from illada.ops import raw, reference
from illada.ops.op_types import RemaskStatus, TokenSample

BF16 = torch.bfloat16
MOST_TOKENS = 300


def on(device, x):
    """Return the tensors of nested tuples and dicts on `device`, and everything else as it is."""
    if isinstance(x, torch.Tensor):
        return x.detach().to(device).requires_grad_(x.requires_grad)
    if isinstance(x, (tuple, list)):
        return tuple(on(device, part) for part in x)
    return {name: on(device, part) for name, part in x.items()} if isinstance(x, dict) else x


def flat(x) -> list[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        return [x.detach().cpu()]
    return [] if x is None else [part for inner in x for part in flat(inner)]


def same_on_both(call, device, *arguments, rtol=1e-2, **keywords):
    """Check that `call` gives the same shapes, dtypes and values on a GPU as on a CPU; return the GPU's."""
    got = flat(call(*on(device, arguments), **on(device, keywords)))
    want = flat(call(*on("cpu", arguments), **on("cpu", keywords)))
    assert len(got) == len(want) > 0
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=rtol, atol=rtol)
    return got


# ----------------------------------------------------------------------------------------------------------- attention

PACKS = [  # sequences, queries, keys; the queries are the first sequence's, the keys the last one's
    *((0, 0, keys) for keys in (0, 1, 64, 127, 128, MOST_TOKENS)),
    *((s, q, k) for s in (1, 3) for q, k in ((0, 0), (0, 5), (0, MOST_TOKENS), (5, 0), (70, 0))),
    *((0, q, k) for q in (5, MOST_TOKENS) for k in (0, 7, MOST_TOKENS)),  # queries of no sequence
    (1, 5, 7),
    (3, 5, 7),
]


def starts(sequences, count, first):
    """Return cumulative lengths with all of `count` in the first or in the last sequence."""
    inner = [count if first else 0] * max(sequences - 1, 0)
    return torch.tensor([0, *inner, *[count] * bool(sequences)], dtype=torch.int32)


def make_attention(pack, dim, generator):
    sequences, queries, keys = pack
    q = torch.randn(queries, 4, dim, generator=generator).to(BF16)
    k, v = torch.randn(2, keys, 2, dim, generator=generator).to(BF16)
    return (q, k, v), (starts(sequences, queries, True), starts(sequences, keys, False))


@pytest.mark.parametrize("deterministic,recompute", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_raw_attention(dim, deterministic, recompute, device, generator):
    for pack in PACKS:
        tensors, lengths = make_attention(pack, dim, generator)
        (q, k, v), (cu_q, cu_k) = on(device, tensors), on(device, lengths)
        (sequences, queries, keys), sizes = pack, (4, 2, dim)
        plan = torch.full((raw.attention_plan_rows(queries, keys, sequences, *sizes), 4), 7, device=device).int()
        raw.attention_plan(plan, cu_q, cu_k, None, queries, keys, *sizes)
        out, lse = torch.full_like(q, 7), torch.full((4, queries), 7.0, device=device)
        size = raw.varlen_attention_workspace(queries, sequences, *sizes)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        raw.varlen_attention(out, lse, q, k, v, plan, sequences, 0.125, workspace=workspace)
        gradients = [torch.full_like(x, 7) for x in (q, k, v)]
        size = raw.varlen_attention_backward_workspace(queries, keys, sequences, *sizes, deterministic, recompute, 0)
        raw.varlen_attention_backward(
            *gradients, torch.ones_like(q), None, q, k, v, out, lse, plan, sequences, 0.125,
            workspace=torch.empty(size, dtype=torch.uint8, device=device),
            deterministic=deterministic, recompute_scores_for_dq=recompute,
        )  # fmt: skip
        if (sequences, queries, keys) == (1, 5, 7):
            exact = [x.double().requires_grad_() for x in tensors]
            want = reference.varlen_attention(*exact, lengths[0], cu_seqlens_k=lengths[1], softmax_scale=0.125)
            wanted = (want, *torch.autograd.grad(want, exact, torch.ones_like(want)))
            for g, w in zip((out, *gradients), wanted, strict=True):
                torch.testing.assert_close(g.cpu().double(), w, rtol=2e-2, atol=2e-2)
        else:  # no query has a key
            assert (lse == -torch.inf).all() and all((x == 0).all() for x in (out, *gradients)), pack


@pytest.mark.parametrize("deterministic", [False, True])
def test_attention(deterministic, device, generator):
    def call(q, k, v, cu_q, cu_k, plan_first):
        plan = None
        if plan_first:
            sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "total_q": len(q), "total_k": len(k)}
            plan = illada.attention_plan(cu_q, cu_seqlens_k=cu_k, **sizes)
        keywords = {"plan": plan, "deterministic": deterministic, "return_lse": True}
        out, lse = illada.varlen_attention(q, k, v, cu_q, cu_seqlens_k=cu_k, **keywords)
        return out, lse, torch.autograd.grad([out, lse.nan_to_num(neginf=0.0)], [q, k, v], [out + 1, lse * 0 + 1])

    for pack in PACKS:
        tensors, lengths = make_attention(pack, 64, generator)
        leaves = [x.requires_grad_() for x in tensors]
        out, lse, *gradients = same_on_both(call, device, *leaves, *lengths, False, rtol=3e-2)
        assert len(same_on_both(call, device, *leaves, *lengths, True, rtol=3e-2)) == 5
        if pack[1:] != (5, 7):
            assert (lse == -torch.inf).all() and not any(x.any() for x in (out, *gradients)), pack


def test_attention_workspaces_of_shapes_that_calls_refuse(device):
    """Sizes are asked for before anything is checked: whatever they are, nothing is divided by 0."""
    for queries, keys, sequences, heads, kv_heads in itertools.product((0, 5), (0, 5), (0, 1), (0, 2), (0, 2)):
        shape = (queries, sequences, heads, kv_heads, 64)
        assert raw.attention_plan_rows(queries, keys, *shape[1:]) > 0
        assert raw.varlen_attention_workspace(*shape) >= 0
        for deterministic, recompute in itertools.product((False, True), repeat=2):
            backward = raw.varlen_attention_backward_workspace(queries, keys, *shape[1:], deterministic, recompute, 0)
            assert backward >= 0


# ------------------------------------------------------------------------------------------------------- cross-entropy


def make_logits(tokens, vocab, dtype, generator):
    logits = torch.randn(tokens, vocab, generator=generator).to(dtype).requires_grad_()
    return logits, torch.randint(0, vocab, (tokens,), generator=generator), torch.ones(tokens)


def grads_of(outputs, leaves):
    """Return the gradients of the sum of all tensors that have one."""
    outputs = [x for x in outputs if x.requires_grad]
    return torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs], allow_unused=True)


@pytest.mark.parametrize("tokens,count", [(0, None), (0, 0), (3, 0), (3, 2)])
@pytest.mark.parametrize("vocab", [1, 9, 20000])
def test_masked_cross_entropy(tokens, count, vocab, device, generator):
    rows = None if count is None else torch.arange(count, dtype=torch.int32)

    def call(logits, targets, weights, rows, normalizer, inplace):
        leaf = logits.detach().clone().requires_grad_()
        results = illada.masked_cross_entropy(
            2 * leaf, targets, weights, rows=rows, normalizer=normalizer, inplace_backward=inplace, return_nll=True,
            return_lse=True,
        )  # fmt: skip
        return *results, grads_of(results, [leaf])

    for dtype, inplace in ((BF16, False), (torch.float32, True)):
        arguments = make_logits(tokens, vocab, dtype, generator)
        for normalizer in (None, 3.0, torch.tensor(3.0)):
            got = same_on_both(call, device, *arguments, rows, normalizer, inplace)
            if not count:
                assert not any(x.any() for x in got)


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("vocab", [1, 9, 20000])
@pytest.mark.parametrize("vocab_start", [0, 9])
def test_shards(tokens, vocab, vocab_start, device, generator):
    """Where the ids of a shard hold the target or not, and where no token has a weight."""
    logits, targets, weights = make_logits(tokens, vocab, torch.float32, generator)

    def call(logits, targets, weights):
        lse, logit = illada.ops.masked_cross_entropy_shard(logits, targets, weights, vocab_start=vocab_start)
        grad = illada.ops.masked_cross_entropy_shard_grad(logits, targets, weights, lse + 1, vocab_start=vocab_start)
        return lse, logit, grad

    for its_weights in (weights, 0 * weights):
        _, logit, _ = same_on_both(call, device, logits, targets, its_weights, rtol=1e-5)
        assert bool(logit.any()) == bool(tokens and its_weights.any() and vocab > vocab_start)


def test_no_vocabulary(device):
    for where in ("cpu", device):
        logits = torch.zeros(3, 0, device=where)
        targets, weights = torch.zeros(3, dtype=torch.int64, device=where), torch.ones(3, device=where)
        with pytest.raises(ValueError, match="vocab_size must be positive"):
            illada.masked_cross_entropy(logits, targets, weights)
        with pytest.raises(ValueError, match="vocab_size must be positive"):
            illada.ops.masked_cross_entropy_shard(logits, targets, weights, vocab_start=0)
        with pytest.raises(ValueError, match="weight must have at least one row"):
            illada.linear_masked_cross_entropy(logits[:, :0], logits[:0], targets, weights)
        with pytest.raises(ValueError, match="the vocabulary is empty"):
            illada.sample_tokens(logits)
        with pytest.raises(ValueError, match="the vocabulary is empty"):
            illada.linear_sample_tokens(logits[:, :0], logits[:0])


def test_raw_cross_entropy(device, generator):
    """No rows of logits among tokens that there are, rows among no tokens, sums of nothing."""
    for tokens, count, vocab in itertools.product((0, 3), (0, 2), (9, 20000)):
        logits = torch.randn(count, vocab, generator=generator).to(device)
        targets, weights = torch.zeros(tokens, dtype=torch.int64, device=device), torch.ones(tokens, device=device)
        rows = torch.arange(count, dtype=torch.int32, device=device)
        nll, lse, target_logit = (torch.full((count,), 7.0, device=device) for _ in range(3))
        lse_parts = torch.full((count, 2), 7.0, device=device)
        grad = torch.full_like(logits, 7)
        size = raw.masked_cross_entropy_workspace(count, vocab, logits.device)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        results = {"nll": nll, "lse": lse, "lse_parts": lse_parts, "target_logit": target_logit, "grad": grad}
        raw.masked_cross_entropy(logits, targets, weights, rows=rows, **results, workspace=workspace)
        other = torch.full_like(logits, 7)
        raw.masked_cross_entropy_backward(other, logits, targets, weights, lse_parts, rows=rows)
        if tokens == 0:
            assert not any(x.any() for x in (*results.values(), other))
        else:
            assert all((x != 7).all() for x in (*results.values(), other))
    loss, none = torch.full((), 7.0, device=device), torch.empty(0, device=device)
    raw.weighted_sum(loss, none, none, normalizer=torch.tensor(3.0, device=device))
    assert loss == 0
    raw.scale(none, torch.full((), 7.0, device=device))


# ------------------------------------------------------------------------------------------------------ the fused head


def make_head(tokens, width, vocab, dtype, generator):
    hidden = (torch.randn(tokens, width, generator=generator) / 8).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocab, (tokens,), generator=generator), torch.ones(tokens)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("tokens,count", [(0, None), (0, 0), (5, 0), (5, None)])
@pytest.mark.parametrize("width", [0, 8, 64])
def test_linear_masked_cross_entropy(width, tokens, count, dtype, device, generator):
    rows = None if count is None else torch.arange(count, dtype=torch.int32)

    def call(hidden, weight, targets, weights, rows, chunk_rows, total):
        total = None if total is None else total.clone()
        results = illada.linear_masked_cross_entropy(
            hidden, weight, targets, weights, rows=rows, chunk_rows=chunk_rows, grad_weight=total, return_nll=True
        )
        leaves = [x for x in (hidden, weight) if x.requires_grad and (total is None or x is hidden)]
        return *results, *(grads_of(results, leaves) if leaves else ()), total

    hidden, weight, targets, weights = make_head(tokens, width, 300, dtype, generator)
    for of_hidden, of_weight in itertools.product((False, True), repeat=2):
        head = hidden.detach().requires_grad_(of_hidden), weight.detach().requires_grad_(of_weight)
        for total in (None, torch.ones(300, width)):
            for chunk_rows in (None, 1):
                loss, nll, *gradients = same_on_both(
                    call, device, *head, targets, weights, rows, chunk_rows, total, rtol=3e-2
                )
                if not tokens or count == 0:
                    assert loss == 0 and not nll.any()
                    kept = gradients[:-1] if total is not None else gradients
                    assert not any(x.any() for x in kept)
                    assert total is None or (gradients[-1] == 1).all()


@pytest.mark.parametrize("tokens,count", [(0, None), (0, 0), (5, 0), (0, 2)])
def test_raw_linear_masked_cross_entropy(tokens, count, device, generator):
    hidden, weight, targets, weights = on(device, make_head(tokens, 64, 300, BF16, generator))
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("there is a fused kernel on sm_90a only")
    assert raw.linear_masked_cross_entropy_workspace(hidden, weight) is not None
    rows = None if count is None else torch.arange(count, dtype=torch.int32, device=device)
    for add, dtype, filter_eps in itertools.product((False, True), (torch.float32, BF16), (0.0, 1e-4)):
        nll, d_hidden = torch.full((tokens,), 7.0, device=device), torch.full_like(hidden, 7)
        d_weight = torch.full((300, 64), 7, dtype=dtype, device=device)
        size = raw.linear_masked_cross_entropy_workspace(hidden, weight, rows, filter_eps=filter_eps)
        raw.linear_masked_cross_entropy(
            *(nll, hidden, weight, targets, weights, rows), hidden_grad=d_hidden, weight_grad=d_weight,
            add_to_weight_grad=add, filter_eps=filter_eps,
            workspace=torch.empty(size, dtype=torch.uint8, device=device),
        )  # fmt: skip
        assert (d_weight == (7 if add else 0)).all()
        assert (nll == 7).all() and (d_hidden == 7).all()  # of tokens that are not listed nothing is written


# ---------------------------------------------------------------------------------------------------------- remasking

ALL = ("entropy", "margin")


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("vocab", [1, 9, 20000])
@pytest.mark.parametrize("biases", [None, 0, 2])
def test_sample_tokens(rows, vocab, biases, device, generator):
    logits = torch.randn(rows, vocab, generator=generator)
    for shape in ((biases,), (rows, biases)):
        bias = None if biases is None else (torch.zeros(shape, dtype=torch.int32), torch.ones(shape))
        for extras in ((), ALL):
            same_on_both(illada.sample_tokens, device, logits, temperature=0.5, logit_bias=bias, extras=extras)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("tokens,count", [(0, None), (0, 0), (5, 0), (5, None), (5, 2)])
@pytest.mark.parametrize("width", [0, 8, 64])
def test_linear_sample_tokens(width, tokens, count, dtype, device, generator):
    hidden, weight, _, _ = make_head(tokens, width, 300, dtype, generator)
    rows = None if count is None else torch.arange(count, dtype=torch.int32)
    arguments = (hidden.detach(), weight.detach())
    got = same_on_both(illada.linear_sample_tokens, device, *arguments, rows=rows, extras=ALL, rtol=3e-2)
    assert all(field.shape == (tokens if count is None else count,) for field in got)


def test_raw_linear_sample_tokens_of_no_tokens(device, generator):
    """Rows that lie outside of hidden, of which there is nothing: they are taken as zeros."""
    hidden, weight, _, _ = on(device, make_head(0, 64, 300, BF16, generator))
    rows = torch.arange(2, dtype=torch.int32, device=device)
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("there is a fused kernel on sm_90a only")
    size = raw.linear_sample_tokens_workspace(hidden, weight, rows)
    assert size is not None
    out = TokenSample(torch.full((2,), -7, device=device), *torch.full((4, 2), -7.0, device=device))
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    raw.linear_sample_tokens(out, hidden, weight, rows, workspace=workspace)
    assert out.token.tolist() == [0, 0]
    torch.testing.assert_close(out.confidence.cpu(), torch.full((2,), 1 / 300))


@pytest.mark.parametrize("sequences,rows,tokens", [(0, 0, 0), (0, 0, 4), (3, 0, 0), (3, 0, 4), (1, 4, 4), (3, 4, 4)])
def test_remask(sequences, rows, tokens, device):
    sample = TokenSample(torch.arange(rows), *torch.linspace(0.1, 0.9, rows).expand(4, rows).unbind())
    cu_rows = starts(sequences, rows, True)

    def call(canvas, positions, cu_rows, sample, end_ids, rule):
        canvas = canvas.clone()
        status = illada.remask(
            canvas, positions, cu_rows, TokenSample(*sample), mask_id=-1, end_ids=end_ids, return_status=True, **rule
        )
        return canvas, status

    positions = torch.arange(rows, dtype=torch.int32)
    for dtype in (torch.int64, torch.int32):
        canvas = torch.full((tokens,), -1, dtype=dtype)
        for end_ids in (None, torch.empty(0, dtype=torch.int64), torch.tensor([3])):
            for rule in ({"quota": 0}, {"quota": 2}, {"threshold": torch.full((sequences,), 0.5)}, {"factor": 0.5}):
                got = same_on_both(call, device, canvas, positions, cu_rows, sample, end_ids, rule)
                committed, remaining, finished, ended = got[1:]
                assert all(len(field) == sequences for field in got[1:])
                if not rows:
                    assert not committed.any() and not remaining.any() and finished.all() and not ended.any()


def test_raw_remask_of_nothing(device):
    none, ids = (torch.empty(0, dtype=dtype, device=device) for dtype in (torch.int32, torch.int64))
    for sequences in (0, 2):
        fields = [torch.full((sequences,), True, device=device).to(d) for d in (*[torch.int32] * 2, *[torch.bool] * 2)]
        cu_rows = torch.zeros(sequences + 1, dtype=torch.int32, device=device)
        confidence = torch.empty(0, device=device)
        arguments = (ids, none, cu_rows, ids, confidence, None, 0, 1.0, None, -1, 1, None)
        raw.remask(RemaskStatus(*fields), *arguments)
        assert [x.tolist() for x in fields] == [[0] * sequences] * 2 + [[True] * sequences, [False] * sequences]
