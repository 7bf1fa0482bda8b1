"""MaskedDiffusionTrainer against the formula in float64, and one way to split a step against another."""

import copy
import gc
import time
import types
import weakref

import numpy as np
import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    Gemma2Config,
    LlamaConfig,
    ModernBertConfig,
    TrainerCallback,
    TrainingArguments,
)
from two_processes import gloo, run_in_two

import illada
from illada.config import DiffusionConfig
from illada.diffusion import draw_masks, draw_validation_masks, make_batch
from illada.integrations import trainer as trainer_module
from illada.integrations import trainer_batch
from illada.integrations import transformers as attention
from illada.integrations.trainer import MaskedDiffusionCollator, MaskedDiffusionTrainer

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.1, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
NONE = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
DECODER = {"num_key_value_heads": 2, "is_causal": False}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, **DECODER),  # the head is a weight
    "llama, tied": LlamaConfig(**SIZES, **DECODER, tie_word_embeddings=True),
    "bert": BertConfig(**SIZES, **NONE),  # a layer before the head, and a bias
    "modernbert": ModernBertConfig(
        **SIZES, global_attn_every_n_layers=1, decoder_bias=False
    ),  # a layer before a weight
    "gemma2": Gemma2Config(  # logits are capped
        **SIZES, **DECODER, head_dim=8, layer_types=["full_attention"] * 2, final_logit_softcapping=2.0
    ),
}
FUSED = ("llama", "llama, tied", "modernbert")
MASK, SEED = 4, 11
LENGTHS = (9, 5, 7, 12, 3, 8, 4, 6)  # no two processes and no two micro-batches have as many tokens
ROWS = [{"input_ids": np.random.default_rng(0).integers(5, 50, n).tolist()} for n in LENGTHS]


def make_model(name="llama", **options):
    torch.manual_seed(0)
    kind = AutoModelForMaskedLM if "bert" in name else AutoModelForCausalLM
    return kind.from_config(copy.deepcopy(CONFIGS[name]), **options)  # models write into their config


