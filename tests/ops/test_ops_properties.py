"""Every op but attention on values that break kernels (adversarial.py), in every dtype, against float64."""

import properties
import pytest
import torch

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", properties.LOSSES)
def test_masked_cross_entropy(way, dtype, generator):
    properties.check_loss(way, dtype, CPU, generator)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_masked_cross_entropy(dtype, generator):
    properties.check_linear_loss(dtype, CPU, generator)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", properties.TEMPERATURES)
def test_sample_tokens(temperature, dtype, generator):
    properties.check_sampler(temperature, dtype, CPU, generator)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", properties.TEMPERATURES)
def test_linear_sample_tokens(temperature, dtype, generator):
    properties.check_linear_sampler(temperature, dtype, CPU, generator)


@pytest.mark.parametrize("tokens", [torch.int64, torch.int32])
def test_remask(tokens, generator):
    properties.check_remask(tokens, CPU, generator)
