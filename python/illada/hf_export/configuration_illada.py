"""The options of a masked diffusion model that illada exported, for transformers."""

from typing import Any

try:
    from transformers import PreTrainedConfig
except ImportError as error:
    raise ImportError("this model needs transformers 5 or newer: pip install 'transformers>=5'") from error


class IlladaConfig(PreTrainedConfig):
    """A bidirectional Transformer: GQA, RoPE, RMSNorm, SwiGLU.

    vocab_size: tokens that can be predicted. embedding_size: rows of the embedding and of an untied head; default the
    same. head_dim: default hidden_size / num_attention_heads. rope_in_fp32: rotate q and k in float32, and not in their
    own dtype. qkv_bias: q, k, v projections have biases. logits_shift: position i is predicted by the hidden state of
    i - 1. mask_token_id: stands for what is hidden; eot_token_id: ends a turn, where that is another token than eos.
    """

    model_type = "illada_hf"

    def __init__(
        self,
        vocab_size: int = 155136,
        hidden_size: int = 4096,
        intermediate_size: int = 14336,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int = 8,
        head_dim: int | None = None,
        embedding_size: int | None = None,
        max_position_embeddings: int = 8192,
        rope_theta: float = 500000.0,
        rope_in_fp32: bool = False,
        rms_norm_eps: float = 1e-6,
        tie_word_embeddings: bool = True,
        qkv_bias: bool = False,
        initializer_range: float = 0.02,
        logits_shift: bool = False,
        mask_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eot_token_id: int | None = None,
        **others: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.embedding_size = embedding_size or vocab_size
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = rope_theta
        self.rope_in_fp32 = rope_in_fp32
        self.rms_norm_eps = rms_norm_eps
        self.qkv_bias = qkv_bias
        self.initializer_range = initializer_range
        self.logits_shift = logits_shift
        self.mask_token_id = mask_token_id
        self.eot_token_id = eot_token_id
        others |= {"eos_token_id": eos_token_id, "pad_token_id": pad_token_id, "bos_token_id": bos_token_id}
        others["tie_word_embeddings"] = tie_word_embeddings
        super().__init__(**others)
