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

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from illada.config import DiffusionConfig
from illada.diffusion import draw_masks, draw_validation_masks
from illada.integrations.head_call import HeadCall, MaskedBatch, examine, standing_in
from illada.integrations.trainer_batch import (
    OURS,
    MaskedDiffusionCollator,
    check_labels,
    collate,
    flat_weights,
    learned_on_host,
    learned_tokens,
    shape_of,
    to_device,
)
from illada.integrations.transformers import NAME

__all__ = ["MaskedDiffusionCollator", "MaskedDiffusionTrainer"]


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
        self._fused, self._packs = examine(model)
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
        """Return `Trainer`'s loader, whose batches have `LEARNED`.

        The host finds it before the batch is sent to the device. `Trainer` does not publish this method: should it go,
        batches lack the entry, and the device finds what is learned.
        """
        collator, dispatched = self.data_collator, self.accelerator.dispatch_batches
        if dispatched is None:
            dispatched = isinstance(dataset, IterableDataset)
        if dispatched:
            return super()._get_dataloader(dataset, *args, **kwargs)  # one process sends batches to all: tensors alone
        self.data_collator = functools.partial(collate, collator)
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
                check_labels(batch)
        self._labels_are_checked = True
        tokens = torch.stack([learned_tokens(batch).sum() for batch in batches]).sum().to(device)
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
        processes, (count, length) = self.accelerator.num_processes, shape_of(inputs)
        step = self._train_batch_size * processes * self.args.gradient_accumulation_steps
        samples = inputs["first_sample"] + np.arange(count)
        drawn = draw_masks(samples, length, seed=self.args.seed, config=self.diffusion, global_batch=step)
        tokens = learned_tokens(inputs).sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        averaged = num_items_in_batch is not None and self.args.average_tokens_across_devices
        normalizer = tokens.clamp(min=1).to(self.args.device, torch.float32) / (processes if averaged else 1)
        loss, outputs = self._call(model, inputs, drawn, normalizer)
        return (loss, outputs) if return_outputs else loss

    def _call(
        self, model: nn.Module, inputs: dict[str, Any], drawn: tuple, normalizer: Tensor, return_nll: bool = False
    ) -> tuple[Tensor, Any]:
        """Return the loss, or the weighted nll [T]."""
        ids, counted = inputs["input_ids"], learned_on_host(inputs)
        arguments = {name: value for name, value in inputs.items() if name not in OURS}
        weights = flat_weights(drawn, inputs)
        if counted is not None:
            weights = np.where(counted.reshape(-1), weights, np.float32(0))
        rows = to_device(np.flatnonzero(weights).astype(np.int32), ids.device)
        token_weights = to_device(weights, ids.device)
        if counted is None:
            token_weights = token_weights * learned_tokens(inputs).flatten()
        batch = MaskedBatch(ids.flatten(), token_weights, rows, normalizer)
        arguments["input_ids"] = torch.where(token_weights.view_as(ids) > 0, self.mask_token_id, ids)
        if "cu_seq_lens_q" in inputs and not self._packs:
            raise ValueError(
                f"a packed batch needs a model that hands cu_seq_lens_q on to attn_implementation={NAME!r} or "
                "'flash_attention_2'; in this one its sequences would attend each other"
            )
        head = self.model.get_output_embeddings()
        call = HeadCall(head, head.forward, self._fused, batch, return_nll)
        with standing_in(call):
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
            check_labels(inputs)
        count, length = shape_of(inputs)
        batch = self._eval_batches * self.accelerator.num_processes + self.accelerator.process_index
        indices = batch * self.args.eval_batch_size + np.arange(count)
        self._eval_batches += 1
        one, total = torch.ones((), device=self.args.device), torch.zeros((), device=self.args.device)
        with self.compute_loss_context_manager():
            for stratum in range(self.eval_strata):
                drawn = draw_validation_masks(indices, length, stratum=stratum, strata=self.eval_strata)
                total = total + self._call(model, inputs, drawn, one, return_nll=True)[0] / self.eval_strata
        lengths = inputs.get("lengths", [length] * count)
        sample = to_device(np.repeat(np.arange(count), lengths), total.device)
        columns = torch.stack([total, learned_tokens(inputs).flatten().float()], dim=1)
        return None, columns.new_zeros(count, 2).index_add(0, sample, columns), None


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
