"""Every op but attention on values that break kernels (adversarial.py), in every dtype, against float64."""

import pytest
import torch
from properties import (
    GREEDY,
    LOSSES,
    NOISY,
    check_linear_loss,
    check_linear_sampler,
    check_loss,
    check_remask,
    check_sampler,
)

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", LOSSES)
def test_masked_cross_entropy(way, dtype, generator):
    check_loss(way, dtype, CPU, generator)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_masked_cross_entropy(dtype, generator):
    check_linear_loss(dtype, CPU, generator)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [GREEDY, NOISY])
def test_sample_tokens(temperature, dtype, generator):
    check_sampler(temperature, dtype, CPU, generator)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [GREEDY, NOISY])
def test_linear_sample_tokens(temperature, dtype, generator):
    check_linear_sampler(temperature, dtype, CPU, generator)


@pytest.mark.parametrize("tokens", [torch.int64, torch.int32])
def test_remask(tokens, generator):
    check_remask(tokens, CPU, generator)
