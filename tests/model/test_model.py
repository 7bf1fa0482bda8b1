"""The model against an independent twin in plain torch: padded rows, explicit softmax, repeated keys."""

import dataclasses

import numpy as np
import pytest
import torch

from illada import attention_plan, pack, varlen_attention
from illada.batch import Batch
from illada.config import PRESETS, ModelConfig
from illada.diffusion import make_batch
from illada.model import Layer, MaskedDiffusionModel, SelectedRows, positions, rotary_tables, rotate
from illada.testing import relative_error

TINY = ModelConfig.preset(
    "tiny", hidden_size=56, intermediate_size=96, num_hidden_layers=2, num_attention_heads=7,
    num_key_value_heads=7, vocab_size=50, max_position_embeddings=64, initializer_range=0.2,
)  # fmt: skip
VARIANTS = {
    "group 1": TINY,
    "group 7, biases, untied, shift (Dream)": dataclasses.replace(
        TINY, num_key_value_heads=1, qkv_bias=True, tie_word_embeddings=False, logits_shift=True, rope_theta=1e6
    ),
    "group 4, fp32 rope, wide embedding (LLaDA)": dataclasses.replace(
        TINY, num_attention_heads=4, num_key_value_heads=1, head_dim=14, rope_in_fp32=True, embedding_size=60,
        tie_word_embeddings=False, rms_norm_eps=1e-3,
    ),
    "tied, wide embedding": dataclasses.replace(TINY, embedding_size=60),
}  # fmt: skip


