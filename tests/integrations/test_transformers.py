"""attn_implementation="illada" in models of transformers, against bidirectional SDPA of the same weights."""

import gc
import inspect
import re
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    Qwen2Config,
    StaticCache,
)
from transformers.masking_utils import bidirectional_mask_function as BIDIRECTIONAL
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from illada.integrations import patch
from illada.integrations import transformers as ours

SIZES = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
NONE = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
CONFIGS = {
    "bert": BertConfig(**SIZES, **NONE),
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2, is_causal=False, use_cache=False),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=1, is_causal=False, use_cache=False),
}
MASKS = {
    "none": None,
    "right": torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [1] + [0] * 8]),
    "left": torch.tensor([[1] * 9, [0] * 4 + [1] * 5, [0] * 8 + [1]]),
    "full": torch.ones(3, 9, dtype=torch.int64),
}


@pytest.fixture(autouse=True, scope="module")
def registered():
    ours.register()
    ours.register()  # again


def pair(config):
    """Return two models of the same weights: with torch's SDPA, with ours."""
    models = []
    for implementation in ("sdpa", "illada"):
        torch.manual_seed(0)
        models.append(AutoModel.from_config(config, attn_implementation=implementation).train())
    return models


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_padded_batch_is_that_of_sdpa(name, mask, generator):
    """Hidden states and gradients, at the tokens; what stands at padding says nothing."""
    tokens, mask = torch.randint(100, (3, 9), generator=generator), MASKS[mask]
    shown = torch.ones(3, 9) if mask is None else mask.float()
    results = []
    for model in pair(CONFIGS[name]):
        hidden = model(input_ids=tokens, attention_mask=mask).last_hidden_state * shown[..., None]
        probe = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
        results.append(
            [hidden, *torch.autograd.grad((hidden * probe).sum(), list(model.parameters()), allow_unused=True)]
        )
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


def test_a_static_cache_has_slots_that_nothing_is_in(generator):
    tokens, mask, results = torch.randint(100, (3, 9), generator=generator), MASKS["left"], []
    for model in pair(CONFIGS["llama"]):
        cache = StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            for part in (slice(0, 5), slice(5, 9)):
                asked = {"attention_mask": mask[:, : part.stop], "past_key_values": cache, "use_cache": True}
                hidden = model(input_ids=tokens[:, part], **asked).last_hidden_state
        results.append(hidden[mask[:, part].bool()])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_a_mask_with_holes_where_the_mask_is_not_read():
    def slots(mask):
        return ours.attention_mask(2, 3, 3, mask_function=BIDIRECTIONAL, attention_mask=mask)

    compiled, whole = torch.compile(slots, backend="aot_eager", fullgraph=True), torch.tensor([[0, 1, 1], [1, 1, 0]])
    assert torch.equal(compiled(whole), whole.bool())
    with pytest.raises(RuntimeError, match="attention_mask has holes"):
        compiled(torch.tensor([[0, 1, 1], [1, 0, 1]]))


def test_a_flattened_batch(generator):
    """Sequences one behind the other, as DataCollatorWithFlattening hands them over."""
    sdpa, model = pair(CONFIGS["llama"])
    tokens, starts = torch.randint(100, (1, 9), generator=generator), torch.tensor([0, 4, 9], dtype=torch.int32)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    lengths = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 5, "max_length_k": 5}
    got = model(input_ids=tokens, position_ids=positions, **lengths).last_hidden_state[0]
    want = [sdpa(input_ids=part).last_hidden_state[0] for part in (tokens[:, :4], tokens[:, 4:])]
    torch.testing.assert_close(got, torch.cat(want), rtol=1e-4, atol=1e-4)


POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
ANEW = "position_ids start anew within a row: .*pass cu_seq_lens_q and cu_seq_lens_k"


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("mask", [None, torch.ones(1, 9, dtype=torch.int64)])
def test_positions_that_start_anew_need_the_lengths(name, mask):
    """A decoder is bidirectional by its config here; a pack by positions alone would be one sequence."""
    (_, model), tokens = pair(CONFIGS[name]), torch.ones(1, 9, dtype=torch.int64)
    with pytest.raises(ValueError, match=ANEW):
        model(input_ids=tokens, attention_mask=mask, position_ids=POSITIONS)
    with pytest.raises(ValueError, match=ANEW):
        model(input_ids=tokens.expand(2, -1), position_ids=POSITIONS)
    for ascending in (None, torch.arange(3, 12)[None], 2 * torch.arange(9)[None]):
        model(input_ids=tokens, attention_mask=mask, position_ids=ascending)


