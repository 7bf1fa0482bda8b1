"""patch and unpatch on real transformers models with random weights, against bidirectional SDPA and losses by hand."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)

import illada
from illada.integrations import patch, unpatch

SIZES = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**{**SIZES, "num_key_value_heads": 1}, tie_word_embeddings=True)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=None)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=16)),
    "llama, bare": (LlamaModel, LlamaConfig(**SIZES)),
    "qwen2, bare": (Qwen2Model, Qwen2Config(**SIZES)),
}
HEADS = [name for name in MODELS if "bare" not in name]
MASKS = {
    "none": None,
    "right": torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [1] + [0] * 8]),
    "left": torch.tensor([[1] * 9, [0] * 4 + [1] * 5, [0] * 8 + [1]]),
}
MASKED = 7  # the id of a masked token


def make(name, **changes):
    cls, config = MODELS[name]
    config = copy.deepcopy(config)
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    return cls(config)


def bidirectional(name):
    """The same weights in torch's own bidirectional attention."""
    return make(name, is_causal=False, use_cache=False)


def batch(mask=None):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(10, 100, (3, 9), generator=generator)
    hidden = torch.rand(3, 9, generator=generator) < 0.6
    shown = torch.ones(3, 9, dtype=torch.bool) if mask is None else mask.bool()
    labels = torch.where(hidden & shown, tokens, -100)
    return tokens.masked_fill(hidden, MASKED), labels, torch.rand(3, 9, generator=generator) + 1


def output(model, tokens, **options):
    result = model(input_ids=tokens, **options)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def everything(model):
    """Return what must come back: class, own attributes of each module, config values, names and parameters."""
    own = {name: sorted(set(module.__dict__)) for name, module in model.named_modules()}
    state = {name: (value.data_ptr(), value.shape) for name, value in model.state_dict().items()}
    return type(model), own, copy.deepcopy(model.config.__dict__), state


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_bidirectional_sdpa(name, mask):
    (tokens, _, _), mask = batch(), MASKS[mask]
    got, want = (
        output(patch(make(name)), tokens, attention_mask=mask),
        output(bidirectional(name), tokens, attention_mask=mask),
    )
    shown = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(got[shown], want[shown], rtol=1e-4, atol=1e-4)
    assert (got - output(make(name), tokens)).abs().max() > 0.01  # not those of causal attention


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mask", ["none", "right"])
@pytest.mark.parametrize("name", HEADS)
def test_loss_and_gradients_are_those_by_hand(name, mask, weighted):
    """Not shifted, the mean over labels that count, or by token_weights and num_items_in_batch."""
    mask = MASKS[mask]
    tokens, labels, weights = batch(mask)
    plain, model = bidirectional(name), patch(make(name))
    counts = labels != -100
    nll = F.cross_entropy(plain(input_ids=tokens, attention_mask=mask).logits[counts], labels[counts], reduction="none")
    options = {"token_weights": weights, "num_items_in_batch": 27} if weighted else {}
    want = (nll * weights[counts]).sum() / 27 if weighted else nll.mean()
    result = model(input_ids=tokens, attention_mask=mask, labels=labels, **options)
    assert result.logits is None
    torch.testing.assert_close(result.loss, want, rtol=1e-5, atol=1e-6)
    want.backward()
    result.loss.backward()
    for (key, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-5, msg=key)


def test_the_loss_never_calls_the_head(monkeypatch):
    model, (tokens, labels, _) = patch(make("llama")), batch()
    monkeypatch.setattr(illada.integrations.patching, "more_than_weight", lambda head: None)  # which it does now
    model.lm_head.forward = lambda *arguments: pytest.fail("the head was called")
    assert model(input_ids=tokens, labels=labels).loss.isfinite()


