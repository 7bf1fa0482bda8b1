"""The configurations `ModelConfig`, with its presets and its dict form, and `DiffusionConfig`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Gt, Le, Lt

from illada.schema import Count, Fraction, PositiveFloat, Size, TokenId, check_fields, some_of


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of a bidirectional Transformer with GQA, RoPE, RMSNorm and SwiGLU.

    Names are as in Hugging Face configs.

    vocab_size: V, the tokens that can be predicted. embedding_size: rows of the embedding and of an untied head,
    >= vocab_size (LLaDA pads them); default the same.
    hidden_size: C. intermediate_size: width of the SwiGLU. num_hidden_layers, num_attention_heads H,
    num_key_value_heads G, head_dim D (default C / H), max_position_embeddings: longest sequence.
    rope_theta; rope_in_fp32: rotate q and k in float32 (LLaDA) instead of in their own dtype.
    rms_norm_eps; tie_word_embeddings: the head is the embedding; qkv_bias: q, k, v projections have biases (Dream).
    initializer_range: standard deviation of the weights.
    logits_shift: position i is predicted by the hidden state of i - 1 (Dream, and starts from an autoregressive model).
    *_token_id: special ids; data of a checkpoint, never guessed. bos and pad may be None; eot, the end of a turn, where
    that is another token than the end of the text. model_type: the layout to save in, see `illada.checkpoints.formats`.
    """

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Annotated[int, Gt(0), Le(4096)]  # a file that asks for more is damaged
    num_attention_heads: Size
    num_key_value_heads: Size
    mask_token_id: TokenId
    eos_token_id: TokenId
    pad_token_id: TokenId | None
    bos_token_id: TokenId | None
    head_dim: Size | None = None
    embedding_size: Size | None = None
    max_position_embeddings: Size = 8192
    rope_theta: PositiveFloat = 500000.0
    rope_in_fp32: bool = False
    rms_norm_eps: PositiveFloat = 1e-6
    tie_word_embeddings: bool = True
    qkv_bias: bool = False
    initializer_range: PositiveFloat = 0.02
    logits_shift: bool = False
    model_type: Literal["illada", "llada", "dream", "qwen2", "illada_hf"] = "illada"
    eot_token_id: TokenId | None = None

    def __post_init__(self) -> None:
        check_fields(self, "model")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"model.num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"model.num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"model.hidden_size ({self.hidden_size}) must be a multiple of model.num_attention_heads "
                    f"({self.num_attention_heads}) unless model.head_dim is given"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.head_size % 2:
            raise ValueError(f"model.head_dim must be even for RoPE, got {self.head_dim}")
        if self.embedding_size is None:
            object.__setattr__(self, "embedding_size", self.vocab_size)
        if self.embedding_rows < self.vocab_size:
            raise ValueError(
                f"model.embedding_size ({self.embedding_size}) is less than vocab_size ({self.vocab_size})"
            )
        if (rows := sum(self.qkv_sizes)) > 2**30:
            raise ValueError(
                "(model.num_attention_heads + 2 model.num_key_value_heads) x model.head_dim must be at most 2^30, "
                f"got ({self.num_attention_heads} + 2 x {self.num_key_value_heads}) x {self.head_size} = {rows}"
            )
        for name in ("mask_token_id", "eos_token_id", "pad_token_id", "bos_token_id", "eot_token_id"):
            token = getattr(self, name)
            if token is not None and token >= self.embedding_rows:
                raise ValueError(f"model.{name} must be in [0, {self.embedding_rows}), got {token}")
            if token == self.mask_token_id and name != "mask_token_id":
                raise ValueError(f"model.mask_token_id ({token}) is model.{name} as well; no text may contain the mask")

    @property
    def head_size(self) -> int:
        """The value of head_dim, with its default filled in."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """The numbers of rows of the fused projection for queries, keys and values."""
        keys = self.num_key_value_heads * self.head_size
        return self.num_attention_heads * self.head_size, keys, keys

    @property
    def embedding_rows(self) -> int:
        """The value of embedding_size, with its default filled in."""
        assert self.embedding_size is not None
        return self.embedding_size

    @property
    def num_parameters(self) -> int:
        """The number of parameters of the whole model, with a tied head counted once."""
        c, qkv = self.hidden_size, sum(self.qkv_sizes)
        layer = qkv * c + (qkv if self.qkv_bias else 0) + self.qkv_sizes[0] * c
        layer += 3 * c * self.intermediate_size + 2 * c
        head = 0 if self.tie_word_embeddings else self.embedding_rows * c
        return self.embedding_rows * c + self.num_hidden_layers * layer + c + head

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ModelConfig:
        """Return a named architecture, with some fields replaced.

        ValueError, which lists the names there are: there is no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"model.preset must be one of {', '.join(PRESETS)}, got {name!r}")
        return cls.from_dict({**PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Make a config of field names and values; unknown and missing names are errors that list them."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - set(fields)):
            raise ValueError(f"unknown model options: {some_of(unknown)}; there are {', '.join(fields)}")
        required = {name for name, f in fields.items() if f.default is dataclasses.MISSING}
        if missing := sorted(required - set(values)):
            raise ValueError(f"missing model options: {', '.join(missing)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name; the inverse of `from_dict`."""
        return dataclasses.asdict(self)


_ILLADA_IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "mask_token_id": 5}
_QWEN_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 131072, "rope_theta": 1e6,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "qkv_bias": True,
    "bos_token_id": 151643, "eos_token_id": 151643, "pad_token_id": 151643,
}  # fmt: skip

#: Architectures by name. iLLaDA: Table 1 of the paper; its rope_theta and eps are those of the sibling with the same
#: geometry and are replaced by the checkpoint's own when one is loaded. `tiny` and `small` train on a CPU.
PRESETS: dict[str, dict[str, Any]] = {
    "illada_8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 155136, "max_position_embeddings": 8192, "rope_theta": 500000.0,
        "rms_norm_eps": 1e-6, "initializer_range": 0.009882118, **_ILLADA_IDS,
    },
    "llada_8b": {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 126464, "max_position_embeddings": 4096, "rope_theta": 500000.0,
        "rope_in_fp32": True, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "model_type": "llada",
        "bos_token_id": 126080, "eos_token_id": 126081, "pad_token_id": 126081, "mask_token_id": 126336,
        "eot_token_id": 126348,
    },
    "dream_7b": {**_QWEN_7B, "mask_token_id": 151666, "logits_shift": True, "model_type": "dream"},
    # Qwen2 has no mask: 151666 is the unused row of its embedding that Dream, which started from it, made the mask.
    "qwen2_7b": {
        **_QWEN_7B, "mask_token_id": 151666, "pad_token_id": None, "logits_shift": True, "model_type": "qwen2",
    },
    "small": {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 2, "vocab_size": 32768, "max_position_embeddings": 1024, "rope_theta": 10000.0,
        **_ILLADA_IDS,
    },
    "tiny": {
        "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2, "vocab_size": 4096, "max_position_embeddings": 512, "rope_theta": 10000.0,
        "initializer_range": 0.08,
        **_ILLADA_IDS,
    },
}  # fmt: skip


