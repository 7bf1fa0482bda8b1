"""Generation by iterative un-masking: `generate`, its `GenerationConfig`, and what caches change."""

from illada.generation.config import GenerationConfig, GenerationResult
from illada.generation.loop import generate
from illada.generation.rules import quota_schedule

__all__ = ["GenerationConfig", "GenerationResult", "generate", "quota_schedule"]
