"""The network: embedding, layers, final norm and head, its initial weights, and the loss of a batch."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from illada.batch import Batch
from illada.config import ModelConfig
from illada.devices import autocast_dtype, find_device
from illada.model.layers import Layer, RMSNorm, SelectedRows
from illada.model.linear import more_than_weight
from illada.model.position_ids import positions, rotary_tables, shifted
from illada.ops import AttentionPlan, attention_plan, linear_masked_cross_entropy
from illada.reuse import CachedKeys, FirstProjection


class MaskedDiffusionModel(nn.Module):
    """Masked diffusion model, which predicts the tokens at masked positions.

    Args:
        config: The architecture.
        seed: Seed of the initial weights. They come from a separate generator, not from torch's global one.
        device: Device of the parameters, default torch's default device; "meta" allocates nothing.
        dtype: Dtype of the parameters, default float32.

    Attributes:
        config: As given.
        stop_token_ids: Ids from generation_config.json that end a generation, in addition to those of the config.
        activation_checkpointing: Recompute each layer in the backward pass instead of keeping its activations.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.stop_token_ids: tuple[int, ...] = ()
        # nn.Linear draws from the global generator when it is constructed; on the meta device it draws nothing.
        with torch.device("meta"):
            self.embed_tokens = nn.Embedding(config.embedding_rows, config.hidden_size)
            self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.lm_head = (
                None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.embedding_rows, bias=False)
            )
        # Do not use get_default_device(), which ignores `with torch.device(...)` in torch 2.6.
        target = torch.empty(0).device if device is None else find_device(device)
        for module in self.modules():  # to_empty fails under FakeTensorMode
            for name, parameter in list(module.named_parameters(recurse=False)):
                empty = torch.empty(parameter.shape, dtype=dtype or torch.float32, device=target)
                setattr(module, name, nn.Parameter(empty))
        if target.type != "meta":
            self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Set the initial weights, drawn on the CPU from `seed` only.

        Weights are N(0, initializer_range^2). The projections into the residual stream are scaled by
        1 / sqrt(2 layers). Embeddings have variance 1 / (2 C), and the pad row is zero.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        residual_scale = 1 / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                std = self.config.initializer_range
                if name == "embed_tokens.weight":
                    std = math.sqrt(1 / (2 * self.config.hidden_size))
                elif name.endswith(("o_proj.weight", "down_proj.weight")):
                    std *= residual_scale
                parameter.copy_(torch.empty(parameter.shape, device="cpu").normal_(0.0, std, generator=generator))
        if self.config.pad_token_id is not None:
            self.embed_tokens.weight[self.config.pad_token_id] = 0

    @classmethod
    def parameter_shapes(cls, config: ModelConfig) -> dict[str, torch.Size]:
        """Return the names and shapes of a model's parameters without constructing all its layers, which is slow."""
        one = cls(dataclasses.replace(config, num_hidden_layers=1), device="meta")
        shapes: dict[str, torch.Size] = {}
        for name, parameter in one.named_parameters():
            layers = config.num_hidden_layers if name.startswith("layers.") else 1
            shapes |= {name.replace("layers.0.", f"layers.{i}."): parameter.shape for i in range(layers)}
        return shapes

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.embed_tokens.weight.device

    @property
    def head_weight(self) -> Tensor:
        """Head weight [V, C]: that of the head or of the tied embedding, without padding rows.

        Raises:
            TypeError: The head is more than its weight: see `more_than_weight`. The ops take only the weight.
        """
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        problem = more_than_weight(head)
        if self.lm_head is None and isinstance(head, nn.Embedding):
            problem = None  # the tied weight is no head that is called
        if problem is not None:
            raise TypeError(
                f"{'embed_tokens' if self.lm_head is None else 'lm_head'} is {problem}; the ops of the head take its "
                "weight alone: leave the rest away, or merge it (peft: merge_and_unload)"
            )
        weight = head.weight
        return weight if weight.shape[0] == self.config.vocab_size else weight[: self.config.vocab_size]

    def forward(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor,
        *,
        position_ids: Tensor | None = None,
        plan: AttentionPlan | None = None,
        cache: CachedKeys | None = None,
        rows: Tensor | None = None,
        first: FirstProjection | None = None,
    ) -> Tensor:
        """Compute hidden states that, multiplied by the head weight, give the logits of each token's own position.

        Args:
            tokens: int64 or int32 [T], packed sequences; ids in [0, embedding_size).
            cu_seqlens: int32 [S + 1], where each sequence starts, from 0 to T.
            position_ids: int64 [T]; default: from 0 in each sequence.
            plan: The plan of `illada.attention_plan` for these lengths; default: made in this call.
            cache: Key-value cache whose slots the tokens also attend to. The keys and values of `tokens` are written to
                it first. It needs `position_ids`, and gradients must be off.
            rows: int32 or int64 [N], ascending, the selected rows whose hidden states are computed; default all. The
                last layer then computes keys and values of all tokens, and everything else only for these.
            first: Result of `first_layer` for these tokens, to reuse it.

        Returns:
            [T, C], or [N, C] with `rows`, after the final norm. For Dream's models they are shifted by one position
            inside each sequence.

        Raises:
            ValueError: Wrong shapes, or `first` of another number of tokens. On a CPU, where reading costs no sync,
                also token ids, rows or cu_seqlens out of range.
        """
        self._check(tokens, rows)
        if first is not None and first.x.shape[0] != tokens.shape[0]:
            raise ValueError(f"first is of {first.x.shape[0]} tokens, there are {tokens.shape[0]}")
        config = self.config
        if position_ids is None:
            if cache is not None:
                raise ValueError("position_ids must be given with a cache: the tokens do not start at position 0")
            position_ids = positions(cu_seqlens, tokens.shape[0])
        if plan is None:
            plan = attention_plan(
                cu_seqlens,
                cu_seqlens_k=None if cache is None else cache.cu_seqlens_k,
                seqused_k=None if cache is None else cache.seqused_k,
                num_heads=config.num_attention_heads,
                num_kv_heads=config.num_key_value_heads,
                head_dim=config.head_size,
                total_q=tokens.shape[0],
            )
        if first is None:
            x = self.embed_tokens(tokens)
            cos, sin = self._rotary_tables(position_ids, x.dtype)
        else:
            x, cos, sin = first.x, first.cos, first.sin
        selected_rows = None if rows is None else self._selected_rows(rows, cu_seqlens, tokens.shape[0])
        for i, layer in enumerate(self.layers):
            selects = selected_rows if i == len(self.layers) - 1 else None
            projected = None
            if first is not None and i == 0:
                projected = (first.q if selects is None else first.q[selects.rows], first.k, first.v)
            inputs = (
                x,
                cos,
                sin,
                cu_seqlens,
                plan if selects is None else None,  # the selected rows need another plan
                None if cache is None else cache.layer(i),
                selects,
                projected,
            )
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x = layer(*inputs)
        hidden = self.norm(x)
        return hidden[shifted(cu_seqlens, tokens.shape[0])] if config.logits_shift and rows is None else hidden

    def first_layer(self, tokens: Tensor, position_ids: Tensor) -> FirstProjection:
        """Compute embeddings and projections of the first layer for reuse by `forward` without gradients.

        Reuse pays where few tokens change from one forward pass to the next: `FirstProjection.put` updates those.

        Args:
            tokens: int64 or int32 [T], ids in [0, embedding_size).
            position_ids: int64 [T].

        Returns:
            FirstProjection of T tokens.

        Raises:
            ValueError: As in `forward`.
        """
        self._check(tokens, None)
        x, layer = self.embed_tokens(tokens), self.layers[0]
        assert isinstance(layer, Layer)
        cos, sin = self._rotary_tables(position_ids, x.dtype)
        return FirstProjection(x, cos, sin, *layer.project(x, cos, sin))

    def _rotary_tables(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return `rotary_tables` for activations of `dtype`, or of autocast's dtype where autocast is on."""
        return rotary_tables(position_ids, self.config, autocast_dtype(position_ids.device) or dtype)

    def _selected_rows(self, rows: Tensor, cu_seqlens: Tensor, total: int) -> SelectedRows:
        """Return the selected rows of the last layer: `rows`, or the rows before them for shifted logits."""
        rows = rows.long()
        if self.config.logits_shift:
            rows = shifted(cu_seqlens, total)[rows]
        return SelectedRows(rows, torch.searchsorted(rows, cu_seqlens.long(), out_int32=True))

    def loss(self, batch: Batch, *, normalizer: float | Tensor | None = None) -> Tensor:
        """Compute Eq. 1 on a batch: the sum of 1/p-weighted cross-entropies of the masked tokens over `normalizer`.

        Args:
            batch: Masked sequences, for example of `illada.diffusion.make_batch`. Logits are computed only for its
                masked rows.
            normalizer: Positive number or scalar tensor; default the batch's number of tokens. Pass the global batch's
                number when gradients are summed.

        Returns:
            The loss, a float32 scalar, in nats per token with the default normalizer.

        Raises:
            TypeError, ValueError: As `forward`, `head_weight` and `illada.linear_masked_cross_entropy`.
        """
        return self.loss_and_nll(batch, normalizer=normalizer)[0]

    def loss_and_nll(self, batch: Batch, *, normalizer: float | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute `loss`, and beside it the negative log-likelihood of each token.

        Args:
            batch: See `loss`.
            normalizer: See `loss`.

        Returns:
            The loss, and the negative log-likelihoods, float32 [T], in nats: 0 where nothing is masked, without a
            gradient.

        Raises:
            TypeError, ValueError: As `loss`.
        """
        hidden = self(batch.tokens, batch.cu_seqlens, position_ids=batch.position_ids)
        found = linear_masked_cross_entropy(
            hidden,
            self.head_weight,
            batch.targets,
            batch.token_weights,
            rows=batch.rows,
            normalizer=float(batch.num_tokens) if normalizer is None else normalizer,
            return_nll=True,
        )
        assert isinstance(found, tuple)
        return found[0], found[1]

    def _check(self, tokens: Tensor, rows: Tensor | None) -> None:
        if tokens.dim() != 1:
            raise ValueError(f"tokens must be packed, shape [T], got {list(tokens.shape)}; see illada.pack")
        if torch.compiler.is_compiling() or tokens.device.type != "cpu" or type(tokens) is not Tensor:
            return
        if tokens.numel() and not (0 <= int(tokens.min()) and int(tokens.max()) < self.config.embedding_rows):
            raise ValueError(
                f"tokens must be in [0, {self.config.embedding_rows}), got {int(tokens.min())} .. {int(tokens.max())}"
            )
        if rows is not None and len(rows):
            if not (0 <= int(rows[0]) and int(rows[-1]) < len(tokens) and bool((rows[1:] > rows[:-1]).all())):
                raise ValueError(f"rows must ascend within [0, {len(tokens)}), got {rows.tolist()[:20]}")


class LossModule(nn.Module):
    """Module whose forward is `model.loss`, because DDP and FSDP2 hook a module's call.

    Its parameters are those of the model. The call looks up the head weight, because FSDP2 has gathered it there. A
    tied head weight is the embedding's; it belongs to the same group, that of this root module.
    """

    def __init__(self, model: MaskedDiffusionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, *, normalizer: float | Tensor | None = None) -> Tensor:
        """See `MaskedDiffusionModel.loss`."""
        return self.model.loss(batch, normalizer=normalizer)