class Gradients(TrainerCallback):
    """The gradients that a step gives the optimizer, by the model's own names; whole, where FSDP2 keeps shards."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **others):
        found = {n.removeprefix("_orig_mod."): p.grad for n, p in model.named_parameters() if p.grad is not None}
        self.steps.append({n: getattr(g, "full_tensor", g.clone)() for n, g in found.items()})


def make_trainer(folder, model, rows=ROWS, batch=8, accumulation=1, callbacks=(), options=None, **arguments):
    """Return a trainer of one step over all rows, in their order, that changes nothing."""
    arguments = {"max_steps": 1, "learning_rate": 0.0, "save_strategy": "no", **arguments}
    args = TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, seed=SEED, train_sampling_strategy="sequential",
        per_device_train_batch_size=batch, per_device_eval_batch_size=3, gradient_accumulation_steps=accumulation,
        optim="sgd", max_grad_norm=0.0, logging_steps=1, **arguments,
    )  # fmt: skip
    return MaskedDiffusionTrainer(
        model, args, train_dataset=rows, eval_dataset=ROWS, mask_token_id=MASK, callbacks=[*callbacks], **options or {}
    )


def step(folder, model, **options):
    """Return loss and gradients of one step."""
    seen = Gradients()
    trainer = make_trainer(folder, model, callbacks=[seen], **options)
    loss = trainer.train().training_loss
    assert len(seen.steps) == 1
    return loss, seen.steps[0]


def draw(samples, length, **options):
    return draw_masks(samples, length, seed=SEED, **options)


def by_hand(model, rows=ROWS, draw=draw, **options):
    """Compute Eq. 1 in float64, one row after the other."""
    model, total, tokens = model.double(), 0.0, 0
    for i, row in enumerate(rows):
        ids = torch.tensor(row["input_ids"])
        masked, weight = draw(np.array([i]), len(ids), **options)
        learned = torch.tensor(row.get("labels", row["input_ids"])) != -100
        masked = torch.from_numpy(masked[0]) & learned
        logits = model(input_ids=torch.where(masked, MASK, ids)[None])["logits"][0]
        nll = torch.nn.functional.cross_entropy(logits, ids, reduction="none")
        total, tokens = total + (nll * masked).sum() * float(weight[0]), tokens + int(learned.sum())
    return total / tokens


def by_hand_with_gradients(model, **options):
    loss = by_hand(model, **options)
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(got, want, tolerance=1e-5):
    assert got[0] == pytest.approx(want[0], rel=tolerance)
    assert got[1].keys() == want[1].keys()
    whole = torch.stack([grad.norm().double() for grad in want[1].values()]).norm()
    for name, grad in want[1].items():  # against rounding: those of biases of keys are 0
        error = (got[1][name].double() - grad.double()).norm()
        assert error < tolerance * max(grad.norm().double(), 1e-2 * whole), name


# ------------------------------------------------------------------------------------------------------- one process


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_the_formulas(name, tmp_path):
    model = make_model(name)
    assert make_trainer(tmp_path, model)._fused == (name in FUSED)
    assert_same(step(tmp_path, model), by_hand_with_gradients(make_model(name)))
    assert "forward" not in model.get_output_embeddings().__dict__  # the model is as it was


def test_accumulation_makes_the_same_step(tmp_path):
    want = step(tmp_path, make_model())
    assert_same(step(tmp_path, make_model(), batch=2, accumulation=4), want)
    assert_same(step(tmp_path, make_model(), batch=1, accumulation=8), want)


def test_low_discrepancy(tmp_path):
    options = {"t_sampling": "low_discrepancy", "eps": 0.1}
    want = by_hand_with_gradients(make_model(), global_batch=8, config=DiffusionConfig(**options))
    assert_same(step(tmp_path, make_model(), batch=4, accumulation=2, options=options), want)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_packed_batch(name, tmp_path):
    attention.register()
    model = make_model(name, attn_implementation="illada")
    options = {"options": {"data_collator": MaskedDiffusionCollator(packed=True)}}
    want = by_hand_with_gradients(make_model(name))
    assert_same(step(tmp_path, model, batch=4, accumulation=2, **options), want)
    padded = make_trainer(tmp_path, model).evaluate()["eval_loss"]
    assert make_trainer(tmp_path, model, **options).evaluate()["eval_loss"] == pytest.approx(padded, rel=1e-6)
    with pytest.raises(
        ValueError, match="packed batch needs a model that hands cu_seq_lens_q on to attn_implementation='illada'"
    ):
        step(tmp_path, make_model(name), **options)


def test_labels_say_what_is_learned(tmp_path):
    rows = [row | {"labels": [-100, -100, *row["input_ids"][2:]]} for row in ROWS]
    assert_same(step(tmp_path, make_model(), rows=rows), by_hand_with_gradients(make_model(), rows=rows))
    wrong = [row | {"labels": [7, *row["input_ids"][1:]]} for row in ROWS]
    with pytest.raises(ValueError, match="labels must be input_ids or.*-100"):
        step(tmp_path, make_model(), rows=wrong)
    with pytest.raises(ValueError, match="labels must be input_ids or.*-100"):
        make_trainer(tmp_path, make_model()).predict(wrong)


@pytest.mark.parametrize("packed", [False, True])
def test_rows_of_a_batch_with_and_without_labels(packed):
    """In either order; a row without tokens stays int64."""
    rows = [{"input_ids": [7, 8], "labels": None}, {"input_ids": []}, {"input_ids": [9, 5], "labels": [-100, 5]}]
    for order, want in ((rows, [7, 8, -100, 5]), (rows[::-1], [-100, 5, 7, 8])):
        batch = MaskedDiffusionCollator(packed=packed)(order)
        labels = batch["labels"][0] if packed else batch["labels"][batch["attention_mask"].bool()]
        assert labels.tolist() == want and batch["input_ids"].dtype == torch.int64
    hidden = [{"input_ids": [7, 8]}, {"input_ids": [9, 5], "attention_mask": [1, 0]}]
    batch = MaskedDiffusionCollator(packed=packed)(hidden)
    assert (batch["lengths"] if packed else batch["attention_mask"].sum(1).tolist()) == [2, 1] and "labels" not in batch
    with pytest.raises(ValueError, match="speaker must be in every row or in none"):
        MaskedDiffusionCollator(packed=packed)([{"input_ids": [1]}, {"input_ids": [1], "speaker": [0]}])


def test_rows_that_are_padded_already(tmp_path):
    padded = [
        {"input_ids": [*r["input_ids"], 0, 0], "attention_mask": [1] * len(r["input_ids"]) + [0, 0]} for r in ROWS
    ]
    assert_same(step(tmp_path, make_model(), rows=padded), by_hand_with_gradients(make_model()))
    packed = MaskedDiffusionCollator(packed=True)(padded)
    assert packed["lengths"] == list(LENGTHS) and packed["input_ids"].shape == (1, sum(LENGTHS))


@pytest.mark.parametrize("eps", [1e-3, 0.2])
@pytest.mark.parametrize("t_sampling", ["independent", "low_discrepancy"])
def test_masks_are_those_of_make_batch(eps, t_sampling):
    windows, config = np.full((3, 10), 9), DiffusionConfig(split_probability=0.0, eps=eps, t_sampling=t_sampling)
    options = {"seed": 3, "config": config, "global_batch": 8}
    batch = make_batch(windows, np.arange(5, 8), mask_id=MASK, **options)
    masked, weights = draw_masks(np.arange(5, 8), 14, **options)
    assert np.array_equal(batch.tokens.numpy() == MASK, masked[:, :10].reshape(-1))
    assert np.array_equal(batch.token_weights.numpy(), (masked[:, :10] * weights[:, None]).reshape(-1))


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("packed", [False, True])
def test_rows_of_the_head_are_masked_and_learned(name, packed, monkeypatch, tmp_path):
    """Not padding, and not what labels leave out; the host knows it from the collator, the device is not asked."""
    attention.register()
    rows = [row | {"labels": [-100, -100, *row["input_ids"][2:]]} for row in ROWS]
    seen, plain, collator = [], trainer_module.standing_in, MaskedDiffusionCollator(packed=packed)
    trainer = make_trainer(
        tmp_path, make_model(name, attn_implementation="illada"), rows=rows, options={"data_collator": collator}
    )
    loader = trainer.get_train_dataloader()
    assert trainer.data_collator is collator
    (batch,), tokens = trainer.get_batch_samples(iter(loader), 1, trainer.args.device)
    masked, weights = draw(np.arange(8), max(LENGTHS))
    learned = np.array([[2 <= j < length for j in range(max(LENGTHS))] for length in LENGTHS])
    where = (masked & learned)[np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]] if packed else masked & learned
    monkeypatch.setattr(trainer_module, "standing_in", lambda call: seen.append(call.batch) or plain(call))
    for module in (trainer_module, trainer_batch):
        monkeypatch.setattr(module, "learned_tokens", lambda batch: pytest.fail("the device was asked"))
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=tokens)
    assert int(tokens) == learned.sum()
    assert seen[0].rows.tolist() == np.flatnonzero(where).tolist()
    assert np.array_equal(seen[0].weights.nonzero()[:, 0], np.flatnonzero(where))


def test_a_batch_of_which_only_the_device_knows_what_is_learned(monkeypatch, tmp_path):
    """As of a stream that one process reads for all: the same loss and gradients, by masked rows of weight 0."""
    want = step(tmp_path, make_model())
    for module in (trainer_module, trainer_batch):
        monkeypatch.setattr(module, "learned_on_host", lambda batch: None)
    assert_same(step(tmp_path, make_model()), want)
    monkeypatch.undo()

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(ROWS)

    batch = next(iter(make_trainer(tmp_path, make_model(), rows=Stream()).get_train_dataloader()))
    assert all(isinstance(value, torch.Tensor) for value in batch.values())  # accelerate joins no others
    assert_same(step(tmp_path, make_model(), rows=Stream()), want)


def test_evaluate_is_the_bound(tmp_path):
    model = make_model()
    trainer = make_trainer(tmp_path, model, options={"eval_strata": 3})
    got = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == got  # and again
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == got
    with torch.no_grad():
        want = sum(by_hand(model, draw=draw_validation_masks, stratum=i, strata=3) for i in range(3)) / 3
    assert got == pytest.approx(float(want), rel=1e-6)


def test_predict_gives_the_samples(tmp_path):
    nll, tokens = make_trainer(tmp_path, make_model("bert")).predict(ROWS).predictions.T
    assert tokens.tolist() == list(LENGTHS)
    assert nll.sum() / tokens.sum() == pytest.approx(
        make_trainer(tmp_path, make_model("bert")).evaluate()["eval_loss"], rel=1e-6
    )


def test_saved_models_are_plain_and_training_resumes(tmp_path):
    def run(folder, rows=ROWS, **options):
        seen = Gradients()
        arguments = {"max_steps": 4, "learning_rate": 0.1, "save_strategy": "steps", "save_steps": 2, "batch": 2}
        trainer = make_trainer(tmp_path / folder, make_model(), callbacks=[seen], accumulation=2, **arguments)
        trainer.train(**options)
        return trainer, seen.steps

    trainer, whole = run("whole")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-4")
    assert loaded.config.is_causal is False
    want = make_model().state_dict().keys()
    assert loaded.state_dict().keys() == trainer.model.state_dict().keys() == want
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[name])
    ids = torch.tensor([ROWS[0]["input_ids"]])
    assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)  # a model as before
    _, resumed = run("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert len(resumed) == 2
    for got, expected in zip(resumed, whole[2:], strict=True):
        for name, grad in expected.items():
            assert torch.equal(got[name], grad), name


def test_model_init(tmp_path):
    options = {"options": {"model_init": lambda: make_model()}}
    assert_same(step(tmp_path, None, **options), step(tmp_path, make_model()), 1e-7)


def test_a_model_that_drops_the_lengths_of_a_pack(tmp_path):
    """With the right attention, all sequences of a pack would be one."""
    attention.register()
    model, options = make_model(attn_implementation="illada"), {"data_collator": MaskedDiffusionCollator(packed=True)}
    plain = model.model.forward
    for forward in (
        lambda input_ids, attention_mask=None, **others: plain(input_ids, attention_mask),
        lambda input_ids, attention_mask=None, position_ids=None, **others: plain(
            input_ids, attention_mask, position_ids
        ),
        lambda input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache: plain(input_ids),
    ):
        model.model.forward = forward
        with pytest.raises(ValueError, match="packed batch needs a model that hands cu_seq_lens_q on"):
            step(tmp_path, model, options=options)


def test_a_trainer_that_is_gone_keeps_no_model_alive(tmp_path):
    model = make_model()
    trainer = make_trainer(tmp_path, model)
    trainer.train()
    trainer.evaluate()
    head, dead = weakref.ref(model.lm_head.weight), weakref.ref(model)
    del trainer, model
    deadline = time.monotonic() + 10  # other threads, such as that of a progress bar, may hold a frame for a moment
    while (dead() is not None or head() is not None) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    assert dead() is None and head() is None


def test_a_pretrained_decoder_made_bidirectional(tmp_path):
    """As the documentation has it: by its config, or by `patch`."""
    causal, packed = (
        LlamaConfig(**SIZES, num_key_value_heads=2),
        {"data_collator": MaskedDiffusionCollator(packed=True)},
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(causal).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.is_causal = False
    want = by_hand_with_gradients(make_model())
    assert_same(step(tmp_path, AutoModelForCausalLM.from_pretrained(tmp_path, config=config)), want)
    patched = illada.integrations.patch(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert_same(step(tmp_path, patched, options=packed), want)


def test_a_model_that_waits_for_its_gpu(tmp_path):
    """FSDP2 moves it there later; on a CPU its attention has no kernel."""

    def no_kernel(*arguments, **options):
        raise RuntimeError("no kernel for a CPU")

    AttentionInterface.register("gpus_only", no_kernel)
    model = make_model(attn_implementation="gpus_only")
    assert make_trainer(tmp_path, model)._fused
    assert model.config._attn_implementation == "gpus_only"


def test_adapters_on_every_linear_and_on_the_head(tmp_path):
    from peft import LoraConfig, get_peft_model

    def adapted(head):
        torch.manual_seed(1)
        linears = ["q_proj", "down_proj", *(["lm_head"] if head else [])]
        model = get_peft_model(make_model(), LoraConfig(r=2, target_modules=linears, init_lora_weights=False))
        return model

    for head in (False, True):
        assert make_trainer(tmp_path, adapted(head))._fused is not head
        assert_same(step(tmp_path, adapted(head)), by_hand_with_gradients(adapted(head)))


def test_what_would_be_another_loss_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="LlamaForCausalLM is causal: load it with a config in which is_causal is False"
    ):
        make_trainer(tmp_path, AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)))
    with pytest.raises(ValueError, match="model must be .*language-modelling head.*got LlamaForSequenceClassification"):
        make_trainer(tmp_path, AutoModelForSequenceClassification.from_config(copy.deepcopy(CONFIGS["llama"])))
    for options, message in (
        ({"eps": 0.7}, "eps must be below 0.5, got 0.7"),
        ({"t_sampling": "all"}, "t_sampling must be independent or low_discrepancy"),
        ({"eval_strata": 0}, "eval_strata must be .* at least 1, got 0"),
        ({"compute_metrics": print}, "compute_metrics must be None"),
        ({"compute_loss_func": print}, "compute_loss_func must be None"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, make_model(), options=options)
    with pytest.raises(ValueError, match=r"mask_token_id must be in \[0, 50\).*got None"):
        MaskedDiffusionTrainer(make_model(), TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    with pytest.raises(ValueError, match="label_smoothing_factor must be 0"):
        make_trainer(tmp_path, make_model(), label_smoothing_factor=0.1)
    with pytest.raises(NotImplementedError, match="use_liger_kernel"):
        make_trainer(tmp_path, make_model(), use_liger_kernel=True)
    trainer = make_trainer(tmp_path, make_model())
    with pytest.raises(ValueError, match="first_sample"):
        trainer.compute_loss(trainer.model, {"input_ids": torch.ones(1, 3, dtype=torch.int64)})
    with pytest.raises(RuntimeError, match="another MaskedDiffusionTrainer is in its forward pass"):
        other = make_trainer(tmp_path, make_model())
        trainer.model.register_forward_hook(lambda *_: other.evaluate())  # as a thread would, at a known place
        trainer.evaluate()
    assert "forward" not in trainer.model.lm_head.__dict__
    assert other.evaluate()["eval_loss"] > 0  # what was raised leaves nothing behind
    with pytest.raises(ValueError, match="labels must be as long as input_ids"):
        MaskedDiffusionCollator()([{"input_ids": [1, 2], "labels": [1]}])


@pytest.mark.parametrize(
    "name, message",
    [
        ("tp", r"tp_size \(tensor parallel\)"),
        ("cp", r"cp_size \(context parallel\)"),
        ("sp", r"sp_size \(sequence parallel\)"),
    ],
)
def test_parallel_layouts_are_refused(name, message, monkeypatch, tmp_path):
    monkeypatch.setattr(MaskedDiffusionTrainer, f"get_{name}_size", lambda self: 2)
    with pytest.raises(
        NotImplementedError, match=f"args.parallelism_config: {message} must be 1, got 2; use args.fsdp"
    ):
        make_trainer(tmp_path, make_model())


@pytest.mark.parametrize(
    "enabled, message",
    [
        ({"is_deepspeed_enabled": True}, "args.deepspeed: DeepSpeed is not supported"),
        ({"is_fsdp_enabled": True}, "args.fsdp_config: version must be 2, got 1"),
    ],
)
def test_wrappers_that_are_refused(enabled, message, monkeypatch, tmp_path):
    """As transformers' own set-up would leave them, which wants their packages and a GPU."""
    plain = MaskedDiffusionTrainer.create_accelerator_and_postprocess

    def create(trainer):
        plain(trainer)
        trainer.__dict__.update(enabled)
        state = types.SimpleNamespace(fsdp_version=1, mixed_precision_policy=None)
        monkeypatch.setitem(trainer.accelerator.state.__dict__, "fsdp_plugin", state)

    monkeypatch.setattr(MaskedDiffusionTrainer, "create_accelerator_and_postprocess", create)
    with pytest.raises(NotImplementedError, match=message):
        make_trainer(tmp_path, make_model())


