"""Every op but attention on values that break kernels (adversarial.py), in every dtype, against float64."""

import properties
import pytest
import torch

DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.only("cuda"))]
VOCAB = {"cpu": 2500, "cuda": 1003}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", properties.LOSSES)
def test_masked_cross_entropy(way, dtype, device, generator):
    properties.check_loss(way, dtype, device, generator, vocab=VOCAB[device.type])


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_masked_cross_entropy(dtype, device, generator):
    properties.check_linear_loss(dtype, device, generator)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", properties.TEMPERATURES)
def test_sample_tokens(temperature, dtype, device, generator):
    properties.check_sampler(temperature, dtype, device, generator, vocab=VOCAB[device.type])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", properties.TEMPERATURES)
def test_linear_sample_tokens(temperature, dtype, device, generator):
    properties.check_linear_sampler(temperature, dtype, device, generator)


@pytest.mark.parametrize("tokens", [torch.int64, torch.int32])
def test_remask(tokens, device, generator):
    properties.check_remask(tokens, device, generator)
