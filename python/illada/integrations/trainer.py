"""`MaskedDiffusionTrainer`: the HF Trainer with the loss of masked diffusion (Eq. 1), for any model with a head.

    from illada.integrations.trainer import MaskedDiffusionTrainer

    config = AutoConfig.from_pretrained("Qwen/Qwen3-0.6B-Base")
    config.is_causal = False  # a decoder, made bidirectional
    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B-Base", config=config)
    MaskedDiffusionTrainer(model, TrainingArguments("runs"), train_dataset=tokenized, mask_token_id=151662).train()

The trainer masks tokens, and the loss is made where the head's module is called, inside the forward that DDP and FSDP2
wrap. The head is called for tokens that are masked and learned, and for no others: padding is left out. A head that is
no more than its weight never makes logits. The model is as it was in every other call, so what is saved is a plain
checkpoint of `transformers`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from illada.config import DiffusionConfig
from illada.diffusion import draw_masks, draw_validation_masks
from illada.integrations.transformers import NAME
from illada.model import more_than_weight
from illada.ops import linear_masked_cross_entropy, masked_cross_entropy

#: What honours `cu_seq_lens_q`; with another attention the sequences of a pack would see each other.
_PACKED = (NAME, "flash_attention")


class MaskedDiffusionCollator:
    """Rows of `input_ids` as one batch: padded to the longest, or with `packed` one behind the other.

    Args:
        pad_token_id: stands in padding, which nothing reads.
        packed: a batch of one row, with `cu_seq_lens_q` and `position_ids`; for attn_implementation="illada" and
            "flash_attention_2".

    A row may have an `attention_mask` (what it hides is left out of a pack) and `labels`: -100 where a token is shown
    and not learned, such as a prompt's. A row without them (or with None) has no hidden token and learns all. Other
    columns must be in all rows, as long as `input_ids`; they are padded by 0.
    """

    def __init__(self, pad_token_id: int = 0, *, packed: bool = False) -> None:
        self.pad_token_id, self.packed = pad_token_id, packed

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch; a pack has `lengths`, a list, as well."""
        filled = [_filled(row) for row in rows]
        names = list(dict.fromkeys(name for row in filled for name in row))
        for row, name in itertools.product(filled, names):
            if name not in row:
                raise ValueError(f"{name} must be in every row or in none, got a row with {', '.join(row)} alone")
            if len(row[name]) != len(row["input_ids"]):
                raise ValueError(f"{name} must be as long as input_ids ({len(row['input_ids'])}), got {len(row[name])}")
        if all(row["labels"] is row["input_ids"] for row in filled):
            names.remove("labels")
        columns = {name: [_column(row[name]) for row in filled] for name in names}
        masks = columns.pop("attention_mask")
        if self.packed:
            return self._pack({n: [x[m.bool()] for x, m in zip(c, masks, strict=True)] for n, c in columns.items()})
        fill = {"input_ids": self.pad_token_id, "labels": -100}
        pad = nn.utils.rnn.pad_sequence
        batch = {name: pad(column, True, fill.get(name, 0)) for name, column in columns.items()}
        return batch | {"attention_mask": pad(masks, True, 0)}

    def _pack(self, columns: dict[str, list[Tensor]]) -> dict[str, Any]:
        lengths = [len(ids) for ids in columns["input_ids"]]
        starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        batch = {name: torch.cat(column)[None] for name, column in columns.items()}
        batch["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
        spans = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
        return batch | spans | {"max_length_q": max(lengths), "max_length_k": max(lengths), "lengths": lengths}


@dataclasses.dataclass
class _Masked:
    """The loss of a batch, flattened.

    rows: the tokens with a weight, masked and learned. Where the host does not know what is learned, all masked ones.
    """

    targets: Tensor  # int64 [T]
    weights: Tensor  # float32 [T], 1 / p where masked and learned
    rows: Tensor  # int32 [N], ascending
    normalizer: Tensor  # float32, 0-dim


@dataclasses.dataclass
class _Call:
    """A call of the model, in which `forward` stands in for that of the head's module.

    FSDP2 gathers the head's weight for that module's call, and DDP sees the call of the whole model; so the loss of a
    head that is no more than its weight (`fused`) is made right there, and is what the model returns as logits. Another
    head (bias, adapter, quantised; logits that the model caps or scales) gets the masked rows alone.
    """

    head: Any
    plain: Any  # the head's own forward
    fused: bool
    batch: _Masked
    return_nll: bool

    def result(self, logits: Tensor) -> Tensor:
        """Return the loss of what the model returned as logits; with `return_nll` float32 [T], 0 where unmasked."""
        if self.fused:
            return logits
        batch, rows = self.batch, self.batch.rows.long()
        loss = masked_cross_entropy(
            *(logits[0], batch.targets[rows], batch.weights[rows]),
            normalizer=batch.normalizer, return_nll=self.return_nll,
        )  # fmt: skip
        if isinstance(loss, Tensor):
            return loss
        return batch.weights.new_zeros(len(batch.weights)).index_copy(0, rows, loss[1])


#: The call that is under way. Global, because torch.compile takes all that hangs on a module to be of fixed size.
_CALL: _Call | None = None


def _forward(hidden: Tensor) -> Tensor:
    call, hidden = _CALL, hidden.flatten(0, -2)
    assert call is not None
    batch = call.batch
    if not call.fused:
        return call.plain(hidden[batch.rows.long()][None])
    loss = linear_masked_cross_entropy(
        *(hidden, call.head.weight, batch.targets, batch.weights),
        rows=batch.rows, normalizer=batch.normalizer, return_nll=call.return_nll,
    )  # fmt: skip
    return loss if isinstance(loss, Tensor) else loss[1]


@contextlib.contextmanager
def _standing_in(call: _Call) -> Iterator[None]:
    global _CALL
    if _CALL is not None:
        raise RuntimeError("another MaskedDiffusionTrainer is in its forward pass: train in processes, not in threads")
    own = call.head.__dict__.get("forward")
    _CALL, call.head.forward = call, _forward
    try:
        yield
    finally:
        _CALL = None
        del call.head.forward
        if own is not None:
            call.head.forward = own


@torch.no_grad()
def _examine(model: Any) -> tuple[bool, bool]:
    """Find by short forward passes whether the head's weight alone makes the loss, and whether batches can be packed.

    Raises:
        ValueError: the model has no head, or attends causally.
    """
    head, name = getattr(model, "get_output_embeddings", lambda: None)(), type(model).__name__
    if head is None or getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            "model must be an encoder or a decoder with a language-modelling head, such as AutoModelForMaskedLM or "
            f"AutoModelForCausalLM give, got {name}"
        )
    seen: list[tuple[Tensor, Tensor, int]] = []
    hook = head.register_forward_hook(lambda _, args, out: seen.append((args[0], out, out._version)))
    training, embedding = model.training, model.get_input_embeddings().weight
    kind = str(getattr(model.config, "_attn_implementation", None))
    elsewhere = kind not in ("None", "eager", "sdpa", NAME) and not embedding.is_cuda
    packs = kind.startswith(_PACKED)

    def call(ids: list[list[int]], **others: Any) -> Any:
        return model(input_ids=torch.tensor(ids, device=embedding.device) % len(embedding), **others)["logits"]

    try:
        if elsewhere:  # a kernel of GPUs, to which FSDP2 moves the model later
            model.set_attn_implementation("eager")
        model.eval()
        logits = call([[0, 1], [0, 2], [3, 1]])
        if len(seen) != 1 or seen[0][0].shape[:2] != (3, 2):
            raise ValueError(f"model must call its head once, with hidden states [B, L, C]; {name} does not")
        if packs and not elsewhere and not embedding.is_meta:
            # flash-attn tells sequences apart by positions too; ours refuses positions that alone would say so.
            positions = [0, 1] if kind == NAME else [0, 0]
            packs = _separates(call, seen, torch.tensor([positions], device=embedding.device))
    finally:
        if elsewhere:
            model.set_attn_implementation(kind)
        model.train(training)
        hook.remove()
    hidden, out, version = seen[0]
    if not hidden.is_meta:
        future, past = ((hidden[a, i] - hidden[b, i]).float().norm() for a, b, i in ((0, 1, 0), (0, 2, 1)))
        if future < 1e-2 * past:  # rounding, where the first token's state should depend on the second
            raise ValueError(
                f"model must attend in both directions, and {name} is causal: load it with a config in which is_causal "
                "is False"
            )
    untouched = logits is out and out._version == version
    return untouched and more_than_weight(head) is None, packs