def test_models_sharded_when_they_were_loaded_are_refused(monkeypatch, tmp_path):
    model = make_model()
    monkeypatch.setattr(type(model), "is_distributed_loading_by_transformers", True, raising=False)
    model.forward = lambda *arguments, **named: pytest.fail("called before it was refused")
    with pytest.raises(NotImplementedError, match="model must not be sharded at load time; shard it with args.fsdp"):
        make_trainer(tmp_path, model)


def test_data_parallel_is_refused(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    args._n_gpu = 2
    with pytest.raises(NotImplementedError, match=r"args.n_gpu must be at most 1 \(DataParallel.*got 2: .*torchrun"):
        MaskedDiffusionTrainer(make_model(), args, mask_token_id=MASK)


BFLOAT16 = {"bf16": True}
CHECKPOINTING = {"activation_checkpointing": True}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "bert", "gemma2"])
@pytest.mark.parametrize("options", [BFLOAT16, CHECKPOINTING], ids=["bf16", "checkpointing"])
def test_bfloat16_and_checkpointing(name, options, tmp_path):
    got = step(tmp_path, make_model(name), batch=2, accumulation=4, **options)
    assert_same(got, step(tmp_path, make_model(name)), 5e-2 if options is BFLOAT16 else 1e-6)
    assert all(grad.dtype == torch.float32 for grad in got[1].values())


