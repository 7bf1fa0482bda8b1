"""Generation by iterative un-masking: `generate`, `generate_iter` and their `GenerationConfig`."""

from illada.generation.config import GenerationConfig, GenerationDelta, GenerationResult
from illada.generation.loop import generate, generate_iter
from illada.generation.rules import quota_schedule

__all__ = ["GenerationConfig", "GenerationDelta", "GenerationResult", "generate", "generate_iter", "quota_schedule"]