def _separates(call: Any, seen: list[tuple[Tensor, Tensor, int]], positions: Tensor) -> bool:
    """Return whether the first of two packed tokens does not see the second.

    A model may ignore the arguments that separate them.
    """
    starts = torch.tensor([0, 1, 2], dtype=torch.int32, device=positions.device)
    spans = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 1, "max_length_k": 1}
    try:
        for second in (1, 2):
            call([[0, second]], position_ids=positions, **spans)
    except TypeError:  # an argument that it does not have
        return False
    return torch.equal(seen[-2][0][0, 0], seen[-1][0][0, 0])


class MaskedDiffusionTrainer(Trainer):
    """`Trainer` for masked diffusion: sum over masked tokens of CE / p, over the number of all tokens of the step.

    That number is the global batch's, under accumulation and on any number of processes. Which tokens are masked is a
    function of `args.seed` and of a sample's place in training alone: neither the split into micro-batches and
    processes nor resuming changes it. `labels` are optional: tokens with -100 are shown and do not count.

    Args:
        model: As in `Trainer`.
        args: As in `Trainer`.
        data_collator: As in `Trainer`; default `MaskedDiffusionCollator()`.
        kwargs: As in `Trainer`.
        mask_token_id: the token that hides others; default that of the processing_class or of the model's config.
        eps: smallest masking probability, p = (1 - eps) t + eps.
        t_sampling: "independent" draws t for each sequence; "low_discrepancy" spreads it over a global batch.
        eval_strata: evaluate() gives the bound of Eq. 1 in nats per token as `eval_loss`, by the midpoint rule over so
            many values of t; the same masks in every run. predict() gives the bound's sum and the number of tokens of
            each sample.

    Raises:
        ValueError: a model that attends causally or has no head; arguments that would change the loss.
        NotImplementedError: a way to train in which the loss is not right, naming the argument.
    """

    loss_is_scaled_for_ga = True
    model: Any

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        *,
        mask_token_id: int | None = None,
        eps: float = 1e-3,
        t_sampling: Literal["independent", "low_discrepancy"] = "independent",
        eval_strata: int = 8,
        **kwargs: Any,
    ) -> None:
        args = TrainingArguments("tmp_trainer") if args is None else args
        _refuse(args, kwargs)
        self.diffusion = DiffusionConfig(split_probability=0.0, eps=eps, t_sampling=t_sampling)
        if not isinstance(eval_strata, int) or eval_strata < 1:
            raise ValueError(f"eval_strata must be an integer of at least 1, got {eval_strata!r}")
        self.eval_strata = eval_strata
        self._given_mask_token_id, self._eval_batches, self._labels_are_checked = mask_token_id, 0, False
        if data_collator is None:
            pad = getattr(kwargs.get("processing_class"), "pad_token_id", None)
            data_collator = MaskedDiffusionCollator(0 if pad is None else pad)
        super().__init__(model, args, data_collator, **kwargs)
        self.model_accepts_loss_kwargs = True  # for transformers before loss_is_scaled_for_ga
        self._refuse_parallel()
        self._adopt(self.model)

    def _refuse_parallel(self) -> None:
        """Raise NotImplementedError where a model is split so that the loss is wrong.

        FSDP2 is allowed, and is kept from rounding the loss.
        """
        for name, kind in {"tp": "tensor", "cp": "context", "sp": "sequence"}.items():
            if (size := getattr(self, f"get_{name}_size", lambda: 1)()) > 1:
                raise NotImplementedError(
                    f"args.parallelism_config: {name}_size ({kind} parallel) must be 1, got {size}; use args.fsdp"
                )
        if self.is_deepspeed_enabled:
            raise NotImplementedError(
                "args.deepspeed: DeepSpeed is not supported, it shards the head behind the loss; use args.fsdp"
            )
        if getattr(self, "is_distributed_loading_by_transformers", False):
            raise NotImplementedError("model must not be sharded at load time; shard it with args.fsdp")
        if self.is_fsdp_enabled:
            self._keep_float32_loss()

    def _adopt(self, model: Any) -> None:
        self._fused, self._packs = _examine(model)
        candidates = (self._given_mask_token_id, getattr(self.processing_class, "mask_token_id", None))
        known = [i for i in (*candidates, getattr(model.config, "mask_token_id", None)) if i is not None]
        rows = model.get_input_embeddings().weight.shape[0]
        if not known or not 0 <= known[0] < rows:
            raise ValueError(f"mask_token_id must be in [0, {rows}), the model's embedding, got {(known or [None])[0]}")
        self.mask_token_id: int = known[0]

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Return the model of `model_init`.

        That of `train` is examined here, the first one by `__init__`.
        """
        model = super().call_model_init(trial)
        if getattr(self, "place_model_on_device", None) is not None:
            if self.place_model_on_device:
                model = model.to(self.args.device)
            self._adopt(model)
        return model

    def _keep_float32_loss(self) -> None:
        """Keep accelerate's FSDP2 from rounding the loss, which a module returns, to 16 bits."""
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise NotImplementedError(f"args.fsdp_config: version must be 2, got {plugin.fsdp_version}")
        if plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)

    # ------------------------------------------------------------------------------------------------------- training

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Return `Trainer`'s loader, whose batches have `_COUNTED`.

        The host finds it before the batch is sent to the device. `Trainer` does not publish this method: should it go,
        batches lack the entry, and the device finds what is learned.
        """
        collator, dispatched = self.data_collator, self.accelerator.dispatch_batches
        if dispatched is None:
            dispatched = isinstance(dataset, IterableDataset)
        if dispatched:
            return super()._get_dataloader(dataset, *args, **kwargs)  # one process sends batches to all: tensors alone
        self.data_collator = functools.partial(_collate, collator)
        try:
            return super()._get_dataloader(dataset, *args, **kwargs)
        finally:
            self.data_collator = collator

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | None]:
        """Return the batches of a step, each with its place in training, and the number of tokens in all of them."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if not batches:
            return [], None
        for batch in batches:
            if not self._labels_are_checked:  # of the first step alone: a device has to be waited for
                _check_labels(batch)
        self._labels_are_checked = True
        tokens = torch.stack([_counted(batch).sum() for batch in batches]).sum().to(device)
        if self.args.average_tokens_across_devices and self.accelerator.num_processes > 1:
            tokens = self.accelerator.gather(tokens).sum()
        first = self.state.global_step * self.args.gradient_accumulation_steps
        return [{**batch, "first_sample": self._sample(first + i)} for i, batch in enumerate(batches)], tokens

    def _sample(self, batch: int) -> int:
        """Return the index of the first sample of this process's micro-batch, counted over all processes and steps."""
        return (batch * self.accelerator.num_processes + self.accelerator.process_index) * self._train_batch_size

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the batch's part of the step's loss, times the number of processes, over which gradients are averaged.

        Args:
            model: The model, as the Trainer wraps it.
            inputs: of `get_batch_samples`.
            return_outputs: Also return the model's outputs.
            num_items_in_batch: tokens of the step, masked or not; default: those of the batch.
        """
        if "first_sample" not in inputs:
            raise ValueError("inputs must have first_sample, which get_batch_samples adds")
        processes, (count, length) = self.accelerator.num_processes, _shape(inputs)
        step = self._train_batch_size * processes * self.args.gradient_accumulation_steps
        samples = inputs["first_sample"] + np.arange(count)
        drawn = draw_masks(samples, length, seed=self.args.seed, config=self.diffusion, global_batch=step)
        tokens = _counted(inputs).sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        averaged = num_items_in_batch is not None and self.args.average_tokens_across_devices
        normalizer = tokens.clamp(min=1).to(self.args.device, torch.float32) / (processes if averaged else 1)
        loss, outputs = self._call(model, inputs, drawn, normalizer)
        return (loss, outputs) if return_outputs else loss

    def _call(
        self, model: nn.Module, inputs: dict[str, Any], drawn: tuple, normalizer: Tensor, return_nll: bool = False
    ) -> tuple[Tensor, Any]:
        """Return the loss, or the weighted nll [T]."""
        ids, counted = inputs["input_ids"], _counted_on_host(inputs)
        arguments = {name: value for name, value in inputs.items() if name not in _OURS}
        weights = _flat(drawn, inputs)
        if counted is not None:
            weights = np.where(counted.reshape(-1), weights, np.float32(0))
        rows = _to(np.flatnonzero(weights).astype(np.int32), ids.device)
        token_weights = _to(weights, ids.device)
        if counted is None:
            token_weights = token_weights * _counted(inputs).flatten()
        batch = _Masked(ids.flatten(), token_weights, rows, normalizer)
        arguments["input_ids"] = torch.where(token_weights.view_as(ids) > 0, self.mask_token_id, ids)
        if "cu_seq_lens_q" in inputs and not self._packs:
            raise ValueError(
                f"a packed batch needs a model that hands cu_seq_lens_q on to attn_implementation={NAME!r} or "
                "'flash_attention_2'; in this one its sequences would attend each other"
            )
        head = self.model.get_output_embeddings()
        call = _Call(head, head.forward, self._fused, batch, return_nll)
        with _standing_in(call):
            outputs = model(**arguments)
        result = call.result(outputs["logits"])
        return (result * token_weights if return_nll else result), outputs

    # ----------------------------------------------------------------------------------------------------- evaluation

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """Run `Trainer.evaluation_loop`, whose loss is the bound.

        All tokens count alike, however they are batched.
        """
        self._eval_batches = 0
        result = super().evaluation_loop(dataloader, description, *args, **kwargs)
        predictions = result.predictions
        if predictions is not None:
            parts = predictions if isinstance(predictions, list) else [predictions]
            nll, tokens = np.concatenate(parts).astype(np.float64).T
            prefix = kwargs.get("metric_key_prefix", "eval")
            assert result.metrics is not None
            result.metrics[f"{prefix}_loss"] = float(nll.sum() / max(1.0, tokens.sum()))
        return result

    @torch.no_grad()
    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, Tensor, None]:
        """Return the bound's sum and the number of tokens of each sample, float32 [B, 2], in place of logits."""
        inputs = self._prepare_inputs(inputs)
        if not self._eval_batches:  # of an evaluation's first batch alone, as in training
            _check_labels(inputs)
        count, length = _shape(inputs)
        batch = self._eval_batches * self.accelerator.num_processes + self.accelerator.process_index
        indices = batch * self.args.eval_batch_size + np.arange(count)
        self._eval_batches += 1
        one, total = torch.ones((), device=self.args.device), torch.zeros((), device=self.args.device)
        with self.compute_loss_context_manager():
            for stratum in range(self.eval_strata):
                drawn = draw_validation_masks(indices, length, stratum=stratum, strata=self.eval_strata)
                total = total + self._call(model, inputs, drawn, one, return_nll=True)[0] / self.eval_strata
        lengths = inputs.get("lengths", [length] * count)
        sample = _to(np.repeat(np.arange(count), lengths), total.device)
        columns = torch.stack([total, _counted(inputs).flatten().float()], dim=1)
        return None, columns.new_zeros(count, 2).index_add(0, sample, columns), None


