"""The iLLaDA family of models on packed sequences: one class, whose options come from the checkpoint.

The model is a pre-norm Transformer with bidirectional attention:
x += o(attention(q, k, v)), x += down(silu(gate) * up).

Sequences of a pack do not attend to each other. There is no padding and no attention mask. Parameter names are those of
Hugging Face checkpoints without the leading "model.". One exception: qkv_proj holds the rows of q_proj, k_proj and
v_proj.

- `network`: the model, its initial weights, its forward pass and loss.
- `layers`: attention, MLP and norm.
- `position_ids`: position ids, RoPE, and the shift of next-token logits.
- `linear`: whether a head or projection is its weight alone.
"""

from illada.model.layers import MLP, Attention, Layer, RMSNorm, SelectedRows
from illada.model.linear import does_more, more_than_weight
from illada.model.network import LossModule, MaskedDiffusionModel
from illada.model.position_ids import positions, rotary_tables, rotate, shifted

__all__ = [
    "MLP",
    "Attention",
    "Layer",
    "LossModule",
    "MaskedDiffusionModel",
    "RMSNorm",
    "SelectedRows",
    "does_more",
    "more_than_weight",
    "positions",
    "rotary_tables",
    "rotate",
    "shifted",
]
