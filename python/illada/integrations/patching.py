"""A Llama, Mistral, Qwen2 or Qwen3 of `transformers` as a masked diffusion model, in one line and on one instance.

    from illada.integrations import patch, unpatch

    model = patch(AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B"))
    loss = model(input_ids=canvas, attention_mask=mask, labels=labels, token_weights=1 / t).loss
    sample = model.sample_tokens({"input_ids": canvas, "attention_mask": mask}, rows=masked, temperature=0.7)

Attention becomes bidirectional and runs on `illada.varlen_attention`. With `labels` the loss is made of the hidden
states, without logits. `unpatch` gives back what there was. Parameters and the names in state_dict stay as they are.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from illada.integrations.transformers import NAME, STARTS_ANEW, register, starts_anew
from illada.model import more_than_weight
from illada.ops import TokenSample, linear_sample_tokens, masked_cross_entropy_from_labels

Model = TypeVar("Model", bound=nn.Module)

_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
_HEADS = tuple(f"{family}ForCausalLM" for family in _FAMILIES)
_BARE = tuple(f"{family}Model" for family in _FAMILIES)
_RECORD = "_illada_patch"


@dataclass
class _Record:
    """The values that `unpatch` needs.

    set_to: the config's attributes when the model was patched.
    """

    base: type
    original: Any
    set_to: dict[str, Any]


def patch(model: Model) -> Model:
    """Make this instance a masked diffusion model.

    Its class, other instances and the config object stay as they are.

    - Attention is bidirectional: `attn_implementation="illada"`, is_causal=False and use_cache=False in a copy of the
      config, which all modules of the model then hold.
    - `forward(..., labels, token_weights=None, num_items_in_batch=None, ignore_index=-100)` of a causal LM returns the
      loss of `illada.masked_cross_entropy_from_labels` on hidden states, and no logits. Labels are not shifted: a
      masked position predicts its own token. Without labels forward returns logits, as before.
    - `model.sample_tokens(inputs, **sampling)` is `illada.linear_sample_tokens` on the hidden states of `inputs`.
    - `model.generate` raises: it appends one token after the other.

    Returns:
        The same object.

    Raises:
        NotImplementedError: an architecture other than Llama, Mistral, Qwen2, Qwen3 (causal LM or bare model); sliding
            window, softcap, attention dropout, returned attention weights; a head that is more than its weight; a loss
            or a forward of the instance's own. All reasons are named.
        ValueError: the model, or one inside it, is patched already.
        ImportError: transformers is not installed, or is older than 5.2, which has causal decoders alone.
    """
    register()
    from transformers import __version__

    if tuple(int(part) for part in __version__.split(".")[:2]) < (5, 2):
        raise ImportError(
            f"patch needs transformers 5.2 or newer, whose decoders know is_causal=False; got {__version__}"
        )
    if any(_RECORD in module.__dict__ for module in model.modules()):
        raise ValueError(f"patch: {type(model).__name__} is patched already; unpatch it first")
    if reasons := _reasons(model):
        raise NotImplementedError(f"patch: {type(model).__name__} has {'; '.join(reasons)}")
    original: Any = model.config
    config = copy.deepcopy(original)
    config.is_causal, config.use_cache, config._attn_implementation = False, False, NAME
    base: Any = type(model)
    setattr(model, _RECORD, _Record(base, original, copy.deepcopy(config.__dict__)))
    _replace_config(model, original, config)
    model.__class__ = _patched(base)
    return model


def unpatch(model: Model) -> Model:
    """Undo `patch` and return the same object.

    Its class, config object and methods are those of before.

    What was changed in the config since is changed in the old one too (say, vocab_size by resize_token_embeddings).

    Raises:
        ValueError: the model is not patched, or what was put around its forward or class since would stay.
    """
    record: _Record | None = model.__dict__.get(_RECORD)
    if record is None:
        raise ValueError(f"unpatch: {type(model).__name__} is not patched; pass the model that patch was given")
    if type(model) is not _patched(record.base) or "forward" in model.__dict__:
        raise ValueError(
            f"unpatch: the class or forward of {type(model).__name__} was replaced after patch (FSDP2, accelerate); "
            "undo that first (accelerator.unwrap_model(model, keep_fp32_wrapper=False))"
        )
    config: Any = model.config
    for name, value in config.__dict__.items():
        if name not in record.set_to or record.set_to[name] != value:
            setattr(record.original, name, value)
    _replace_config(model, config, record.original)
    model.__class__ = record.base
    delattr(model, _RECORD)
    return model


def _replace_config(model: nn.Module, old: Any, new: Any) -> None:
    for module in model.modules():
        if module.__dict__.get("config") is old:
            module.config = new


def _reasons(model: nn.Module) -> list[str]:
    """Return the reasons why this model cannot be patched, each as something that it has."""
    config, reasons = getattr(model, "config", None), []
    for name in ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "attention_dropout"):
        if value := getattr(config, name, None):
            reasons.append(f"{name}={value!r} in its config, which illada's attention and loss do not do")
    if getattr(config, "output_attentions", False):
        reasons.append("output_attentions=True in its config, and the weights of attention never exist")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        reasons.append(f"layers of {', '.join(sorted(kinds))}")
    known: list[Any] = [base for base in type(model).__mro__ if base.__name__ in (*_HEADS, *_BARE)]
    known = [base for base in known if base.__module__.startswith("transformers.models.")]
    if not known:
        reasons.append(
            f"an architecture that is not one of {', '.join((*_HEADS, *_BARE))}; patch the model before or inside what "
            "wraps it (peft, DDP, torch.compile)"
        )
        return reasons
    if type(model).forward is not known[0].forward or "forward" in model.__dict__:
        reasons.append(f"a forward other than {known[0].__name__}'s; patch it before others wrap it (accelerate)")
    if "_loss_function" in model.__dict__:
        reasons.append("a loss_function of its own")
    if known[0].__name__ in _HEADS and (problem := more_than_weight(model.lm_head)):
        reasons.append(f"an lm_head that is {problem}; the loss and the sampler take its weight alone")
    return reasons


# ------------------------------------------------------------------------------------------------- the patched classes


@functools.cache
def _patched(base: type) -> type:
    """Return the subclass of `base` that a patched instance gets.

    It has the same names, because those go into checkpoints.
    """
    head = any(known.__name__ in _HEADS for known in base.__mro__)
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (_WithHead if head else _Bare, base), names)


def _blank(base: type) -> Any:
    """Return a patched instance without contents, for copy and pickle, which know `base` alone by its name."""
    register()
    cls: Any = _patched(base)
    return cls.__new__(cls)


class _Patched:
    """The base of both kinds of patched models."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        _, _, *state = reduced  # (copyreg.__newobj__, (class,), state, ...)
        return (_blank, (self.__dict__[_RECORD].base,), *state)