# ------------------------------------------------------------------------------------------------------------- batches


def _filled(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with labels and attention_mask, also where it has none.

    Then all its tokens are learned, and none is hidden.
    """
    given = {name: values for name, values in row.items() if values is not None}
    ids = given["input_ids"]
    return {"labels": ids, "attention_mask": [1] * len(ids)} | given


def _column(values: Any) -> Tensor:
    """Return a row's values as a tensor: int64 also without tokens, where torch would make it float32."""
    return torch.as_tensor(values) if len(values) else torch.zeros(0, dtype=torch.int64)


#: In a batch: which tokens are learned, bool as `input_ids`, an array that stays on the host.
_COUNTED = "counted_on_host"
#: Entries of a batch that are the trainer's, not the model's.
_OURS = ("labels", "lengths", "first_sample", _COUNTED)


def _collate(collator: Callable[[Any], Any], rows: Any) -> dict[str, Any]:
    """Return a batch of `collator` with `_COUNTED`, which is None for a batch that is on a device already."""
    batch = dict(collator(rows))
    return batch | {_COUNTED: _counted_on_host(batch)}


def _counted_on_host(batch: dict[str, Any]) -> NDArray[np.bool_] | None:
    """Return `_counted` without waiting for a device; None where only the device knows."""
    if batch.get(_COUNTED) is None and batch["input_ids"].device.type == "cpu":
        return _counted(batch).numpy()
    return batch.get(_COUNTED)


def _counted(batch: dict[str, Any]) -> Tensor:
    """Return which tokens are learned, bool of the shape of `input_ids`.

    These are neither padding nor left out by labels.
    """
    ids, mask, labels = batch["input_ids"], batch.get("attention_mask"), batch.get("labels")
    counted = torch.ones_like(ids, dtype=torch.bool)
    for name, other in (("attention_mask", mask), ("labels", labels)):
        if other is not None and other.shape != ids.shape:
            raise ValueError(f"{name} must have the shape of input_ids, {list(ids.shape)}, got {list(other.shape)}")
    if mask is not None:
        counted = counted & mask.bool()
    return counted if labels is None else counted & (labels != -100)


def _check_labels(batch: dict[str, Any]) -> None:
    labels, ids = batch.get("labels"), batch["input_ids"]
    if labels is not None and bool((_counted(batch) & (labels != ids)).any()):
        raise ValueError(
            "labels must be input_ids or, at tokens that are not learned, -100; the trainer masks by itself, so use "
            "MaskedDiffusionCollator, and none that masks (DataCollatorForLanguageModeling with mlm=True) or shifts"
        )


def _shape(batch: dict[str, Any]) -> tuple[int, int]:
    """Return the number of sequences, and the longest's length."""
    if "cu_seq_lens_q" in batch and "lengths" not in batch:
        raise ValueError("a packed batch must have lengths, a list: pack with MaskedDiffusionCollator(packed=True)")
    lengths = batch.get("lengths")
    return tuple(batch["input_ids"].shape) if lengths is None else (len(lengths), max(lengths))


def _flat(drawn: tuple[np.ndarray, np.ndarray], batch: dict[str, Any]) -> np.ndarray:
    """Return each token's weight, float32 [T], 0 where unmasked, of masks [B, L] and weights [B]."""
    masked, weights = drawn
    if "lengths" in batch:
        inside = np.arange(masked.shape[1]) < np.asarray(batch["lengths"])[:, None]
        flat, of_each = masked[inside], np.repeat(weights, batch["lengths"])
    else:
        flat, of_each = masked.reshape(-1), np.repeat(weights, masked.shape[1])
    return np.where(flat, of_each, np.float32(0))


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    """Return the tensor on the device, without waiting for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _refuse(args: TrainingArguments, kwargs: dict[str, Any]) -> None:
    """Refuse the Trainer's options that would leave another loss than this trainer's, or a wrong one."""
    for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} must be None: the loss is Eq. 1, evaluate() gives its bound, and no logits")
    if args.label_smoothing_factor:
        raise ValueError(f"args.label_smoothing_factor must be 0, got {args.label_smoothing_factor}")
    if args.n_gpu > 1:
        raise NotImplementedError(
            f"args.n_gpu must be at most 1 (DataParallel is not supported), got {args.n_gpu}: start it with torchrun"
        )
    if args.use_liger_kernel:
        raise NotImplementedError("args.use_liger_kernel is not supported: it replaces the forward around the head")
