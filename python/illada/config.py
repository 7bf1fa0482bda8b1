"""What a model is, `ModelConfig`, with its presets and its form in config.json; and `DiffusionConfig`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from illada.schema import check_fields, checked

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "head_dim", "embedding_size",
)  # fmt: skip
_FLOATS = ("rope_theta", "rms_norm_eps", "initializer_range")
_LARGEST = 3.4028234663852886e38  # of float32, in which norms and angles are computed
_MOST_LAYERS = 4096  # a file that asks for more is damaged, and making them would not end


@dataclass(frozen=True)
class ModelConfig:
    """A bidirectional Transformer: GQA, RoPE, RMSNorm, SwiGLU. Names as in Hugging Face configs.

    vocab_size: V, the tokens that can be predicted. embedding_size: rows of the embedding and of an untied head,
    >= vocab_size (LLaDA pads them); default the same.
    hidden_size: C. intermediate_size: width of the SwiGLU. num_hidden_layers, num_attention_heads H,
    num_key_value_heads G, head_dim D (default C / H), max_position_embeddings: longest sequence.
    rope_theta; rope_in_fp32: rotate q and k in float32 (LLaDA) instead of in their own dtype.
    rms_norm_eps; tie_word_embeddings: the head is the embedding; qkv_bias: q, k, v projections have biases (Dream).
    initializer_range: standard deviation of the weights.
    logits_shift: position i is predicted by the hidden state of i - 1 (Dream, and starts from an autoregressive model).
    *_token_id: special ids; data of a checkpoint, never guessed. bos and pad may be None; eot, the end of a turn, where
    that is another token than the end of the text. model_type: the layout to save in, see `illada.layouts`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    mask_token_id: int
    eos_token_id: int
    pad_token_id: int | None
    bos_token_id: int | None
    head_dim: int | None = None
    embedding_size: int | None = None
    max_position_embeddings: int = 8192
    rope_theta: float = 500000.0
    rope_in_fp32: bool = False
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    qkv_bias: bool = False
    initializer_range: float = 0.02
    logits_shift: bool = False
    model_type: str = "illada"
    eot_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in (*_SIZES, *_FLOATS):
            value, limit = getattr(self, name), 2**30 if name in _SIZES else _LARGEST
            if value is None and name in ("head_dim", "embedding_size"):
                continue
            if name in _SIZES or not isinstance(value, int):
                checked(int if name in _SIZES else float, value, f"model.{name}")
            if not 0 < value <= limit:
                allowed = "at most 2^30" if name in _SIZES else "finite"
                raise ValueError(f"model.{name} must be positive and {allowed}, got {value!r:.80}")
            if name in _FLOATS:
                object.__setattr__(self, name, checked(float, value, f"model.{name}"))
        for name in ("rope_in_fp32", "tie_word_embeddings", "qkv_bias", "logits_shift"):
            checked(bool, getattr(self, name), f"model.{name}")
        checked(str, self.model_type, "model.model_type")
        if self.num_hidden_layers > _MOST_LAYERS:
            raise ValueError(f"model.num_hidden_layers must be at most {_MOST_LAYERS}, got {self.num_hidden_layers}")
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
        for name in ("mask_token_id", "eos_token_id", "pad_token_id", "bos_token_id", "eot_token_id"):
            token = getattr(self, name)
            if token is None and name in ("pad_token_id", "bos_token_id", "eot_token_id"):
                continue
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < self.embedding_rows:
                raise ValueError(f"model.{name} must be in [0, {self.embedding_rows}), got {token!r}")
            if token == self.mask_token_id and name != "mask_token_id":
                raise ValueError(f"model.mask_token_id ({token}) is model.{name} as well; no text may contain the mask")
        if self.model_type not in ("illada", "llada", "dream", "qwen2"):
            raise ValueError(f"model.model_type must be illada, llada, dream or qwen2, got {self.model_type!r}")

    @property
    def head_size(self) -> int:
        """head_dim, resolved."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Rows of the fused projection that are the queries', the keys' and the values'."""
        keys = self.num_key_value_heads * self.head_size
        return self.num_attention_heads * self.head_size, keys, keys

    @property
    def embedding_rows(self) -> int:
        """embedding_size, resolved."""
        assert self.embedding_size is not None
        return self.embedding_size

    @property
    def num_parameters(self) -> int:
        """Of the whole model, a tied head counted once."""
        c, qkv = self.hidden_size, sum(self.qkv_sizes)
        layer = qkv * c + (qkv if self.qkv_bias else 0) + self.qkv_sizes[0] * c
        layer += 3 * c * self.intermediate_size + 2 * c
        head = 0 if self.tie_word_embeddings else self.embedding_rows * c
        return self.embedding_rows * c + self.num_hidden_layers * layer + c + head

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ModelConfig:
        """A named architecture, with some fields replaced. ValueError lists the names there are."""
        if name not in PRESETS:
            raise ValueError(f"model.preset must be one of {', '.join(PRESETS)}, got {name!r}")
        return cls.from_dict({**PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """From field names and values; unknown and missing names are errors that list them."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - set(fields)):
            raise ValueError(f"unknown model options: {', '.join(unknown)}; there are {', '.join(fields)}")
        required = {name for name, f in fields.items() if f.default is dataclasses.MISSING}
        if missing := sorted(required - set(values)):
            raise ValueError(f"missing model options: {', '.join(missing)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All fields by name; the inverse of `from_dict`."""
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
    """Options of the forward process. The defaults are the paper's pre-training.

    t_sampling: "independent" draws t uniformly for each sequence; "low_discrepancy" takes t = (u + i / B) mod 1 over
        the B samples of a global batch (VDM), which lowers the variance of the loss.
    mask_count: "bernoulli" masks each token with probability p; "exact" masks floor(t L) + 1 of L tokens with weight
        L / count (as in LLaDA's Monte Carlo likelihood).
    """

    eps: float = 1e-3  # smallest masking probability: p = (1 - eps) t + eps
    split_probability: float = 0.3  # chance that a window is split at a uniform point into two sequences
    t_sampling: str = "independent"  # or "low_discrepancy": stratified over the windows of a step
    mask_count: str = "bernoulli"  # or "exact": a fixed number of masks for each t
    complementary: bool = False  # samples 2k and 2k + 1 share window, split and t; one masks what the other shows
    isolate_documents: bool = False  # documents inside a window do not attend each other

    def __post_init__(self) -> None:
        check_fields(self, "diffusion")
        if not 0 < self.eps < 0.5:
            raise ValueError(f"diffusion.eps must be in (0, 0.5), got {self.eps}")
        if not 0 <= self.split_probability <= 1:
            raise ValueError(f"diffusion.split_probability must be in [0, 1], got {self.split_probability}")
        for name, allowed in (
            ("t_sampling", ("independent", "low_discrepancy")),
            ("mask_count", ("bernoulli", "exact")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"diffusion.{name} must be {' or '.join(allowed)}, got {getattr(self, name)!r}")
        if self.complementary and self.mask_count == "exact":
            raise ValueError("diffusion.complementary needs mask_count = 'bernoulli'")
