"""Construction without memory, ops on tensors without data, and export with sizes that stay free."""

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export

import illada
from illada.batch import Batch
from illada.config import ModelConfig
from illada.evaluation.journal import fingerprint
from illada.generation import rules
from illada.model import MaskedDiffusionModel

CONFIG = ModelConfig.preset("tiny", vocab_size=100)


def use_all(device):
    """Use model, loss with gradients, and sampling on `device`; return the shapes of the results."""
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


class Exported(nn.Module):
    """A module of model and loss on a pack."""

    def __init__(self):
        super().__init__()
        self.model = MaskedDiffusionModel(CONFIG)

    def forward(self, tokens, starts, weights):
        hidden = self.model(tokens, starts)
        loss = illada.linear_masked_cross_entropy(hidden, self.model.head_weight, tokens, weights)
        return hidden, loss, illada.linear_sample_tokens(hidden, self.model.head_weight).token


@torch.no_grad()
def test_export_with_any_number_of_tokens_and_sequences(generator):
    def inputs(*lengths):
        starts = torch.tensor([0, *lengths]).cumsum(0).int()
        total = int(starts[-1])
        return torch.randint(100, (total,), generator=generator), starts, torch.rand(total, generator=generator)

    tokens = Dim("tokens", min=2, max=4096)
    shapes = {"tokens": {0: tokens}, "starts": {0: Dim("starts", min=2, max=512)}, "weights": {0: tokens}}
    module = Exported()
    exported = export(module, inputs(4, 5, 11), dynamic_shapes=shapes).module()
    for lengths in ((4, 5, 11), (3, 1, 7, 9, 2), (30,)):
        example = inputs(*lengths)
        for got, want in zip(exported(*example), module(*example), strict=True):
            torch.testing.assert_close(got, want)


def test_torchs_default_device_may_be_another_than_the_models():
    """What is made for the host stays there: with the default "cuda", too."""
    model = MaskedDiffusionModel(CONFIG, device="cpu")
    options = {"gen_length": 8, "block_length": 4, "stop_tokens": ()}
    configs = [illada.GenerationConfig(**options), illada.GenerationConfig(rule="origin", **options)]
    run = [
        lambda: illada.generate(model, [[5, 6, 7]] * 2, configs, seed=3),
        lambda: illada.monte_carlo_likelihood(model, [[5, 6]], [[7, 8]], num_samples=4, stratum=4),
        lambda: [part.tolist() for part in illada.pack([torch.ones(3, device="cpu"), torch.ones(2, device="cpu")])],
        lambda: fingerprint(model),
    ]
    want = [one() for one in run]
    rules._dream_transfers.cache_clear()
    with torch.device("meta"):
        assert [one() for one in run] == want
