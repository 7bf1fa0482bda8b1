"""Models with random weights, made on the device that they run on."""

from __future__ import annotations

import torch

from illada.config import ModelConfig
from illada.model import MaskedDiffusionModel


@torch.no_grad()
def random_model(
    config: ModelConfig, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> MaskedDiffusionModel:
    """Return a model with random weights.

    Norms are 1, biases 0, and all else is normal with the config's standard deviation.

    `MaskedDiffusionModel` draws its initial weights on the CPU, the same everywhere: minutes for 8e9 of them. These are
    the same in every run on one kind of device. There are no buffers, and a tied head is the embedding itself, so the
    parameters are all there is to fill.
    """
    model = MaskedDiffusionModel(config, device="meta", dtype=dtype).to_empty(device=device)
    # The global seed, not a generator: that would have to be of the kind that the kernel behind normal_ takes.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(0.0, config.initializer_range)
    return model
