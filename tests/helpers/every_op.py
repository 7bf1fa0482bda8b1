"""Every public op, forward, backward and compiled, against plain torch. A program: one wheel's test in several torches."""

import torch
import torch.distributed as dist

import illada
from illada.ops import reference

torch.manual_seed(0)
STARTS = torch.tensor([0, 5, 12], dtype=torch.int32)
WEIGHTS, TARGETS = torch.tensor([0.0, 2.0, 1.5] * 4), torch.randint(50, (12,))
ARRAYS = {"heads": (12, 4, 16), "logits": (12, 50), "hidden": (12, 16), "head": (50, 16)}
LABELS = torch.where(WEIGHTS > 0, TARGETS, -100)


def attention(ops):
    def attend(heads):
        options = {}
        if ops is illada:
            sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "total_q": 12}
            options["plan"] = illada.attention_plan(STARTS, **sizes)
        return ops.varlen_attention(heads, heads[:, :2], heads[:, 2:], STARTS, **options).square().sum()

    return attend, ("heads",)


def loss(ops):
    return lambda logits: ops.masked_cross_entropy(logits, TARGETS, WEIGHTS, normalizer=3.0), ("logits",)


def loss_from_labels(ops):
    if ops is reference:
        return loss(ops)
    return lambda x: ops.masked_cross_entropy_from_labels(x, LABELS, weights=WEIGHTS, normalizer=3.0), ("logits",)


def linear_loss(ops):
    return lambda x, w: ops.linear_masked_cross_entropy(x, w, TARGETS, WEIGHTS, normalizer=3.0), ("hidden", "head")


def vocab_parallel_loss(ops):
    if ops is reference:
        return linear_loss(ops)
    options = {"vocab_start": 0, "normalizer": 3.0}
    parallel = illada.linear_masked_cross_entropy_vocab_parallel
    return lambda x, w: parallel(x, w, TARGETS, WEIGHTS, **options), ("hidden", "head")


def results(make, ops, compiled=False):
    """Return the value and the gradients."""
    function, names = make(ops)
    torch.manual_seed(1)
    inputs = [torch.randn(ARRAYS[name], requires_grad=True) for name in names]
    value = (torch.compile(function, fullgraph=True) if compiled else function)(*inputs)
    return value.detach(), *torch.autograd.grad(value, inputs)


def shards(logits):
    """Return loss and gradient of one shard that holds all ids."""
    lse, target = illada.masked_cross_entropy_shard(logits, TARGETS, WEIGHTS, vocab_start=0)
    grad = illada.masked_cross_entropy_shard_grad(logits, TARGETS, WEIGHTS, lse, vocab_start=0, normalizer=3.0)
    return (WEIGHTS * (lse - target)).sum().float() / 3, grad


def sampling(ops):
    """Return what a step of the sampler writes, with and without logits in memory."""

    def step(logits, hidden, head):
        rows, options = torch.arange(12, dtype=torch.int32), {"temperature": 1.0, "seed": 3, "top_k": 7, "top_p": 0.9}
        written = []
        for sample in (ops.sample_tokens(logits, **options), ops.linear_sample_tokens(hidden, head, **options)):
            tokens = torch.full((12,), 50)
            ops.remask(tokens, rows, STARTS, sample, quota=2, mask_id=50)
            written += [tokens, sample.token]
        return torch.stack(written)

    return step


def check(name, got, want):
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4, msg=lambda said: f"{name}: {said}")  # noqa: B023


dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
for make in (attention, loss, loss_from_labels, linear_loss, vocab_parallel_loss):
    want = results(make, reference)
    check(make.__name__, results(make, illada), want)
    if make is not vocab_parallel_loss:  # its collectives are not traced
        check(f"{make.__name__}, compiled", results(make, illada, compiled=True), want)

torch.manual_seed(1)
arrays = [torch.randn(ARRAYS[name]) for name in ("logits", "hidden", "head")]
check("shards", shards(arrays[0]), results(loss, reference))
check("shards, compiled", torch.compile(shards, fullgraph=True)(arrays[0]), results(loss, reference))
want = sampling(reference)(*arrays)
check("sampling", [sampling(illada)(*arrays)], [want])
check("sampling, compiled", [torch.compile(sampling(illada), fullgraph=True)(*arrays)], [want])
dist.destroy_process_group()
print("every op", torch.__version__, illada.__file__)
