"""Generation by iterative un-masking: `generate` and its `GenerationConfig`."""

from illada.generation.loop import GenerationConfig, GenerationResult, generate, quota_schedule

__all__ = ["GenerationConfig", "GenerationResult", "generate", "quota_schedule"]