@pytest.mark.slow
@pytest.mark.parametrize("name, backend", [("llama", "aot_eager"), ("bert", "aot_eager"), ("llama", "inductor")])
def test_compiled(name, backend, tmp_path):
    attention.register()
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = make_model(name, attn_implementation="illada")
    rows = [{"input_ids": list(range(5, 17))} for _ in range(8)]  # of one length, and never as many are masked
    options = {"torch_compile": True, "torch_compile_backend": backend, "accumulation": 4, "batch": 2}
    got = step(tmp_path, model, rows=rows, **options)
    assert_same(got, step(tmp_path, make_model(name), rows=rows))
    stats = torch._dynamo.utils.counters
    assert stats["stats"]["unique_graphs"] == 2 and not stats["graph_break"]  # the second is of any number of masks


# ----------------------------------------------------------------------------------------------------- two processes


def fsdp(**config):
    return {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT", **config}}


FSDP = fsdp()
#: name: model, arguments of the trainer
CASES = {
    **{f"DDP, {name}": (name, {"batch": 4}) for name in ("llama", "bert")},
    "DDP, accumulation": ("llama, tied", {"batch": 1, "accumulation": 4}),
    "DDP, bfloat16": ("llama", {"batch": 2, "accumulation": 2, **BFLOAT16}),
    "DDP, checkpointing": ("bert", {"batch": 2, "accumulation": 2, **CHECKPOINTING}),
    "DDP, compiled": ("llama", {"batch": 2, "accumulation": 2, "torch_compile": True, "torch_compile_backend": "aot_eager"}),
    **{f"FSDP2, {name}": (name, {"batch": 4, **FSDP}) for name in ("llama", "llama, tied", "gemma2")},
    "FSDP2, modernbert": ("modernbert", {"batch": 4, **fsdp(transformer_layer_cls_to_wrap=["ModernBertEncoderLayer"])}),
    "FSDP2, accumulation": ("llama, tied", {"batch": 1, "accumulation": 4, **FSDP}),
    "FSDP2, bfloat16": ("llama", {"batch": 2, "accumulation": 2, **FSDP, **BFLOAT16}),
    "FSDP2, checkpointing": ("llama", {"batch": 2, "accumulation": 2, **FSDP, **CHECKPOINTING}),
}  # fmt: skip
HAS_FSDP = torch.__version__ >= (2, 13)  # before, gloo could not average, or summed (pytorch#162338)


def let_accelerate_shard_on_a_cpu():
    """Let accelerate use FSDP on a CPU, where it would take DDP without a warning."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    plain = AcceleratorState.__init__

    def init(self, *arguments, fsdp_plugin=None, **options):
        plain(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
        if self.__dict__.get("fsdp_plugin") is not None:
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = init


def run_process(folder):
    attention.register()
    let_accelerate_shard_on_a_cpu()
    results = {}
    with gloo(folder) as rank:
        for case, (name, options) in CASES.items():
            if HAS_FSDP or "fsdp" not in options:
                kind = None if name in ("modernbert", "gemma2") else "illada"  # these have windows and caps
                model, seen = make_model(name, attn_implementation=kind), Gradients()
                trainer = make_trainer(f"{folder}/{case}", model, callbacks=[seen], **options)
                loss = trainer.train().training_loss
                results[case] = loss, seen.steps[0], trainer.evaluate()["eval_loss"]
                trainer.save_model(f"{folder}/{case}/saved")
        torch.save(results, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_in_two(run_process, folder, timeout=480)
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_make_the_step_of_one(case, two_processes, tmp_path):
    """With padded batches and attn_implementation="illada", against SDPA in one process."""
    folder, results = two_processes
    name, options = CASES[case]
    if "fsdp" in options and not HAS_FSDP:
        pytest.skip("FSDP2 on gloo needs torch 2.13")
    want, bound = step(tmp_path, make_model(name)), make_trainer(tmp_path, make_model(name)).evaluate()["eval_loss"]
    tolerance = 5e-2 if "bf16" in options else 1e-5
    for got in results:
        assert_same(got[case][:2], want, tolerance)
        assert got[case][2] == pytest.approx(bound, rel=tolerance)
    for first, second in zip(*(got[case][1].values() for got in results), strict=True):
        assert torch.equal(first, second)
    kind = AutoModelForMaskedLM if "bert" in name else AutoModelForCausalLM
    loaded = kind.from_pretrained(folder / case / "saved").state_dict()
    for key, tensor in make_model(name).state_dict().items():
        assert torch.equal(loaded[key], tensor), key
