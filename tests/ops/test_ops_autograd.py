"""What autograd is told: which arguments were written to, and which derivatives there are not."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import illada
from illada.ops import raw
from illada.ops.op_types import RemaskStatus, TokenSample

TARGETS, WEIGHTS = torch.tensor([1, 4, 0]), torch.tensor([1.0, 0.0, 2.0])
STARTS = torch.tensor([0, 2, 3], dtype=torch.int32)
CHANGED = "modified by an inplace operation"


# --------------------------------------------------------------------------------------------- arguments written to


@pytest.mark.parametrize("activation", [torch.tanh, torch.exp, torch.sigmoid, lambda x: x.softmax(-1)])
def test_logits_that_their_function_keeps_may_not_become_the_gradient(activation, generator):
    hidden = torch.randn(3, 7, generator=generator, requires_grad=True)
    loss = illada.masked_cross_entropy(activation(hidden), TARGETS, WEIGHTS, inplace_backward=True)
    with pytest.raises(RuntimeError, match=CHANGED):
        loss.backward()


def test_logits_used_twice_may_not_become_the_gradient(generator):
    hidden = torch.randn(3, 7, generator=generator, requires_grad=True)
    logits = hidden * 2
    # The node that was made last is run first: the loss's, before that of the square.
    loss = logits.square().sum() + illada.masked_cross_entropy(logits, TARGETS, WEIGHTS, inplace_backward=True)
    with pytest.raises(RuntimeError, match=CHANGED):
        loss.backward()


@pytest.mark.parametrize("under", ["checkpoint", "save_on_cpu"])
def test_logits_saved_through_hooks_do_not_become_the_gradient(under, generator):
    """Autograd compares no versions of what went through hooks: tanh would take the gradient for its result."""
    hidden = torch.randn(3, 7, generator=generator, requires_grad=True)

    def function(x, **keywords):
        return illada.masked_cross_entropy(torch.tanh(x), TARGETS, WEIGHTS, **keywords)

    (want,) = torch.autograd.grad(function(hidden), hidden)
    if under == "checkpoint":
        loss = checkpoint(function, hidden, inplace_backward=True, use_reentrant=False)
    else:
        with torch.autograd.graph.save_on_cpu():
            loss = function(hidden, inplace_backward=True)
    (got,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_remask_changes_the_version_of_tokens(dtype):
    tokens, rows = torch.tensor([5, 7, 5], dtype=dtype), torch.tensor([0, 2], dtype=torch.int32)
    sample = TokenSample(torch.tensor([1, 2]), torch.tensor([0.9, 0.8]), torch.zeros(2))
    embedding = torch.nn.Embedding(9, 4)
    before = embedding(tokens)
    illada.remask(tokens, rows, torch.tensor([0, 2], dtype=torch.int32), sample, quota=1, mask_id=5)
    with pytest.raises(RuntimeError, match=CHANGED):
        before.sum().backward()
    with torch.inference_mode():  # tensors without a version
        tokens = torch.tensor([5, 7, 5], dtype=dtype)
        illada.remask(tokens, rows, torch.tensor([0, 2], dtype=torch.int32), sample, quota=1, mask_id=5)
    assert tokens.tolist() == [1, 7, 5]


def test_shard_gradient_in_place_changes_the_version_of_logits(generator):
    logits = torch.randn(3, 7, generator=generator)
    lse, _ = illada.ops.masked_cross_entropy_shard(logits, TARGETS, WEIGHTS, vocab_start=0)
    illada.ops.masked_cross_entropy_shard_grad(logits, TARGETS, WEIGHTS, lse, vocab_start=0)
    assert logits._version == 0
    illada.ops.masked_cross_entropy_shard_grad(logits, TARGETS, WEIGHTS, lse, vocab_start=0, inplace=True)
    assert logits._version > 0


def test_grad_weight_changes_its_version(generator):
    hidden, weight = torch.randn(3, 8, generator=generator), torch.randn(7, 8, generator=generator)
    total = torch.zeros(7, 8)
    kept = total * torch.ones((), requires_grad=True)
    illada.linear_masked_cross_entropy(hidden, weight, TARGETS, WEIGHTS, grad_weight=total)
    assert total.any()
    with pytest.raises(RuntimeError, match=CHANGED):
        kept.sum().backward()


def test_raw_calls_change_the_versions_of_what_they_write(generator):
    logits, lse = torch.randn(3, 7, generator=generator), torch.zeros(3, 2)
    raw.masked_cross_entropy(logits, TARGETS, WEIGHTS, lse_parts=lse, grad=logits)
    assert logits._version == lse._version == 1
    raw.masked_cross_entropy_backward(logits, torch.randn(3, 7, generator=generator), TARGETS, WEIGHTS, lse)
    assert logits._version == 2
    sample = TokenSample(torch.zeros(3, dtype=torch.int64), torch.zeros(3), torch.zeros(3))
    raw.sample_tokens(sample, logits)
    assert [t._version for t in sample[:3]] == [1, 1, 1]
    tokens, rows = torch.zeros(3, dtype=torch.int64), torch.arange(3, dtype=torch.int32)
    status = RemaskStatus(*(torch.zeros(1, dtype=d) for d in (torch.int32, torch.int32, torch.bool, torch.bool)))
    cu_rows = torch.tensor([0, 3], dtype=torch.int32)
    raw.remask(status, tokens, rows, cu_rows, *sample[:2], None, 0, 1.0, None, 0, 1, None)
    assert [t._version for t in (tokens, *status)] == [1] * 5
    q, plan = torch.randn(3, 1, 8, generator=generator), torch.tensor([[0, 3, 0, 3]], dtype=torch.int32)
    out, lse = torch.zeros(3, 1, 8), torch.zeros(1, 3)
    raw.varlen_attention(out, lse, q, q, q, plan, 1, 1.0)
    assert out._version == lse._version == 1


# -------------------------------------------------------------------------------------- derivatives that do not exist


def function_of(op, generator):
    """Return (a differentiable op as a function of one tensor, that tensor)."""
    x = torch.randn(3, 1, 8, generator=generator)
    if op == "varlen_attention":
        return lambda q: illada.varlen_attention(q, x, x, STARTS).square().sum(), x.clone()
    if op == "masked_cross_entropy":
        return lambda logits: illada.masked_cross_entropy(logits, TARGETS, WEIGHTS), x[:, 0]
    if op == "inplace_backward":
        return lambda x: illada.masked_cross_entropy(x * 1.0, TARGETS, WEIGHTS, inplace_backward=True), x[:, 0]
    weight, total = torch.randn(7, 8, generator=generator), torch.zeros(7, 8)
    into = {"grad_weight": total} if op == "grad_weight" else {}
    return lambda hidden: illada.linear_masked_cross_entropy(hidden, weight, TARGETS, WEIGHTS, **into), x[:, 0]


OPS = ["varlen_attention", "masked_cross_entropy", "inplace_backward", "linear_masked_cross_entropy", "grad_weight"]
NO_TANGENT = "forward-mode|forward mode|jvp"


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_forward_mode_raises(op, needs_grad, generator):
    function, x = function_of(op, generator)
    tangent = torch.ones_like(x)
    x.requires_grad_(needs_grad)
    with pytest.raises((RuntimeError, NotImplementedError), match=NO_TANGENT):
        torch.func.jvp(function, (x,), (tangent,))
    with pytest.raises((RuntimeError, NotImplementedError), match=NO_TANGENT):
        torch.func.jacfwd(function)(x)
    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError), match=NO_TANGENT):
        function(forward_ad.make_dual(x, tangent))
    with torch.no_grad(), forward_ad.dual_level():
        with pytest.raises((RuntimeError, NotImplementedError), match=NO_TANGENT):
            function(forward_ad.make_dual(x, tangent))
        assert function(x.detach()).isfinite()  # nothing of it has a tangent


@pytest.mark.parametrize("half", ["forward", "logits", "lse"])
def test_forward_mode_of_shards_raises(half, generator):
    logits, start = torch.randn(3, 7, generator=generator), {"vocab_start": 0}
    lse, _ = illada.masked_cross_entropy_shard(logits, TARGETS, WEIGHTS, **start)
    function, x = {
        "forward": (lambda x: illada.masked_cross_entropy_shard(x, TARGETS, WEIGHTS, **start), logits),
        "logits": (lambda x: illada.masked_cross_entropy_shard_grad(x, TARGETS, WEIGHTS, lse, **start), logits),
        "lse": (
            lambda x: illada.masked_cross_entropy_shard_grad(logits, TARGETS, WEIGHTS, x, inplace=True, **start),
            lse,
        ),
    }[half]
    with pytest.raises(NotImplementedError, match=NO_TANGENT):
        torch.func.jvp(function, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=NO_TANGENT):
        function(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize("op", OPS)
def test_forward_mode_over_a_gradient_raises(op, generator):
    function, x = function_of(op, generator)
    x.requires_grad_()
    with forward_ad.dual_level():
        factor = forward_ad.make_dual(torch.tensor(1.0), torch.tensor(1.0))
        with pytest.raises((RuntimeError, NotImplementedError), match=NO_TANGENT):
            torch.autograd.grad(function(x) * factor, x)


@pytest.mark.parametrize("derive", [lambda total, x: total.backward(), torch.autograd.grad], ids=["backward", "grad"])
@pytest.mark.parametrize("op", OPS)
def test_a_second_derivative_raises(op, derive, generator):
    function, x = function_of(op, generator)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="second derivative"):
        loss = function(x)
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        derive(loss + gradient.square().sum(), x)


@pytest.mark.parametrize("loss", ["masked_cross_entropy", "linear_masked_cross_entropy"])
def test_weights_that_want_a_gradient_are_refused(loss, generator):
    weights = WEIGHTS.clone().requires_grad_()
    hidden, weight = torch.randn(3, 8, generator=generator), torch.randn(7, 8, generator=generator)
    inputs = (hidden, weight) if loss == "linear_masked_cross_entropy" else (hidden,)
    with pytest.raises(ValueError, match="token_weights must not require grad; pass token_weights.detach"):
        getattr(illada, loss)(*inputs, TARGETS, weights)
    with torch.no_grad():
        assert getattr(illada, loss)(*inputs, TARGETS, weights).isfinite()


@pytest.mark.parametrize("op", OPS)
def test_vmap_over_gradients_is_right_or_raises(op, generator):
    function, x = function_of(op, generator)
    x.requires_grad_()
    (want,) = torch.autograd.grad(function(x), x)
    factors = torch.tensor([1.0, -2.0])
    for batched in (
        lambda: torch.autograd.grad(function(x), x, factors, is_grads_batched=True)[0],
        lambda: torch.func.jacrev(lambda x: function(x) * factors)(x.detach()),
        lambda: torch.func.vmap(lambda f: torch.func.grad(lambda x: function(x) * f)(x.detach()))(factors),
    ):
        try:
            got = batched()
        except RuntimeError:
            continue
        torch.testing.assert_close(got, factors.view(2, *(1,) * x.dim()) * want)


# -------------------------------------------------------------------------------------------- tensors without memory


def test_zero_tensors_are_zeros(generator):
    """Autograd may pass tensors of zeros that have no memory. Address 0 must not stand for a gradient left out."""
    zeros = torch._efficientzerotensor
    logits = torch.randn(3, 7, generator=generator, requires_grad=True)
    loss = illada.masked_cross_entropy(logits, TARGETS, WEIGHTS)
    assert (torch.autograd.grad(loss, logits, zeros(()))[0] == 0).all()
    _, lse = illada.masked_cross_entropy(logits, TARGETS, WEIGHTS, return_lse=True)
    assert (torch.autograd.grad(lse, logits, zeros(3))[0] == 0).all()
    want = illada.masked_cross_entropy(torch.zeros(3, 7), TARGETS, WEIGHTS)
    assert illada.masked_cross_entropy(zeros(3, 7), TARGETS, WEIGHTS) == want
    q = torch.randn(3, 2, 8, generator=generator, requires_grad=True)
    plan = illada.attention_plan(STARTS, num_heads=2, num_kv_heads=2, head_dim=8, total_q=3)
    out = illada.varlen_attention(q, q, q, STARTS, plan=plan)
    assert (torch.autograd.grad(out, q, zeros(3, 2, 8))[0] == 0).all()
