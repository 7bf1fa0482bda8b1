"""A masked diffusion model that illada exported, for transformers 5: plain torch, without illada.

A pre-norm Transformer whose attention is bidirectional: x += o(attention(q, k, v)), x += down(silu(gate) * up).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from .configuration_illada import IlladaConfig


class IlladaRMSNorm(nn.Module):
    """RMS normalisation, x / rms(x) * weight.

    Statistics are in float32, cast back before the weight.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension of x [..., C], in float32; the result has the dtype of x."""
        return self.weight * F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype)


def rotary_tables(position_ids: Tensor, config: IlladaConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin [B, 1, L, D] of RoPE, computed in float32."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=position_ids.device)
    angles = position_ids[..., None].float() * config.rope_theta ** (-exponents / config.head_dim)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    table_dtype = torch.float32 if config.rope_in_fp32 else dtype
    return angles.cos().to(table_dtype), angles.sin().to(table_dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE by halves: (a, b) -> (a cos - b sin, b cos + a sin)."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def eager_attention(
    module: "IlladaAttention",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    """Compute attention [B, L, H, D] and return it with its weights.

    The mask is added to the scores.
    """
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class IlladaAttention(nn.Module):
    """Bidirectional grouped-query attention in the implementation that the config names."""

    def __init__(self, config: IlladaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = False  # attention implementations look here
        width, kv_size = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, config.num_attention_heads * config.head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, width, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention's output for the residual stream, and its weights.

        The weights are None where the implementation does not give them.
        """
        linears = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for linear in linears)
        name = self.config._attn_implementation
        attend = eager_attention if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out, weights = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(out.flatten(2)), weights


class IlladaMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: IlladaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the SwiGLU MLP to x [..., C]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class IlladaLayer(GradientCheckpointingLayer):
    """One pre-norm Transformer layer."""

    def __init__(self, config: IlladaConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = IlladaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = IlladaAttention(config, layer_idx)
        self.post_attention_layernorm = IlladaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = IlladaMLP(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return the residual stream behind this layer, and its attention weights."""
        attended, weights = self.self_attn(self.input_layernorm(x), cos, sin, attention_mask, **kwargs)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), weights


class IlladaPreTrainedModel(PreTrainedModel):
    """The base of the models: loading, saving and initial weights, as transformers does them."""

    config: IlladaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["IlladaLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers looks for phrases in this file, which differ from version to version

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resize the embedding as transformers does.

        The config's embedding_size follows, as its vocab_size does.
        """
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.config.embedding_size = embeddings.weight.shape[0]
        return embeddings


class IlladaModel(IlladaPreTrainedModel):
    """The model without a head.

    Its hidden states, times the head, give the logits of each token's own position.
    """

    _keys_to_ignore_on_load_unexpected = [r"lm_head\.weight"]

    def __init__(self, config: IlladaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.embedding_size, config.hidden_size)
        self.layers = nn.ModuleList(IlladaLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = IlladaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Compute the hidden states of a padded batch [B, L].

        attention_mask: [B, L], 0 at padding, on the left or right. position_ids: default from 0 at each row's first
        token. output_hidden_states gives the embeddings and every layer's output, the last one after the norm.
        """
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if output_attentions and config._attn_implementation != "eager":
            raise ValueError(
                "output_attentions needs attn_implementation='eager', which keeps the weights; this model has "
                f"{config._attn_implementation!r} (model.set_attn_implementation('eager'))"
            )
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        index = torch.arange(x.shape[1], device=x.device)[None]
        if position_ids is None:
            position_ids = index
            if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
                first = attention_mask.to(x.device).int().argmax(1, keepdim=True)
                position_ids = (index - first).clamp(min=0)
        mask = create_bidirectional_mask(config, x, attention_mask)
        cos, sin = rotary_tables(position_ids, config, x.dtype)
        states, attentions = [], []
        for layer in self.layers:
            if output_hidden_states:
                states.append(x)
            x, weights = layer(x, cos, sin, mask, position_ids=position_ids, **kwargs)  # attention may look at them
            if output_attentions:
                attentions.append(weights)
        x = self.norm(x)
        if config.logits_shift:  # a row's first token keeps its own
            before = (index - (position_ids > 0).long()).clamp(min=0)
            x = x.take_along_dim(before[..., None], dim=1)
        return BaseModelOutput(
            last_hidden_state=x,
            hidden_states=(*states, x) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


class IlladaForMaskedLM(IlladaPreTrainedModel):
    """The model with a head, which predicts the tokens at masked positions."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: IlladaConfig) -> None:
        super().__init__(config)
        self.model = IlladaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.embedding_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Compute logits [B, L, vocab_size]; with labels [B, L] also the mean cross-entropy of those that are not -100.

        num_items_in_batch, which transformers' Trainer passes, divides the sum instead. Others are of `IlladaModel`.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        out = self.model(input_ids, attention_mask, position_ids, inputs_embeds, return_dict=True, **kwargs)
        vocab_size = self.config.vocab_size
        logits = self.lm_head(out.last_hidden_state)[..., :vocab_size].contiguous()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, num_items_in_batch=num_items)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=out.hidden_states, attentions=out.attentions)
