"""The layers of the network: attention, MLP and norm, on the residual stream of a pack."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from illada.config import ModelConfig
from illada.model.linear import does_more
from illada.model.position_ids import rotate
from illada.ops import AttentionPlan, varlen_attention
from illada.reuse import CachedKeys

#: Rows that a layer passes to its MLP at a time when gradients are off. On a CPU the temporaries stay in the cache and
#: in memory that is already mapped. On a GPU they stay below 1 GiB for an 8B model, where the prefixes of a batch may
#: be 200,000 tokens. The chunks are still large enough to read the weights once for many rows.
_CPU_ROWS, _GPU_ROWS = 1024, 16384


class SelectedRows(NamedTuple):
    """Selected rows of the pack: the only tokens whose output is computed.

    rows: int64 [N], positions in the pack, ascending.
    cu_seqlens: int32 [S + 1], where each sequence's entries of `rows` start.
    """

    rows: Tensor
    cu_seqlens: Tensor


class RMSNorm(nn.Module):
    """RMS normalisation, x / rms(x) * weight.

    Statistics are in float32. The result is cast back before the weight multiplies it, as in Hugging Face models.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension of x [..., C], in float32; the result has the dtype of x."""
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return self.weight * F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Bidirectional grouped-query attention over packed sequences, with one projection for q, k and v."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        width, sizes = config.hidden_size, config.qkv_sizes
        self.qkv_proj = nn.Linear(width, sum(sizes), bias=config.qkv_bias)
        self.o_proj = nn.Linear(sizes[0], width, bias=False)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        plan: AttentionPlan | None,
        cache: CachedKeys | None = None,
        selected_rows: SelectedRows | None = None,
    ) -> Tensor:
        """Attend within each sequence and project the result for the residual stream.

        Args:
            q: [T, H, D], or [N, H, D] with `selected_rows`, from `project`.
            k: [T, G, D], from `project`.
            v: Like `k`.
            cu_seqlens: int32 [S + 1], where each sequence starts in the pack.
            plan: The plan of `illada.attention_plan` for these lengths; None: made in this call.
            cache: This layer's cache, k and v [R, G, D]. k and v of this call are written to it, and q attends to its
                slots.
            selected_rows: The selected rows; None: all T.

        Returns:
            [T, C], or [N, C] with `selected_rows`.

        Raises:
            TypeError, ValueError, NotImplementedError: As `illada.varlen_attention`.
        """
        cu_seqlens_k, seqused_k = None if selected_rows is None else cu_seqlens, None
        if cache is not None:
            k, v = cache.write(k, v)
            cu_seqlens_k, seqused_k = cache.cu_seqlens_k, cache.seqused_k
        cu_seqlens_q = cu_seqlens if selected_rows is None else selected_rows.cu_seqlens
        out = varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k, plan=plan)
        assert isinstance(out, Tensor)
        return self.o_proj(out.flatten(1))

    def project(self, x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Project x to q, k and v, and rotate q and k.

        Without `rows` nothing is copied: v is a view of the projection [T, H + 2 G, D], and q and k are views of its
        rotated heads [T, H + G, D].

        Args:
            x: [T, C].
            cos: [T, 1, D], from `rotary_tables`.
            sin: Like `cos`.
            rows: int64 [N], the rows of x that need a query; None: all T.

        Returns:
            q [T, H, D] (or [N, H, D] with `rows`), k and v [T, G, D].
        """
        heads, kv_heads = self.heads, self.kv_heads
        if rows is None or does_more(self.qkv_proj):
            qkv = self.qkv_proj(x).unflatten(-1, (heads + 2 * kv_heads, -1))
            # Use split, not slices: gradients of slices would each be padded with zeros and added.
            qk, v = qkv.split([heads + kv_heads, kv_heads], dim=1)
            q, k = rotate(qk, cos, sin).split([heads, kv_heads], dim=1)
            return q if rows is None else q[rows], k, v
        weight, bias, size = self.qkv_proj.weight, self.qkv_proj.bias, self.o_proj.in_features
        q_bias, kv_bias = (None, None) if bias is None else (bias[:size], bias[size:])
        q = F.linear(x[rows], weight[:size], q_bias).unflatten(-1, (heads, -1))
        k, v = F.linear(x, weight[size:], kv_bias).unflatten(-1, (2 * kv_heads, -1)).chunk(2, dim=1)
        return rotate(q, cos[rows], sin[rows]), rotate(k, cos, sin), v


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the SwiGLU MLP to x [..., C]; the result has its shape and dtype."""
        gate, up = F.silu(self.gate_proj(x)), self.up_proj(x)
        return self.down_proj(gate * up if torch.is_grad_enabled() else gate.mul_(up))


class Layer(nn.Module):
    """One pre-norm Transformer layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cu_seqlens: Tensor,
        plan: AttentionPlan | None,
        cache: CachedKeys | None = None,
        selected_rows: SelectedRows | None = None,
        projected: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Apply attention and the MLP to the residual stream.

        Args:
            x: [T, C], the residual stream.
            cos: [T, 1, D], from `rotary_tables`.
            sin: Like `cos`.
            cu_seqlens: int32 [S + 1], where each sequence starts in the pack.
            plan: The plan of `illada.attention_plan` for these lengths; None: made in this call.
            cache: This layer's cache, k and v [R, G, D]; None: none.
            selected_rows: The selected rows; None: all T. Other tokens then only contribute keys and values.
            projected: The result of `project` for these arguments, if it is known.

        Returns:
            [T, C], or [N, C] with `selected_rows`.

        Raises:
            TypeError, ValueError, NotImplementedError: As `illada.varlen_attention`.
        """
        if projected is None:
            projected = self.project(x, cos, sin, selected_rows)
        attended = self.self_attn(*projected, cu_seqlens, plan, cache, selected_rows)
        x = (x if selected_rows is None else x[selected_rows.rows]) + attended
        # Do not split while tracing: the number of parts would fix the number of tokens in the traced graph.
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return x + self.mlp(self.post_attention_layernorm(x))
        for part in x.split(_CPU_ROWS if x.device.type == "cpu" else _GPU_ROWS):  # x is a temporary here
            part += self.mlp(self.post_attention_layernorm(part))
        return x

    def project(
        self, x: Tensor, cos: Tensor, sin: Tensor, selected_rows: SelectedRows | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise x [T, C] and return `Attention.project` of it; q only for `selected_rows` where given."""
        return self.self_attn.project(
            self.input_layernorm(x), cos, sin, None if selected_rows is None else selected_rows.rows
        )
