"""The model's loss in the ways trainers run it: the same loss and gradients as one plain pass over all packs."""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from two_processes import gloo, run_in_two

import illada
from illada import LossModule, MaskedDiffusionModel, ModelConfig
from illada.batch import Batch
from illada.diffusion import make_batch
from illada.testing import relative_error

TIED = ModelConfig.preset(
    "tiny", hidden_size=56, intermediate_size=96, num_hidden_layers=2, num_attention_heads=7,
    num_key_value_heads=7, vocab_size=50, max_position_embeddings=64, initializer_range=0.05,
)  # fmt: skip
MODELS = {
    "tied": TIED,
    "tied, wide embedding": dataclasses.replace(TIED, embedding_size=60),
    "untied": dataclasses.replace(TIED, tie_word_embeddings=False, logits_shift=True),
}
LENGTHS = (24, 17, 5, 30)  # of the sequences of each micro-batch: no two count the same


def make_model(name: str = "tied") -> MaskedDiffusionModel:
    return MaskedDiffusionModel(MODELS[name], seed=3)


def make_batches() -> list[Batch]:
    random, config = np.random.default_rng(0), TIED
    return [
        make_batch(random.integers(6, config.vocab_size, (2, n)), np.arange(2) + 2 * i, seed=1, mask_id=config.mask_token_id)
        for i, n in enumerate(LENGTHS)
    ]  # fmt: skip


def joined(batches: list[Batch]) -> Batch:
    """Return one pack of all."""
    starts = np.cumsum([0, *(b.num_tokens for b in batches)])
    return Batch(
        *(torch.cat([getattr(b, name) for b in batches]) for name in ("tokens", "targets", "token_weights")),
        cu_seqlens=torch.cat([batches[0].cu_seqlens[:1], *(b.cu_seqlens[1:] + int(s) for b, s in zip(batches, starts[:-1], strict=True))]).int(),
        position_ids=torch.cat([b.position_ids for b in batches]),
        rows=torch.cat([b.rows + int(s) for b, s in zip(batches, starts[:-1], strict=True)]).int(),
    )  # fmt: skip


def total_tokens() -> float:
    return float(sum(b.num_tokens for b in make_batches()))


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients by the model's own names; whole, where FSDP2 keeps shards."""
    found = {}
    for name, parameter in module.named_parameters():
        grad = parameter.grad
        found[name.removeprefix("module.").removeprefix("model.")] = getattr(grad, "full_tensor", lambda g=grad: g)()
    return found


def plain(name: str = "tied", dtype: torch.dtype | None = None) -> tuple[float, dict[str, torch.Tensor]]:
    """Compute the loss in one process, in one pass over all packs."""
    model = make_model(name).to(dtype)
    loss = model.loss(joined(make_batches()), normalizer=total_tokens())
    loss.backward()
    return float(loss.detach()), gradients(model)


def assert_same(got, want, tolerance: float = 1e-5) -> None:
    assert got[0] == pytest.approx(want[0], rel=tolerance)
    assert got[1].keys() == want[1].keys()
    for name, grad in want[1].items():
        assert got[1][name].dtype == grad.dtype and relative_error(got[1][name], grad) < tolerance, name


# ------------------------------------------------------------------------------------------------------- one process


def accumulate(model, loss_of, batches=None, autocast=False):
    """Accumulate as a trainer does: the global count divides each micro-batch's sum."""
    total = 0.0
    for batch in batches or make_batches():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(batch, normalizer=total_tokens())
        loss.backward()
        total += float(loss.detach())
    return total, gradients(model)


@pytest.mark.parametrize("name", MODELS)
def test_accumulation_over_micro_batches(name):
    model = make_model(name)
    assert_same(accumulate(model, model.loss), plain(name))


@pytest.mark.parametrize("name", MODELS)
def test_autocast_with_float32_weights(name):
    model = make_model(name)
    got = accumulate(model, model.loss, autocast=True)
    assert_same(got, plain(name), 4e-2)  # and float32 gradients
    assert relative_error(got[1]["embed_tokens.weight"], plain(name)[1]["embed_tokens.weight"]) > 1e-5


@pytest.mark.parametrize("autocast", [False, True])
def test_activation_checkpointing(autocast):
    want_of, model = make_model(), make_model()
    want = accumulate(want_of, want_of.loss, autocast=autocast)
    model.activation_checkpointing = True
    assert_same(accumulate(model, model.loss, autocast=autocast), want, 1e-7)
    # A checkpoint around the loss as well: it is made twice, and its gradients with it.
    around = make_model()

    def loss_of(batch, normalizer):
        return torch.utils.checkpoint.checkpoint(around.loss, batch, normalizer=normalizer, use_reentrant=False)

    assert_same(accumulate(around, loss_of, autocast=autocast), want, 1e-7)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_whole_model_compiles_in_one_graph(autocast):
    want_of, model = make_model(), make_model()
    module = torch.compile(LossModule(model), fullgraph=True, backend="aot_eager")
    want = accumulate(want_of, want_of.loss, autocast=autocast)
    assert_same(accumulate(model, module, autocast=autocast), want, 2e-2 if autocast else 1e-5)


