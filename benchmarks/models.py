"""Models with random weights, for benchmarks of what their size alone decides."""

from __future__ import annotations

import math

import torch

from illada.config import ModelConfig
from illada.model import MaskedDiffusionModel


def random_model(
    config: ModelConfig, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 1
) -> MaskedDiffusionModel:
    """Weights of the sizes that the library begins with, drawn on the device: on a CPU that takes minutes for 8B."""
    model = MaskedDiffusionModel(config, device="meta", dtype=dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            std = math.sqrt(1 / (2 * config.hidden_size)) if name.startswith("embed") else config.initializer_range
            parameter.normal_(0.0, std, generator=generator)
    return model
