"""illada: kernels, trainer and sampler for masked diffusion language models.

Importing it needs neither a GPU nor CUDA nor the compiled module; using an op does need the last.
"""

from illada._native import build_info, package_version
from illada.checkpoint import load_pretrained, save_pretrained
from illada.config import ModelConfig
from illada.generation import GenerationConfig, GenerationResult, generate
from illada.model import LossModule, MaskedDiffusionModel
from illada.ops import (
    AttentionPlan,
    RemaskStatus,
    TokenSample,
    attention_plan,
    linear_masked_cross_entropy,
    linear_masked_cross_entropy_vocab_parallel,
    linear_sample_tokens,
    masked_cross_entropy,
    masked_cross_entropy_shard,
    masked_cross_entropy_shard_grad,
    remask,
    sample_tokens,
    varlen_attention,
)
from illada.packing import pack, unpack
from illada.score import confidence_score, monte_carlo_likelihood
from illada.tokenizer import Tokenizer

__version__ = package_version()

__all__ = [
    "AttentionPlan",
    "GenerationConfig",
    "GenerationResult",
    "LossModule",
    "MaskedDiffusionModel",
    "ModelConfig",
    "RemaskStatus",
    "TokenSample",
    "Tokenizer",
    "__version__",
    "attention_plan",
    "build_info",
    "confidence_score",
    "generate",
    "linear_masked_cross_entropy",
    "linear_masked_cross_entropy_vocab_parallel",
    "linear_sample_tokens",
    "load_pretrained",
    "masked_cross_entropy",
    "masked_cross_entropy_shard",
    "masked_cross_entropy_shard_grad",
    "monte_carlo_likelihood",
    "pack",
    "remask",
    "sample_tokens",
    "save_pretrained",
    "unpack",
    "varlen_attention",
]