def twin_logits(model: MaskedDiffusionModel, sequence: torch.Tensor) -> torch.Tensor:
    """Return the logits of one sequence, computed from the state dict alone."""
    c, p = model.config, dict(model.named_parameters())
    length, d = len(sequence), c.head_size

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * p[name]

    for name in [name for name in p if "qkv_proj" in name]:
        parts = zip("qkv", p.pop(name).split(c.qkv_sizes), strict=True)
        p |= {name.replace("qkv", which): part for which, part in parts}

    def linear(x, name):
        y = x @ p[f"{name}.weight"].T
        return y + p[f"{name}.bias"] if f"{name}.bias" in p else y

    frequencies = c.rope_theta ** -(torch.arange(d // 2, dtype=torch.float64) * 2 / d)
    angles = torch.arange(length).double()[:, None] * frequencies
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # complex rotation of pairs (i, i + D/2)

    def rope(x):
        pairs = torch.complex(x[..., : d // 2].double(), x[..., d // 2 :].double()) * turn
        return torch.cat([pairs.real, pairs.imag], -1).to(x.dtype)

    x = p["embed_tokens.weight"][sequence]
    for i in range(c.num_hidden_layers):
        at = f"layers.{i}."
        h = norm(x, at + "input_layernorm.weight")
        q = rope(linear(h, at + "self_attn.q_proj").reshape(length, c.num_attention_heads, d))
        k = rope(linear(h, at + "self_attn.k_proj").reshape(length, c.num_key_value_heads, d))
        v = linear(h, at + "self_attn.v_proj").reshape(length, c.num_key_value_heads, d)
        group = c.num_attention_heads // c.num_key_value_heads
        heads = []
        for head in range(c.num_attention_heads):
            scores = q[:, head] @ k[:, head // group].T / d**0.5
            heads.append(scores.softmax(-1) @ v[:, head // group])
        x = x + linear(torch.cat(heads, -1), at + "self_attn.o_proj")
        h = norm(x, at + "post_attention_layernorm.weight")
        gate = linear(h, at + "mlp.gate_proj")
        x = x + linear(gate * gate.sigmoid() * linear(h, at + "mlp.up_proj"), at + "mlp.down_proj")
    head_weight = p["embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"][: c.vocab_size]
    logits = norm(x, "norm.weight") @ head_weight.T
    return torch.cat([logits[:1], logits[:-1]]) if c.logits_shift else logits


def some_batch(config, seed=0, lengths=24):
    windows = np.random.default_rng(seed).integers(6, config.vocab_size, (3, lengths))
    return make_batch(windows, np.arange(3), seed=1, mask_id=config.mask_token_id)


@pytest.mark.parametrize("name", VARIANTS)
def test_matches_twin(name, generator):
    config = VARIANTS[name]
    model = MaskedDiffusionModel(config, seed=3)
    with torch.no_grad():  # norms and biases that do something
        for key, parameter in model.named_parameters():
            if key.endswith(("norm.weight", "bias")):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    sequences = [torch.randint(6, 50, (n,), generator=generator) for n in (5, 1, 0, 17)]
    tokens, cu_seqlens = pack(sequences)
    logits = model(tokens, cu_seqlens) @ model.head_weight.T
    want = torch.cat([twin_logits(model, s) for s in sequences if len(s)])
    torch.testing.assert_close(logits, want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_gradients_match_twin(name):
    model = MaskedDiffusionModel(VARIANTS[name], seed=3)
    batch = some_batch(model.config)
    parameters = list(model.parameters())
    got = model.loss(batch)
    got_grads = torch.autograd.grad(got, parameters)
    bounds = batch.cu_seqlens.tolist()
    sequences = [batch.tokens[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    logits = torch.cat([twin_logits(model, s) for s in sequences])
    cross_entropy = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
    want = (cross_entropy * batch.token_weights).sum() / batch.num_tokens
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for g, w in zip(got_grads, torch.autograd.grad(want, parameters), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-4 * float(w.abs().max()) + 1e-7)


def test_normalizer():
    model, batch = MaskedDiffusionModel(TINY), some_batch(TINY)
    torch.testing.assert_close(model.loss(batch, normalizer=2.0 * batch.num_tokens) * 2, model.loss(batch))


def test_activation_checkpointing_changes_nothing():
    model = MaskedDiffusionModel(TINY)
    batch = some_batch(TINY)
    parameters = list(model.parameters())
    plain = torch.autograd.grad(model.loss(batch), parameters)
    model.activation_checkpointing = True
    for a, b in zip(plain, torch.autograd.grad(model.loss(batch), parameters), strict=True):
        assert torch.equal(a, b)


def test_bfloat16_and_autocast_are_close():
    config = dataclasses.replace(TINY, initializer_range=0.05)
    model, batch = MaskedDiffusionModel(config), some_batch(TINY)
    want = float(model.loss(batch).detach())
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(batch)
        loss.backward()
    assert loss.dtype == torch.float32 and float(loss.detach()) == pytest.approx(want, rel=2e-2)
    assert model.embed_tokens.weight.grad.dtype == torch.float32
    half = MaskedDiffusionModel(config, dtype=torch.bfloat16)
    assert float(half.loss(batch).detach()) == pytest.approx(want, rel=3e-2)


def test_layer_compiles_in_one_graph():
    model, batch = MaskedDiffusionModel(TINY), some_batch(TINY)
    plan = attention_plan(batch.cu_seqlens, num_heads=7, num_kv_heads=7, head_dim=8, total_q=batch.num_tokens)
    layer: Layer = model.layers[0]
    cos, sin = rotary_tables(batch.position_ids, TINY, torch.float32)
    x = model.embed_tokens(batch.tokens).detach()
    want = layer(x, cos, sin, batch.cu_seqlens, plan)
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, cos, sin, batch.cu_seqlens, plan)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), layer.mlp.up_proj.weight)[0] for y in (got, want)))
    loss = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(loss(batch), model.loss(batch))


def test_presets_have_the_published_sizes():
    sizes = {"illada_8b": 7_615_025_152, "llada_8b": 8_015_581_184, "dream_7b": 7_615_616_512}
    for name in PRESETS:
        config = ModelConfig.preset(name)
        assert config.num_parameters == sizes.get(name, config.num_parameters)
        model = MaskedDiffusionModel(config, device="meta")
        assert sum(p.numel() for p in model.parameters()) == config.num_parameters


def test_initial_weights_come_from_the_seed_alone():
    state = torch.random.get_rng_state()
    one, same, other = (MaskedDiffusionModel(TINY, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.embed_tokens.weight, other.embed_tokens.weight)
    assert (one.embed_tokens.weight[TINY.pad_token_id] == 0).all()
    assert float(one.layers[0].mlp.down_proj.weight.detach().std()) == pytest.approx(0.2 / 2, rel=0.05)


def test_initial_weights_are_those_of_three_projections():
    """Drawn one after the other: what a seed gives does not depend on how they are stored."""
    generator = torch.Generator().manual_seed(1)
    torch.empty(50, 56).normal_(generator=generator)  # the embedding
    parts = [torch.empty(rows, 56).normal_(0.0, 0.2, generator=generator) for rows in (56, 8, 8)]
    model = MaskedDiffusionModel(dataclasses.replace(TINY, num_key_value_heads=1, qkv_bias=True), seed=1)
    assert torch.equal(model.layers[0].self_attn.qkv_proj.weight, torch.cat(parts))
    assert not model.layers[0].self_attn.qkv_proj.bias.any()


def attention_inputs(config, generator):
    cu_seqlens = torch.tensor([0, 5, 5, 16], dtype=torch.int32)
    x = torch.randn(16, config.hidden_size, generator=generator, requires_grad=True)
    return x, *rotary_tables(positions(cu_seqlens, 16), config, torch.float32), cu_seqlens


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_reads_the_projection_where_it_is(name, dtype, generator, monkeypatch):
    """v is a view of the one projection, q and k are views of its rotated heads: no copies, their rows' strides."""
    config, seen, projected = VARIANTS[name], [], []
    attention = MaskedDiffusionModel(config, dtype=dtype).layers[0].self_attn
    attention.qkv_proj.register_forward_hook(lambda module, inputs, output: projected.append(output))

    def spy(q, k, v, *args, **kwargs):
        seen.extend((q, k, v))
        return varlen_attention(q, k, v, *args, **kwargs)

    monkeypatch.setattr("illada.model.layers.varlen_attention", spy)
    x, cos, sin, cu_seqlens = attention_inputs(config, generator)
    attention(*attention.project(x.to(dtype), cos.to(dtype), sin.to(dtype)), cu_seqlens, None)
    (q, k, v), (fused,) = seen, projected
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_size
    assert fused.shape == (16, (heads + 2 * kv_heads) * dim) and v.shape == k.shape == (16, kv_heads, dim)
    assert v.stride() == ((heads + 2 * kv_heads) * dim, dim, 1)
    assert v.data_ptr() == fused.data_ptr() + (heads + kv_heads) * dim * fused.itemsize
    assert v.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()
    assert q.stride() == k.stride() == ((heads + kv_heads) * dim, dim, 1) and q.shape == (16, heads, dim)
    assert k.data_ptr() == q.data_ptr() + heads * dim * q.itemsize
    assert k.untyped_storage().data_ptr() == q.untyped_storage().data_ptr()


@pytest.mark.parametrize("some_rows", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_are_those_of_three_projections(name, some_rows, generator):
    config = VARIANTS[name]
    attention = MaskedDiffusionModel(config, seed=4).layers[0].self_attn
    fused = [parameter for key, parameter in attention.named_parameters() if "qkv_proj" in key]
    with torch.no_grad():
        for parameter in fused[1:]:  # a bias that does something
            parameter.normal_(generator=generator)
    x, cos, sin, cu_seqlens = attention_inputs(config, generator)
    rows, selected_rows = torch.arange(16), None
    if some_rows:
        rows = torch.tensor([1, 4, 5, 14])
        selected_rows = SelectedRows(rows, torch.tensor([0, 2, 2, 4], dtype=torch.int32))
    got = attention(*attention.project(x, cos, sin, rows if some_rows else None), cu_seqlens, None, None, selected_rows)
    parts = [[part.detach().requires_grad_() for part in p.split(config.qkv_sizes)] for p in fused]
    q, k, v = (
        torch.nn.functional.linear(x, *part).unflatten(-1, (-1, config.head_size)) for part in zip(*parts, strict=True)
    )
    out = varlen_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, cu_seqlens)
    want = attention.o_proj(out.flatten(1))[rows]
    torch.testing.assert_close(got, want)
    probe = torch.randn(got.shape, generator=generator)
    got_grads = torch.autograd.grad((got * probe).sum(), [x, *fused])
    dx, *want_grads = torch.autograd.grad((want * probe).sum(), [x, *(part for three in parts for part in three)])
    torch.testing.assert_close(got_grads[0], dx, rtol=1e-4, atol=1e-5)
    for i, grad in enumerate(got_grads[1:]):
        torch.testing.assert_close(grad, torch.cat(want_grads[3 * i : 3 * i + 3]), rtol=1e-4, atol=1e-5)


def test_positions():
    cu_seqlens = torch.tensor([0, 3, 3, 4, 4, 6], dtype=torch.int32)
    assert positions(cu_seqlens, 6).tolist() == [0, 1, 2, 0, 0, 1]


def test_errors():
    model = MaskedDiffusionModel(TINY)
    cu_seqlens = torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"tokens must be packed, shape \[T\], got \[1, 2\]"):
        model(torch.tensor([[1, 2]]), cu_seqlens)
    with pytest.raises(ValueError, match=r"tokens must be in \[0, 50\), got 1 .. 50"):
        model(torch.tensor([1, 50]), cu_seqlens)
    with pytest.raises(ValueError, match="cu_seqlens must end at 1 or before, got 2"):
        model(torch.tensor([1]), cu_seqlens)
    wrong = [
        ({"vocab_size": 0}, "model.vocab_size must be positive, got 0"),
        ({"num_key_value_heads": 4}, r"num_attention_heads \(6\) must be a multiple"),
        ({"hidden_size": 100}, r"hidden_size \(100\) must be a multiple"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"embedding_size": 10}, r"embedding_size \(10\) is less than vocab_size \(4096\)"),
        ({"mask_token_id": 4096}, r"mask_token_id must be in \[0, 4096\), got 4096"),
        ({"model_type": "gpt"}, "model_type must be illada, llada, dream, qwen2 or illada_hf"),
        ({"hidden": 1}, "unknown model options: hidden; there are vocab_size"),
    ]
    for overrides, match in wrong:
        with pytest.raises(ValueError, match=match):
            ModelConfig.preset("tiny", **overrides)
    with pytest.raises(ValueError, match="model.preset must be one of illada_8b"):
        ModelConfig.preset("huge")
    with pytest.raises(ValueError, match="missing model options: bos_token_id"):
        ModelConfig.from_dict({"vocab_size": 3})
    assert ModelConfig.from_dict(TINY.to_dict()) == TINY


@pytest.mark.parametrize("device,rows,parts", [
    ("cpu", 2500, [1024, 1024, 452]), ("meta", 2500, [2500]), ("meta", 40000, [16384, 16384, 7232]),
])  # fmt: skip
def test_mlp_takes_few_rows_at_a_time(device, rows, parts):
    """Without gradients what it needs does not grow with the pack; "meta" goes the way of a GPU."""

    class Attended(torch.nn.Module):
        def project(self, x, *arguments):
            return x, x, x

        def forward(self, x, *arguments):
            return x

    layer, seen = Layer(TINY).to(device), []
    layer.self_attn = Attended()
    x = torch.randn(rows, TINY.hidden_size, generator=torch.Generator().manual_seed(1)).to(device)
    before = x.clone()
    want = layer(x, *[None] * 4)
    layer.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    with torch.no_grad():
        got = layer(x, *[None] * 4)
    assert seen == parts and got.shape == want.shape
    if device == "cpu":
        torch.testing.assert_close(got, want)
        assert torch.equal(x, before)


@pytest.mark.parametrize("shift", [False, True])
def test_hidden_states_of_some_rows(shift):
    """The last layer may leave the others out: the same numbers, and the same gradients."""
    config = ModelConfig.preset(
        "tiny", vocab_size=100, logits_shift=shift, qkv_bias=shift, model_type="dream" if shift else "illada"
    )
    model = MaskedDiffusionModel(config, seed=2)
    with torch.no_grad():
        for layer in model.layers if shift else ():
            layer.self_attn.qkv_proj.bias.normal_(generator=torch.Generator().manual_seed(3))
    tokens = torch.arange(20) % 100
    cu_seqlens, rows = torch.tensor([0, 3, 3, 20], dtype=torch.int32), torch.tensor([0, 2, 3, 4, 19])
    want = model(tokens, cu_seqlens)[rows]
    got = model(tokens, cu_seqlens, rows=rows)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    model.activation_checkpointing = True
    probe = torch.randn(
        want.shape, generator=torch.Generator().manual_seed(1)
    )  # the square's gradient is 0 after the norm
    again = model(tokens, cu_seqlens, rows=rows)
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad((again * probe).sum(), parameters),
        torch.autograd.grad((want * probe).sum(), parameters),
        strict=True,
    ):
        assert relative_error(a, b) < 1e-5
    with pytest.raises(ValueError, match=r"rows must ascend within \[0, 20\), got \[3, 2\]"):
        model(tokens, cu_seqlens, rows=torch.tensor([3, 2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_first_layer_is_kept_where_tokens_stay(name, layers, dtype, generator):
    """Only what changes is projected again, and a part of the tokens goes on as if the others had never been there."""
    model = MaskedDiffusionModel(dataclasses.replace(VARIANTS[name], num_hidden_layers=layers), seed=3, dtype=dtype)
    projected = []
    model.layers[0].self_attn.qkv_proj.register_forward_hook(lambda module, inputs, out: projected.append(len(out)))
    cu_seqlens = torch.tensor([0, 5, 5, 16], dtype=torch.int32)
    position_ids, rows = positions(cu_seqlens, 16), torch.tensor([0, 4, 5, 14])
    tokens = torch.randint(50, (16,), generator=generator)
    first = model.first_layer(tokens, position_ids)
    changed = torch.tensor([2, 15])
    tokens[changed] = (tokens[changed] + 1) % 50
    first.put(changed, model.first_layer(tokens[changed], position_ids[changed]))
    embeddings = first.x.clone()
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
    for wanted in (None, rows):
        projected.clear()
        got = model(tokens, cu_seqlens, first=first, rows=wanted)
        assert not projected
        torch.testing.assert_close(got, model(tokens, cu_seqlens, rows=wanted), **tolerance)
    assert torch.equal(first.x, embeddings)
    part = torch.arange(5, 16)
    cu_seqlens = torch.tensor([0, 11], dtype=torch.int32)
    got = model(tokens[part], cu_seqlens, first=first.take(part))
    torch.testing.assert_close(got, model(tokens[part], cu_seqlens), **tolerance)
    with pytest.raises(ValueError, match="first is of 16 tokens, there are 11"):
        model(tokens[part], cu_seqlens, first=first)
    with pytest.raises(ValueError, match=r"tokens must be in \[0, "):
        model.first_layer(tokens + 60, position_ids)


@pytest.mark.parametrize("shift", [False, True])
def test_loss_is_that_of_the_token_itself(shift):
    """Not of the next one, as a labels argument means elsewhere: token i is predicted at i (Dream: from hidden i - 1)."""
    config = ModelConfig.preset("tiny", vocab_size=100, logits_shift=shift, model_type="dream" if shift else "illada")
    model = MaskedDiffusionModel(config, seed=2)
    clean = torch.arange(10, 26)
    noisy = clean.clone()
    noisy[[0, 3, 4, 15]] = config.mask_token_id
    weights = torch.zeros(16)
    weights[[0, 3, 4, 15]] = 2.0
    cu_seqlens = torch.tensor([0, 3, 16], dtype=torch.int32)
    batch = Batch(
        tokens=noisy, targets=clean, token_weights=weights, cu_seqlens=cu_seqlens, rows=torch.tensor([0, 3, 4, 15], dtype=torch.int32),
        position_ids=positions(cu_seqlens, 16),
    )  # fmt: skip
    plain = MaskedDiffusionModel(dataclasses.replace(config, logits_shift=False, model_type="illada"), seed=2)
    hidden = plain(noisy, cu_seqlens)  # without the model's own shift
    source = [0, 3, 3, 14] if shift else [0, 3, 4, 15]  # a sequence's first token has none before it
    want = (
        2.0
        * torch.nn.functional.cross_entropy(hidden[source] @ plain.head_weight.T, clean[[0, 3, 4, 15]], reduction="sum")
        / 16
    )
    torch.testing.assert_close(model.loss(batch), want)
