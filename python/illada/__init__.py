"""illada: kernels, trainer and sampler for masked diffusion language models.

Importing it needs neither a GPU nor CUDA nor the compiled module; using an op does need the last. Names load when they
are used, torch with them: `import illada` alone takes milliseconds. The torch ops are registered by `illada.ops`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from illada._native import build_info
    from illada.checkpoints.weights import load_pretrained, save_pretrained
    from illada.config import ModelConfig
    from illada.generation import GenerationConfig, GenerationDelta, GenerationResult, generate, generate_iter
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
        masked_cross_entropy_from_labels,
        masked_cross_entropy_shard,
        masked_cross_entropy_shard_grad,
        remask,
        sample_tokens,
        varlen_attention,
        why_not,
    )
    from illada.packing import pack, unpack
    from illada.score import confidence_score, monte_carlo_likelihood
    from illada.text.tokenizer import Tokenizer

    __version__: str

#: Where each public name is.
_MODULES = {
    "illada._native": ("build_info",),
    "illada.checkpoints.weights": ("load_pretrained", "save_pretrained"),
    "illada.config": ("ModelConfig",),
    "illada.generation": ("GenerationConfig", "GenerationDelta", "GenerationResult", "generate", "generate_iter"),
    "illada.model": ("LossModule", "MaskedDiffusionModel"),
    "illada.ops": (
        "AttentionPlan",
        "RemaskStatus",
        "TokenSample",
        "attention_plan",
        "linear_masked_cross_entropy",
        "linear_masked_cross_entropy_vocab_parallel",
        "linear_sample_tokens",
        "masked_cross_entropy",
        "masked_cross_entropy_from_labels",
        "masked_cross_entropy_shard",
        "masked_cross_entropy_shard_grad",
        "remask",
        "sample_tokens",
        "varlen_attention",
        "why_not",
    ),
    "illada.packing": ("pack", "unpack"),
    "illada.score": ("confidence_score", "monte_carlo_likelihood"),
    "illada.text.tokenizer": ("Tokenizer",),
}

__all__ = [
    "AttentionPlan",
    "GenerationConfig",
    "GenerationDelta",
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
    "generate_iter",
    "linear_masked_cross_entropy",
    "linear_masked_cross_entropy_vocab_parallel",
    "linear_sample_tokens",
    "load_pretrained",
    "masked_cross_entropy",
    "masked_cross_entropy_from_labels",
    "masked_cross_entropy_shard",
    "masked_cross_entropy_shard_grad",
    "monte_carlo_likelihood",
    "pack",
    "remask",
    "sample_tokens",
    "save_pretrained",
    "unpack",
    "varlen_attention",
    "why_not",
]


def __getattr__(name: str) -> Any:
    """Return a name of `__all__`, or a module of this package, at its first use (PEP 562)."""
    if name == "__version__":
        from illada._native import package_version

        value: Any = package_version()
    elif module := next((module for module, names in _MODULES.items() if name in names), None):
        value = getattr(importlib.import_module(module), name)
    else:
        import pkgutil  # takes longer to import than this package

        if not any(module.name == name for module in pkgutil.iter_modules(__path__)):
            raise AttributeError(f"module 'illada' has no attribute {name!r}")
        return importlib.import_module(f"illada.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
