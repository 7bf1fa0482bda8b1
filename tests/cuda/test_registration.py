"""The ops as torch ops on CUDA tensors: schema, fakes, tracing, compilation of a whole step."""

from functools import partial

import pytest
import torch
from devices import tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

import illada

OPS = [
    "sample_tokens",
    "linear_sample_tokens",
    "remask",
    "attention_plan",
    "varlen_attention_fwd",
    "varlen_attention_bwd",
    "masked_ce_fwd",
    "masked_ce_bwd",
    "masked_ce_shard_fwd",
    "linear_masked_ce_fwd",
    "linear_masked_ce_bwd",
]
ARGUMENTS = (0.7, 3, 2, None, None, None, None, None, None, 0, 0, 1.0, None, None, False, True, False)


def op_calls(device, generator):
    logits = torch.randn(4, 33, generator=generator).to(device)
    hidden, weight = (
        torch.randn(6, 8, generator=generator).to(device),
        torch.randn(33, 8, generator=generator).to(device),
    )
    rows = torch.tensor([1, 5, 0, 7], dtype=torch.int32, device=device)
    cu_rows = torch.tensor([0, 1, 4], dtype=torch.int32, device=device)
    tokens, token = torch.full((8,), 5, device=device), torch.arange(4, device=device)
    confidence, entropy = torch.rand(2, 4, generator=generator).to(device)
    limits, end_ids = torch.full((2,), 0.3, device=device), token[:2]
    q = torch.randn(6, 4, 64, generator=generator).to(torch.float16).to(device)
    k, v = q[:, :2].clone(), q[:, 2:].clone()
    starts = torch.tensor([0, 2, 6], dtype=torch.int32, device=device)
    plan = illada.attention_plan(starts, num_heads=4, num_kv_heads=2, head_dim=64, total_q=6)
    out, lse = illada.varlen_attention(q, k, v, starts, plan=plan, return_lse=True)
    weights, scalar, fp32 = (
        torch.rand(4, generator=generator).to(device),
        torch.tensor(2.0, device=device),
        torch.float32,
    )
    return {
        "masked_ce_fwd": (logits.clone().requires_grad_(), token, weights, scalar, 0.5, False),
        "masked_ce_bwd": (
            logits,
            token,
            weights,
            scalar,
            0.5,
            torch.stack([confidence] * 2, dim=-1),
            scalar,
            entropy,
            0,
        ),
        "masked_ce_shard_fwd": (logits, token, weights, 2),
        "linear_masked_ce_fwd": (
            *(hidden.clone().requires_grad_(), weight.clone().requires_grad_(), tokens[:6], confidence.repeat(2)[:6]),
            *(rows % 6, scalar, 0.5, 3, True, True, fp32, fp32, 0.0),
        ),
        "linear_masked_ce_bwd": (scalar, hidden, weight),
        "sample_tokens": (logits, *ARGUMENTS),
        "linear_sample_tokens": (hidden, weight, rows % 6, *ARGUMENTS),
        "attention_plan": (starts, None, None, 6, 6, 4, 2, 64),
        "varlen_attention_fwd": (q, k, v, plan.work, 2, 0.125, False),
        "varlen_attention_bwd": (q, lse, q, k, v, out, lse, plan.work, 2, 0.125, True),
        "remask": (tokens, rows, cu_rows, token, confidence, entropy, 1, 0.0, limits, 5, 1, end_ids),
    }


@pytest.mark.parametrize("op", OPS)
def test_schema(op, device, generator):
    call = getattr(torch.ops.illada, op).default
    torch.library.opcheck(
        call, op_calls(device, generator)[op], test_utils=("test_schema", "test_autograd_registration")
    )


@pytest.mark.parametrize("op", OPS)
def test_fakes(op, device, generator):
    call, arguments = getattr(torch.ops.illada, op).default, op_calls(device, generator)[op]
    want = call(*arguments)
    with _disable_current_modes(), FakeTensorMode() as mode:
        got = call(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
    if isinstance(got, torch.Tensor):
        got, want = (got,), (want,)
    for fake, real in zip(got, want, strict=True):
        for name in ("shape", "dtype", "device"):
            assert getattr(fake, name) == getattr(real, name)
        assert fake.stride() == real.stride()


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, device, generator):
    tracing()
    torch.library.opcheck(getattr(torch.ops.illada, op).default, op_calls(device, generator)[op])