@pytest.mark.parametrize("name", MODELS)
def test_unpatch_restores_all_of_it(name):
    model, tokens = make(name), batch()[0]
    shared = type(model)(model.config)  # of the same config object
    config, before, causal = model.config, everything(model), output(model, tokens)
    shared_before, shared_output = everything(shared), output(shared, tokens)
    assert patch(model) is model and everything(model)[3] == before[3] and isinstance(model, before[0])
    assert not torch.equal(output(model, tokens), causal)
    assert everything(shared) == shared_before and torch.equal(output(shared, tokens), shared_output)
    assert unpatch(model) is model
    assert everything(model) == before and model.config is config
    assert all(module.config is config for module in model.modules() if "config" in module.__dict__)
    assert torch.equal(output(model, tokens), causal)  # bit for bit
    assert torch.equal(output(unpatch(patch(model)), tokens), causal)


def test_what_changes_in_the_config_meanwhile_stays():
    model = patch(make("llama"))
    model.resize_token_embeddings(104)
    model.config.label2id = {"a": 0}
    unpatch(model)
    assert model.config.vocab_size == 104 and model.config.label2id == {"a": 0} and model.config.use_cache
    assert getattr(model.config, "is_causal", True)


@pytest.mark.parametrize("through", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", ["llama", "qwen2", "llama, bare"])
def test_copies_are_patched_and_can_be_unpatched(name, through):
    model, tokens = make(name), batch()[0]
    causal = output(model, tokens)
    double = through(patch(model))
    assert type(double) is type(model) and double.config is not model.config
    assert torch.equal(output(double, tokens), output(model, tokens))
    assert torch.equal(output(unpatch(double), tokens), causal)
    assert not torch.equal(output(model, tokens), causal)  # the other one is still patched
    assert type(double) is MODELS[name][0]


def test_a_saved_model_loads_as_the_plain_class(tmp_path):
    model, tokens = patch(make("qwen2")), batch()[0]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is Qwen2ForCausalLM and loaded.config.architectures == ["Qwen2ForCausalLM"]
    torch.testing.assert_close(
        output(loaded, tokens), output(model, tokens), rtol=1e-4, atol=1e-4
    )  # is_causal is saved
    torch.testing.assert_close(output(patch(loaded), tokens), output(model, tokens), rtol=0, atol=0)


def test_tokens_and_confidences():
    model, mask = patch(make("mistral")), MASKS["left"]
    tokens, _, _ = batch(mask)
    rows = (tokens.masked_fill(mask == 0, 0) == MASKED).flatten().nonzero()[:, 0]
    sample = model.sample_tokens({"input_ids": tokens, "attention_mask": mask}, rows=rows, extras=("entropy",))
    logits = output(model, tokens, attention_mask=mask).flatten(0, 1)[rows]
    confidence, token = logits.softmax(-1).max(-1)
    assert torch.equal(sample.token, token) and not sample.confidence.requires_grad
    torch.testing.assert_close(sample.confidence, confidence, rtol=1e-4, atol=1e-6)
    everywhere = model.sample_tokens(tokens, temperature=0.5, seed=3)
    again = illada.sample_tokens(output(model, tokens).flatten(0, 1), temperature=0.5, seed=3)
    assert torch.equal(everywhere.token, again.token)
    with pytest.raises(TypeError, match="temprature"):
        model.sample_tokens(tokens, temprature=1.0)


def test_a_flattened_batch_and_position_ids():
    model = patch(make("llama"))
    tokens, starts = batch()[0].flatten()[None], torch.tensor([0, 4, 27], dtype=torch.int32)
    positions = torch.cat([torch.arange(4), torch.arange(23)])[None]
    got = model(input_ids=tokens, position_ids=positions, cu_seq_lens_q=starts, cu_seq_lens_k=starts).logits
    torch.testing.assert_close(got[:, :4], model(tokens[:, :4]).logits, rtol=1e-4, atol=1e-4)
    model(tokens, position_ids=torch.arange(3, 30)[None])
    for target in (model, patch(make("llama, bare"))):
        with pytest.raises(ValueError, match="position_ids start anew within a row.*pass cu_seq_lens_q"):
            target(input_ids=tokens, position_ids=positions)
        with pytest.raises(ValueError, match="position_ids start anew"):
            target(input_ids=tokens, position_ids=positions, attention_mask=torch.ones_like(tokens))
    with pytest.raises(ValueError, match="position_ids start anew"):
        model.sample_tokens({"input_ids": tokens, "position_ids": positions})


def test_checkpointing_autocast_and_compile():
    tokens, labels, weights = batch()
    want = patch(make("llama")).train()
    want(input_ids=tokens, labels=labels, token_weights=weights).loss.backward()
    checkpointed, compiled = patch(make("llama")).train(), patch(make("llama")).train()
    checkpointed.gradient_checkpointing_enable()
    checkpointed(input_ids=tokens, labels=labels, token_weights=weights).loss.backward()
    torch.compile(compiled, backend="aot_eager", fullgraph=True)(
        input_ids=tokens, labels=labels, token_weights=weights
    ).loss.backward()
    for model in (checkpointed, compiled):
        for a, b in zip(want.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        loss = want(input_ids=tokens, labels=labels).loss
        assert want.sample_tokens(tokens).token.shape == (27,)
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_a_trainer_of_transformers_steps_as_by_hand(tmp_path):
    """Its num_items_in_batch is that of all micro-batches, which have unequal numbers of labels; weights are columns."""
    plain, model, (tokens, labels, weights) = bidirectional("llama"), patch(make("llama")), batch()
    labels[0, 2:] = -100
    options = TrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=3, learning_rate=0.5, optim="sgd",
        max_grad_norm=0, lr_scheduler_type="constant", report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": a, "labels": b, "token_weights": c} for a, b, c in zip(tokens, labels, weights, strict=True)]
    Trainer(model, options, train_dataset=rows).train()
    nll = F.cross_entropy(plain(input_ids=tokens).logits.flatten(0, 1), labels.flatten(), reduction="none")
    ((nll * weights.flatten()).sum() / (labels != -100).sum()).backward()
    for (name, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(b.detach(), a.detach() - 0.5 * a.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="gloo did not average before torch 2.13")
def test_a_module_that_fsdp2_shards():
    tokens, labels, weights = batch()
    whole = patch(make("llama"))
    whole(input_ids=tokens, labels=labels, token_weights=weights).loss.backward()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = patch(make("llama"))
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        for _ in range(2):
            loss = model(input_ids=tokens, labels=labels, token_weights=weights).loss
        loss.backward()
        for (name, a), b in zip(whole.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(b.grad.full_tensor(), a.grad, rtol=1e-4, atol=1e-6, msg=name)
        model.reshard()
        register_fsdp_forward_method(model, "sample_tokens")
        assert torch.equal(model.sample_tokens(tokens).token, whole.sample_tokens(tokens).token)
        with pytest.raises(ValueError, match="the class or forward of FSDPLlamaForCausalLM was replaced after patch"):
            unpatch(model)
        bare = make("llama")
        fully_shard(bare)
        assert patch(bare)(input_ids=tokens, labels=labels).loss.isfinite()  # the other order
    finally:
        dist.destroy_process_group()


def test_adapters_inside_and_columns_that_a_trainer_keeps():
    from peft import LoraConfig, get_peft_model

    tokens, labels, _ = batch()
    assert {"input_ids", "attention_mask", "labels", "token_weights"} <= set(
        inspect.signature(patch(make("llama")).forward).parameters
    )
    model = get_peft_model(
        patch(make("llama")), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    model(input_ids=tokens, labels=labels).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)
    with pytest.raises(NotImplementedError, match=r"PeftModel has an architecture that is not .*inside what wraps it"):
        patch(get_peft_model(make("llama"), LoraConfig(target_modules=["q_proj"])))
    headed = get_peft_model(patch(make("llama")), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(
        TypeError, match="lm_head of the patched model is a Linear that does more than multiply by its weight"
    ):
        headed(input_ids=tokens, labels=labels)
    with pytest.raises(NotImplementedError, match="lm_head that is a Linear that does more than multiply"):
        patch(unpatch(headed.get_base_model()))


@pytest.mark.parametrize(
    "model,reason",
    [
        (lambda: make("mistral", sliding_window=4), "MistralForCausalLM has sliding_window=4"),
        (lambda: make("llama", attention_dropout=0.1), "LlamaForCausalLM has attention_dropout=0.1"),
        (
            lambda: BertModel(BertConfig(vocab_size=10, num_hidden_layers=1)),
            "BertModel has an architecture that is not one of Llama",
        ),
        (
            lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8)),
            "Gemma2ForCausalLM has sliding_window=.*attn_logit_softcapping=50.0.*an architecture that is not",
        ),
        (lambda: torch.nn.Linear(2, 2), "Linear has an architecture"),
    ],
)
def test_models_that_are_refused(model, reason):
    model = model()
    before = set(model.__dict__)
    with pytest.raises(NotImplementedError, match=f"patch: {reason}"):
        patch(model)
    assert set(model.__dict__) == before


def with_bias(model):
    model.lm_head = torch.nn.Linear(32, 100)


def with_hook(model):
    model.lm_head.register_forward_hook(lambda *a: None)


def with_loss(model):
    model.loss_function = F.cross_entropy


def with_forward(model):
    model.forward = model.forward


def with_weights(model):
    model.set_attn_implementation("eager")
    model.config.output_attentions = True


@pytest.mark.parametrize(
    "change,reason",
    [
        (with_bias, "an lm_head that is a Linear with a bias; the loss and the sampler take its weight alone"),
        (with_hook, "an lm_head that is a Linear that does more than multiply by its weight.*hooks"),
        (with_loss, "a loss_function of its own"),
        (with_forward, "a forward other than LlamaForCausalLM's; patch it before others wrap it"),
        (with_weights, "output_attentions=True in its config"),
    ],
)
def test_instances_that_are_refused(change, reason):
    model = make("llama")
    change(model)
    with pytest.raises(NotImplementedError, match=f"LlamaForCausalLM has {reason}"):
        patch(model)


def test_subclasses():
    class Same(LlamaForCausalLM):
        pass

    class Other(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model = patch(Same(MODELS["llama"][1]))
    assert isinstance(model, Same) and type(unpatch(model)) is Same
    with pytest.raises(NotImplementedError, match="Other has a forward other than LlamaForCausalLM's"):
        patch(Other(MODELS["llama"][1]))


def test_versions_whose_decoders_are_causal_are_refused(monkeypatch):
    monkeypatch.setattr("transformers.__version__", "5.1.3")
    with pytest.raises(ImportError, match=r"patch needs transformers 5.2 or newer, .*; got 5.1.3"):
        patch(make("llama"))


def test_wrong_order_and_wrong_arguments():
    model, (tokens, labels, weights) = patch(make("llama")), batch()
    with pytest.raises(ValueError, match="LlamaForCausalLM is patched already; unpatch it first"):
        patch(model)
    with pytest.raises(ValueError, match="unpatch: LlamaModel is not patched"):
        unpatch(model.model)
    with pytest.raises(NotImplementedError, match="generate appends one token after the other.*model.sample_tokens"):
        model.generate(tokens)
    with pytest.raises(ValueError, match="token_weights are weights of the loss and need labels"):
        model(input_ids=tokens, token_weights=weights)
    for name in ("weights", "normalizer"):  # of masked_cross_entropy_from_labels
        with pytest.raises(TypeError, match=f"{name} is no argument; pass "):
            model(input_ids=tokens, labels=labels, **{name: weights})
    padded = {"attention_mask": torch.tensor([[0, 0, 1]]), "position_ids": torch.tensor([[1, 1, 0]])}
    model(input_ids=tokens[:1, :3], **padded)  # positions as generate makes them
    for name, value in {"logits_to_keep": 1, "shift_labels": labels}.items():
        with pytest.raises(ValueError, match=f"{name} has no meaning with labels"):
            model(input_ids=tokens, labels=labels, **{name: value})
    with pytest.raises(NotImplementedError, match="has no output_attentions"):
        model(input_ids=tokens, output_attentions=True)
    loss, *others = model(input_ids=tokens, labels=labels, return_dict=False)
    assert loss.dim() == 0 and not others
    assert model(input_ids=tokens, labels=labels, output_hidden_states=True).hidden_states[0].shape == (3, 9, 32)
    model.forward = model.forward  # as accelerate does
    with pytest.raises(ValueError, match="the class or forward of LlamaForCausalLM was replaced after patch"):
        unpatch(model)
    del model.forward
    inner = make("llama")
    patch(inner.model)
    with pytest.raises(ValueError, match="patched already"):
        patch(inner)
