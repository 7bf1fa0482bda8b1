"""Construction without memory, and ops on tensors without data."""

import pytest
import torch
from accelerate import init_empty_weights
from torch._subclasses.fake_tensor import FakeTensorMode

import illada
from illada.config import ModelConfig
from illada.diffusion import Batch
from illada.model import MaskedDiffusionModel

CONFIG = ModelConfig.preset("tiny", vocab_size=100)


def use_all(device):
    """Model, loss with gradients, and sampling on `device`; the shapes of what comes out."""
    tokens, starts = torch.zeros(8, dtype=torch.int64, device=device), torch.zeros(3, dtype=torch.int32, device=device)
    model = MaskedDiffusionModel(CONFIG, device=device)
    rows = torch.zeros(2, dtype=torch.int32, device=device)
    batch = Batch(tokens, tokens, torch.zeros(8, device=device), starts, tokens, rows)
    loss = model.loss(batch)
    loss.backward()
    hidden = model(tokens, starts)
    sample = illada.linear_sample_tokens(hidden, model.head_weight)
    logits = hidden @ model.head_weight.T
    assert illada.masked_cross_entropy(logits, tokens, torch.zeros(8, device=device)).shape == ()
    return hidden.shape, loss.shape, model.embed_tokens.weight.grad.shape, sample.token.shape


SHAPES = (8, CONFIG.hidden_size), (), (CONFIG.embedding_rows, CONFIG.hidden_size), (8,)


def test_meta_tensors():
    assert use_all("meta") == SHAPES
    with torch.autocast("cpu", torch.bfloat16):
        assert use_all("meta") == SHAPES


def test_fake_tensors():
    with FakeTensorMode():
        assert use_all("cpu") == SHAPES


@pytest.mark.parametrize("context", [lambda: torch.device("meta"), init_empty_weights], ids=["device", "accelerate"])
def test_construction_on_the_meta_device(context):
    with context():
        model = MaskedDiffusionModel(CONFIG)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model.to_empty(device="cpu").reset_parameters(3)
    want = MaskedDiffusionModel(CONFIG, seed=3)
    for (name, a), b in zip(model.named_parameters(), want.parameters(), strict=True):
        assert torch.equal(a, b), name