def test_sampling_compiles_in_one_graph(device, generator):
    logits = torch.randn(4, 33, generator=generator).to(device)
    want = illada.sample_tokens(logits, temperature=0.5, seed=2)
    compiled = torch.compile(illada.sample_tokens, fullgraph=True, backend="aot_eager")
    with _disable_current_modes():  # nothing but our own kernel runs
        got = compiled(logits, temperature=0.5, seed=2)
    assert torch.equal(got.token, want.token) and torch.equal(got.logprob, want.logprob)


def test_step_compiles_in_one_graph(device, generator):
    tracing()

    def step(tokens, hidden, weight, rows, cu_rows):
        sample = illada.linear_sample_tokens(hidden, weight, rows=rows, temperature=0.5, seed=2)
        logits = torch.nn.functional.linear(hidden[rows.long()], weight)
        greedy = illada.sample_tokens(logits)
        return illada.remask(tokens, rows, cu_rows, sample, quota=2, mask_id=5), greedy.token

    hidden, weight = (
        torch.randn(20, 8, generator=generator).to(device),
        torch.randn(40, 8, generator=generator).to(device),
    )
    rows = torch.arange(3, 20, 2, dtype=torch.int32, device=device)
    cu_rows = torch.tensor([0, 5, 9], dtype=torch.int32, device=device)
    want_tokens = torch.full((20,), 5, device=device)
    got_tokens = want_tokens.clone()
    want = step(want_tokens, hidden, weight, rows, cu_rows)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(got_tokens, hidden, weight, rows, cu_rows)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]) and torch.equal(got_tokens, want_tokens)


def test_loss_of_logits_compiles_in_one_graph(device, generator):
    logits, targets = torch.randn(4, 33, generator=generator).to(device), torch.arange(4, device=device)
    weights = torch.ones(4, device=device)
    want = illada.masked_cross_entropy(logits, targets, weights, return_nll=True, return_lse=True)
    compiled = torch.compile(illada.masked_cross_entropy, fullgraph=True, backend="aot_eager")
    with _disable_current_modes():  # nothing but our own kernels run
        got = compiled(logits, targets, weights, return_nll=True, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_attention_compiles_once_for_all_sizes(device):
    """No size of a pack is built into the graph: the plan's rows are a formula without cases."""
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    def call(q, starts):
        return illada.varlen_attention(q, q[:, :2], q[:, :2], starts)

    compiled = torch.compile(call, fullgraph=True, backend=backend, dynamic=True)
    with _disable_current_modes(), FakeTensorMode():
        for total, sequences in ((6, 2), (700, 3), (9000, 40)):
            q = torch.empty(total, 4, 64, dtype=torch.float16, device=device)
            out = compiled(q, torch.empty(sequences + 1, dtype=torch.int32, device=device))
            assert out.shape == q.shape
    assert len(graphs) == 1


@pytest.mark.parametrize("op", ["masked_cross_entropy", "varlen_attention"])
def test_functions_past_the_dispatcher_do_the_same(op, device, generator):
    if op == "masked_cross_entropy":
        x, targets = torch.randn(4, 33, generator=generator).to(device), torch.arange(4, device=device)
        weights = torch.ones(4, device=device)
        function = partial(illada.masked_cross_entropy, targets=targets, token_weights=weights)
        registered = partial(torch.ops.illada.masked_ce_fwd, targets=targets, token_weights=weights, normalizer=None)
        registered = partial(registered, scale=1.0, inplace_backward=False)
    else:
        x = torch.randn(6, 2, 64, generator=generator).to(torch.bfloat16).to(device)
        starts = torch.tensor([0, 2, 6], dtype=torch.int32, device=device)
        plan = illada.attention_plan(starts, num_heads=2, num_kv_heads=2, head_dim=64, total_q=6)
        function = partial(illada.varlen_attention, k=x.clone(), v=x.clone(), cu_seqlens=starts, plan=plan)
        registered = partial(torch.ops.illada.varlen_attention_fwd, k=x.clone(), v=x.clone(), plan=plan.work)
        registered = partial(registered, num_sequences=2, softmax_scale=0.125, deterministic=False)
    x.requires_grad_()
    factor = torch.ones((), device=device) if op == "masked_cross_entropy" else torch.ones_like(x)
    with _disable_current_modes():  # which would lead to the dispatcher
        got = function(x)
        want = registered(x)[0]
        (got_grad,), (want_grad,) = (torch.autograd.grad(out, x, factor) for out in (got, want))
    assert type(got.grad_fn) is type(want.grad_fn)
    assert torch.equal(got, want) and torch.equal(got_grad, want_grad)