@dataclass(frozen=True)
class DiffusionConfig:
    """The options of the forward process, by default those of the paper's pre-training.

    t_sampling: "independent" draws t uniformly for each sequence; "low_discrepancy" takes t = (u + i / B) mod 1 over
        the B samples of a global batch (VDM), which lowers the variance of the loss.
    mask_count: "bernoulli" masks each token with probability p; "exact" masks floor(t L) + 1 of L tokens with weight
        L / count (as in LLaDA's Monte Carlo likelihood).
    t_limit: t is drawn below a limit that rises linearly, from t_limit for the first sample to 1 after
        t_limit_windows samples. A new model learns from a token's neighbours first, and few masks leave most of them.
    """

    eps: Annotated[float, Gt(0), Lt(0.5)] = 1e-3  # smallest masking probability: p = (1 - eps) t + eps
    split_probability: Fraction = 0.3  # chance that a window is split at a uniform point into two sequences
    t_limit: Annotated[float, Gt(0), Le(1)] = 1.0  # largest t of the first window: below 1, fewer masks at first
    t_limit_windows: Count = 0  # windows over which that limit rises to 1
    t_sampling: Literal["independent", "low_discrepancy"] = "independent"  # "low_discrepancy": stratified in a step
    mask_count: Literal["bernoulli", "exact"] = "bernoulli"  # or "exact": a fixed number of masks for each t
    complementary: bool = False  # samples 2k and 2k + 1 share window, split and t; one masks what the other shows
    isolate_documents: bool = False  # documents inside a window do not attend each other

    def __post_init__(self) -> None:
        check_fields(self, "diffusion")
        if (self.t_limit < 1) != (self.t_limit_windows > 0):
            raise ValueError(
                "diffusion.t_limit below 1 and diffusion.t_limit_windows above 0 go together, got "
                f"{self.t_limit} and {self.t_limit_windows}"
            )
        if self.complementary and self.mask_count == "exact":
            raise ValueError("diffusion.complementary needs mask_count = 'bernoulli'")
        if self.complementary and self.t_limit < 1:
            raise ValueError("diffusion.complementary needs t_limit = 1: the second of a pair masks 1 - t")