def test_positions_of_padding_may_be_anything():
    _, model = pair(CONFIGS["llama"])
    positions = torch.tensor([range(9), [1, 1, 1, 1, 0, 1, 2, 3, 4]])
    tokens, mask = torch.ones(2, 9, dtype=torch.int64), torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    model(input_ids=tokens, attention_mask=mask, position_ids=positions)  # as generate makes them
    positions[1, 6] = 0
    with pytest.raises(ValueError, match=ANEW):
        model(input_ids=tokens, attention_mask=mask, position_ids=positions)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_positions_that_start_anew_are_an_assertion(backend):
    (_, model), tokens = pair(CONFIGS["llama"]), torch.ones(1, 9, dtype=torch.int64)
    torch.compiler.reset()
    compiled = torch.compile(model.eval(), backend=backend, fullgraph=True)
    with torch.no_grad():
        compiled(input_ids=tokens, position_ids=torch.arange(9)[None])
        with pytest.raises(RuntimeError, match=ANEW):
            compiled(input_ids=tokens, position_ids=POSITIONS)


def test_positions_that_the_host_may_not_read_are_an_assertion_on_the_device(monkeypatch):
    """Of fake tensors, as of a GPU's: to read one would raise here, and wait there."""
    asserted = []
    monkeypatch.setattr(torch, "_assert_async", lambda *arguments: asserted.append(arguments))
    with FakeTensorMode():
        positions, layer = torch.zeros(1, 9, dtype=torch.int64), torch.nn.Module()
        ours._check_positions(layer, positions, None, None, (1, 9, 9))
    ((ascending, said),) = asserted
    assert ascending.dtype == torch.bool and ascending.shape == () and re.match(ANEW, said)


def test_positions_are_looked_at_once_a_forward_pass(monkeypatch):
    looked, real = [], ours.starts_anew
    monkeypatch.setattr(ours, "starts_anew", lambda *arguments: looked.append(arguments) or real(*arguments))
    (_, model), tokens = pair(CONFIGS["llama"]), torch.ones(1, 9, dtype=torch.int64)
    model.gradient_checkpointing_enable()
    for passes in (1, 2):
        model(input_ids=tokens).last_hidden_state.sum().backward()
        assert len(looked) == passes
    x, mask = torch.zeros(1, 2, 9, 16), ours.attention_mask(1, 9, 9, mask_function=BIDIRECTIONAL)
    positions = torch.arange(9)[None]
    ours.attention(torch.nn.Module(), x, x, x, mask, position_ids=positions)
    positions[0, 4:] = torch.arange(5)  # written to between two layers
    with pytest.raises(ValueError, match=ANEW):
        ours.attention(torch.nn.Module(), x, x, x, mask, position_ids=positions)