class _Bare(_Patched):
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **others: Any,
    ) -> Any:
        _refuse_packing(attention_mask, position_ids, others)
        return super().forward(input_ids, attention_mask, position_ids, **others)  # type: ignore[misc]


class _WithHead(_Patched):
    lm_head: Any
    base_model: Any

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        token_weights: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
        ignore_index: int = -100,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        _refuse_packing(attention_mask, position_ids, others)
        if labels is None:
            if token_weights is not None:
                raise ValueError("forward: token_weights are weights of the loss and need labels")
            more = {} if return_dict is None else {"return_dict": return_dict}
            return super().forward(input_ids, attention_mask, position_ids, **more, **others)  # type: ignore[misc]
        for name, meant in {"weights": "token_weights", "normalizer": "num_items_in_batch"}.items():
            if name in others:  # transformers would take any name, and the loss would be another one
                raise TypeError(f"forward: {name} is no argument; pass {meant}")
        for name in ("logits_to_keep", "shift_labels"):
            kept = others.pop(name, None)
            if isinstance(kept, Tensor) or kept:
                raise ValueError(f"forward: {name} has no meaning with labels: all of them count and none is shifted")
        outputs = self.base_model(input_ids, attention_mask, position_ids, **others)
        hidden = outputs.last_hidden_state
        loss = masked_cross_entropy_from_labels(
            hidden, labels, head=self._head_weight(), weights=token_weights, ignore_index=ignore_index,
            normalizer=num_items_in_batch,
        )  # fmt: skip
        result = CausalLMOutputWithPast(
            loss=loss, **{name: value for name, value in outputs.items() if name != "last_hidden_state"}
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict  # type: ignore[attr-defined]
        return result if as_dict else result.to_tuple()

    @torch.no_grad()
    def sample_tokens(self, inputs: Tensor | Mapping[str, Any], **sampling: Any) -> TokenSample:
        """Apply `illada.linear_sample_tokens` to the hidden states of `inputs`, without logits.

        Args:
            inputs: input_ids [B, L], or a mapping of forward's arguments, such as a tokenizer returns.
            **sampling: rows (int32 or int64 [N], which of the B L positions, counted row by row; default all),
                temperature, seed and what else `illada.linear_sample_tokens` takes.

        Returns:
            TokenSample: token [N], confidence [N] and so on, for `illada.remask` on input_ids.flatten().
        """
        forward = dict(inputs) if isinstance(inputs, Mapping) else {"input_ids": inputs}
        _refuse_packing(forward.get("attention_mask"), forward.get("position_ids"), forward)
        hidden = self.base_model(**forward).last_hidden_state.flatten(0, 1)
        weight = self._head_weight()
        return linear_sample_tokens(hidden.to(weight.dtype), weight, **sampling)

    def generate(self, *arguments: Any, **named: Any) -> Any:
        raise NotImplementedError(
            "generate appends one token after the other, and a patched model fills in masked tokens: use "
            "model.sample_tokens with illada.remask, or unpatch(model)"
        )

    def _head_weight(self) -> Tensor:
        if problem := more_than_weight(self.lm_head):
            raise TypeError(
                f"the lm_head of the patched model is {problem}; the loss and the sampler take its weight alone: leave "
                "the rest away, or merge it (peft: merge_and_unload)"
            )
        weight: Tensor = self.lm_head.weight
        return weight


def _refuse_packing(attention_mask: Tensor | None, position_ids: Tensor | None, others: Mapping[str, Any]) -> None:
    """Raise ValueError for rows of several sequences that position_ids alone tell apart.

    The sequences would attend to each other.

    The attention looks too, but on a GPU by an assertion, after which CUDA is lost to the process. Here the caller's
    position_ids are read before it, for which the host waits for the device: once a forward pass, not when compiled.
    """
    if position_ids is None or others.get("cu_seq_lens_q") is not None or torch.compiler.is_compiling():
        return
    tokens = None
    if attention_mask is not None and attention_mask.dim() == 2:
        tokens = attention_mask[:, -position_ids.shape[-1] :].bool()  # without what a cache holds
    if bool(starts_anew(position_ids, tokens)):
        raise ValueError(STARTS_ANEW)