class StraightLoss(LossModule):
    """The head's gradient goes straight into the embedding it is tied to; autograd adds the embedding's own part."""

    def __init__(self, model):
        super().__init__(model)
        model.embed_tokens.weight.grad = torch.zeros_like(model.embed_tokens.weight)

    def forward(self, batch, *, normalizer):
        hidden, weight = (
            self.model(batch.tokens, batch.cu_seqlens, position_ids=batch.position_ids),
            self.model.embed_tokens.weight,
        )
        return illada.linear_masked_cross_entropy(
            hidden, weight, batch.targets, batch.token_weights,
            rows=batch.rows, normalizer=normalizer, grad_weight=weight.grad,
        )  # fmt: skip


def test_head_gradient_straight_into_the_tied_embedding():
    module = StraightLoss(make_model())
    assert_same(accumulate(module, module), plain())


def test_a_recomputed_forward_adds_twice():
    """Why no checkpoint may stand around a loss with grad_weight, as the documentation says."""
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(9, 8)
    once, twice = torch.zeros(9, 8), torch.zeros(9, 8)

    def into(buffer):
        return lambda hidden: illada.linear_masked_cross_entropy(
            hidden, weight, torch.arange(5), torch.ones(5), grad_weight=buffer
        )

    into(once)(hidden).backward()
    torch.utils.checkpoint.checkpoint(into(twice), hidden, use_reentrant=False).backward()
    torch.testing.assert_close(twice, 2 * once)


# ----------------------------------------------------------------------------------------------------- two processes

HAS_FSDP = torch.__version__ >= (2, 13)  # before, gloo could not average, or summed (pytorch#162338)

# name: wrapper, model, options of `distributed_result`
CASES = {
    **{f"DDP, {name}": ("ddp", name, {}) for name in MODELS},
    "DDP, one micro-batch each": ("ddp", "tied", {"micro_batches": 1}),
    "DDP, checkpointing": ("ddp", "tied", {"checkpointing": True}),
    "DDP, autocast": ("ddp", "tied", {"autocast": True}),
    "DDP, compiled": ("ddp", "tied", {"compile": True}),
    "DDP, straight into the embedding": ("ddp", "tied", {"straight": True}),
    **{f"FSDP2, {name}": ("fsdp", name, {}) for name in MODELS},
    "FSDP2, one micro-batch each": ("fsdp", "tied", {"micro_batches": 1}),
    "FSDP2, checkpointing": ("fsdp", "tied", {"checkpointing": True}),
    "FSDP2, mixed precision": ("fsdp", "tied", {"mixed": True}),
}


def shard(module, **options):
    """Shard by FSDP2 as the documentation does. options: of bfloat16's policy; none: float32."""
    if options:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, **options)
        options = {"mp_policy": policy}
    for layer in module.model.layers:
        fully_shard(layer, **options)
    fully_shard(module, **options)  # the rest in one group: embedding, final norm, head


def distributed_result(
    wrapper, name, micro_batches=2, checkpointing=False, autocast=False, compile=False, straight=False, mixed=False
):
    """Return loss and gradients of process r, which has micro-batches r, r + 2, ...; together they are `plain`'s."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = make_model(name)
    model.activation_checkpointing = checkpointing
    module = (StraightLoss if straight else LossModule)(model)
    if wrapper == "ddp":
        module = DistributedDataParallel(module)
    else:
        shard(module, **({"cast_forward_inputs": False} if mixed else {}))
    called = torch.compile(module, backend="aot_eager") if compile else module

    batches = make_batches()[rank::world] if micro_batches == 2 else [joined(make_batches()[rank::world])]
    # Both average gradients over the processes; the loss is a sum over all of them.
    normalizer = total_tokens() / world
    total = 0.0
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        if wrapper == "fsdp":
            module.set_requires_gradient_sync(last)
        with module.no_sync() if wrapper == "ddp" and not last else contextlib.nullcontext():
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = called(batch, normalizer=normalizer)
            loss.backward()
        total += float(loss.detach())
    mean = torch.tensor(total)
    dist.all_reduce(mean)
    return float(mean) / world, gradients(module)


def run_process(folder):
    results = {}
    with gloo(folder) as rank:
        for case, (wrapper, name, options) in CASES.items():
            if wrapper == "ddp" or HAS_FSDP:
                results[case] = distributed_result(wrapper, name, **options)
        torch.save(results, f"{folder}/{rank}.pt")
        if HAS_FSDP:
            check_errors_of_fsdp()


def check_errors_of_fsdp():
    module, batch = LossModule(make_model()), make_batches()[0]
    shard(module, cast_forward_inputs=True)
    with pytest.raises(TypeError, match=r"token_weights must be float32, got bfloat16; .*cast_forward_inputs=False"):
        module(batch)
    module = LossModule(make_model())
    shard(module)
    hidden = torch.zeros(batch.num_tokens, TIED.hidden_size)
    with pytest.raises(TypeError, match="weight is a DTensor.*inside the forward of the module that FSDP2"):
        illada.linear_masked_cross_entropy(hidden, module.model.head_weight, batch.targets, batch.token_weights)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_in_two(run_process, folder, timeout=240)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_make_the_whole(case, two_processes):
    wrapper, name, options = CASES[case]
    if wrapper == "fsdp" and not HAS_FSDP:
        pytest.skip("FSDP2 on gloo needs torch 2.13")
    want = plain(name)
    for got in two_processes:
        assert_same(got[case], want, 4e-2 if {"autocast", "mixed"} & options.keys() else 1e-5)
    for grads in zip(*(got[case][1].values() for got in two_processes), strict=True):
        assert torch.equal(*grads)