def test_queries_and_keys_of_other_lengths_in_packs_of_one_size(generator):
    q, k, v = torch.randn(3, 1, 2, 9, 16, generator=generator)
    starts, starts_k = torch.tensor([0, 4, 9], dtype=torch.int32), torch.tensor([0, 7, 9], dtype=torch.int32)
    got, _ = ours.attention(torch.nn.Module(), q, k, v, None, cu_seq_lens_q=starts, cu_seq_lens_k=starts_k)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    want = [sdpa(q[:, :, a], k[:, :, b], v[:, :, b]) for a, b in ((slice(4), slice(7)), (slice(4, 9), slice(7, 9)))]
    torch.testing.assert_close(got, torch.cat(want, dim=2).transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_what_the_kernels_do_not_do_is_refused(generator):
    tokens = torch.randint(100, (2, 9), generator=generator)
    causal = AutoModel.from_config(LlamaConfig(**SIZES), attn_implementation="illada")
    with pytest.raises(NotImplementedError, match="asks for causal_mask_function; set is_causal=False"):
        causal(input_ids=tokens)
    modern = ModernBertConfig(**SIZES, global_attn_every_n_layers=2, local_attention=4, pad_token_id=0)
    with pytest.raises(NotImplementedError, match="asks for .*; set is_causal=False"):
        AutoModelForMaskedLM.from_config(modern, attn_implementation="illada")(input_ids=tokens)
    dropping = AutoModel.from_config(BertConfig(**SIZES), attn_implementation="illada").train()
    with pytest.raises(NotImplementedError, match="has no dropout, got 0.1"):
        dropping(input_ids=tokens)
    assert dropping.eval()(input_ids=tokens).last_hidden_state.isfinite().all()


@pytest.mark.parametrize(
    "name,value",
    [
        ("is_causal", True), ("sliding_window", 4), ("softcap", 30.0), ("dropout", 0.1), ("s_aux", torch.zeros(2)),
        ("position_bias", torch.zeros(2)), ("output_attentions", True), ("head_mask", torch.ones(2)),
        ("sinks", torch.zeros(2)), ("indices", torch.zeros(2)), ("block_indices", torch.zeros(2)),
    ],
)  # fmt: skip
def test_arguments_of_a_layer_that_are_refused(name, value):
    x = torch.zeros(1, 2, 3, 16)
    with pytest.raises(NotImplementedError, match=f"has no {name}, got "):
        ours.attention(torch.nn.Module(), x, x, x, None, **{name: value})


def test_every_argument_that_other_implementations_know_is_one_of_ours():
    """Of transformers' own: what they have and we neither take nor refuse by name would be passed by in silence."""
    known = set(inspect.signature(ours.attention).parameters) | {"s_aux", "position_bias", "kwargs"}
    for name in ("sdpa", "flash_attention_2", "flex_attention"):
        others = inspect.signature(ALL_ATTENTION_FUNCTIONS[name]).parameters
        assert set(others) <= known, name


@pytest.mark.parametrize("which", ["or_mask_function", "and_mask_function"])
def test_patterns_on_top_of_the_bidirectional_one_are_refused(which):
    config = AutoModel.from_config(CONFIGS["bert"], attn_implementation="illada").config
    with pytest.raises(NotImplementedError, match="is bidirectional, and the model asks for (or|and)_masks"):
        create_bidirectional_mask(config, torch.zeros(1, 4, 32), None, **{which: lambda b, h, q, k: q == k})


@pytest.mark.parametrize("offset", [0, 2])
def test_offsets_of_keys_cut_the_mask(offset):
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1]])
    slots = ours.attention_mask(2, 1, 4, q_offset=5, kv_offset=offset, mask_function=BIDIRECTIONAL, attention_mask=mask)
    assert torch.equal(slots, mask.bool()[:, offset : offset + 4])


# --------------------------------------------------------------------------------------- once a forward pass, not a layer


@pytest.fixture
def plans(monkeypatch):
    """The arguments of the plans that were made."""
    made, real = [], ours.attention_plan
    monkeypatch.setattr(ours, "attention_plan", lambda *args, **named: made.append(args) or real(*args, **named))
    return made


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_layers_of_a_forward_pass_share_lengths_and_plan(mask, checkpointing, plans, generator):
    tokens, (_, model) = torch.randint(100, (3, 9), generator=generator), pair(CONFIGS["llama"])
    if checkpointing:
        model.gradient_checkpointing_enable()
    for passes in (1, 2):
        model(input_ids=tokens, attention_mask=MASKS[mask]).last_hidden_state.sum().backward()
        assert len(plans) == passes


def test_a_flattened_batch_has_one_plan(plans):
    (_, model), starts = pair(CONFIGS["llama"]), torch.tensor([0, 4, 9], dtype=torch.int32)
    model(input_ids=torch.ones(1, 9, dtype=torch.int64), cu_seq_lens_q=starts, cu_seq_lens_k=starts)
    assert len(plans) == 1


def test_what_was_shared_is_not_reused_for_other_masks_or_sizes(plans, generator):
    def run(mask, heads=2, starts=None):
        q, k, v = torch.randn(3, 2, heads, 4, 16, generator=generator)
        if starts is not None:
            q, k, v = (x[:1] for x in (q, k, v))
        got, _ = ours.attention(torch.nn.Module(), q, k, v, mask, cu_seq_lens_q=starts, cu_seq_lens_k=starts)
        if starts is None:
            seen = slots.bool()[:, None, None]
            want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)
        else:
            ends = starts.tolist()
            parts = [[x[:, :, a:b] for x in (q, k, v)] for a, b in zip(ends[:-1], ends[1:], strict=True)]
            parts = [torch.nn.functional.scaled_dot_product_attention(*part) for part in parts]
            want = torch.cat(parts, dim=2).transpose(1, 2)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    padding = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    slots = ours.attention_mask(2, 4, 4, mask_function=BIDIRECTIONAL, attention_mask=padding)
    run(slots)
    run(slots)
    assert len(plans) == 1
    run(slots, heads=4)
    assert len(plans) == 2
    slots[1] = torch.tensor([1, 1, 0, 0], dtype=torch.bool)  # written to between two layers
    run(slots)
    assert len(plans) == 3
    run(slots.clone())  # a copy, as for another device
    assert len(plans) == 4
    slots = ours.attention_mask(1, 4, 4, mask_function=BIDIRECTIONAL)
    starts = torch.tensor([0, 1, 4], dtype=torch.int32)
    run(slots, starts=starts)
    run(slots, starts=starts)
    assert len(plans) == 5
    starts[1] = 2
    run(slots, starts=starts)
    assert len(plans) == 6


@pytest.mark.parametrize(
    "make", [lambda: pair(CONFIGS["llama"])[1], lambda: patch(LlamaForCausalLM(LlamaConfig(**SIZES)))]
)
@pytest.mark.parametrize("packed", [False, True])
def test_nothing_keeps_a_model_or_its_mask_alive(make, packed, monkeypatch):
    """The mask of a pass goes with the pass, without the garbage collector; the model goes at the next collection."""
    masks, real = [], ours._shared
    monkeypatch.setattr(
        ours, "_shared", lambda *args, **named: masks.append(weakref.ref(real(*args, **named))) or masks[-1]()
    )
    ours.register()
    model, starts = make(), torch.tensor([0, 4, 9], dtype=torch.int32)
    given = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts} if packed else {"position_ids": torch.arange(9)[None]}
    gc.collect()
    gc.disable()
    try:
        model(input_ids=torch.ones(1, 9, dtype=torch.int64), **given)[0].sum().backward()
        assert len(masks) == 1 and masks[0]() is None
        parameter = weakref.ref(next(model.parameters()))
        dead = weakref.ref(model)
        del model
        gc.collect()
        assert dead() is None and parameter() is None
    finally:
        gc.enable()


def test_what_transformers_5_0_gives():
    """The positions of the queries, in place of their number and the device."""
    asked = {"batch_size": 2, "kv_length": 4, "kv_offset": 0, "mask_function": BIDIRECTIONAL, "attention_mask": None}
    slots = ours.attention_mask(**asked, cache_position=torch.arange(4, device="meta"))
    assert slots.device.type == "meta" and slots.shape == (2, 4)


def test_wrong_masks():
    x = torch.zeros(2, 2, 3, 16)
    with pytest.raises(ValueError, match=r"must be a padding mask \[2, 3\], .* got float32 \[2, 1, 3, 3\]"):
        ours.attention(torch.nn.Module(), x, x, x, torch.zeros(2, 1, 3, 3))
    with pytest.raises(ValueError, match="cu_seq_lens_q is for a batch of one row, got 2"):
        ours.attention(torch.nn.Module(), x, x, x, None, cu_seq_lens_q=torch.tensor([0, 6]))
    model = AutoModel.from_config(CONFIGS["bert"], attn_implementation="illada")
    with pytest.raises(ValueError, match="attention_mask has holes"):
        model(input_ids=torch.ones(1, 4, dtype=torch.int64), attention_mask=torch.tensor([[1, 0, 1, 1]]))
    starts, ids = torch.tensor([0, 2, 4], dtype=torch.int32), torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="attention_mask must have no padding beside cu_seq_lens_q"):
        model(input_ids=ids, attention_mask=torch.tensor([[1, 1, 1, 0]]), cu_seq_lens_q=starts, cu_seq_lens_k=starts)
    with pytest.raises(ValueError, match="cu_seq_lens_k needs cu_seq_lens_q"):
        model(input_ids=ids, cu_seq_lens_k=starts)
