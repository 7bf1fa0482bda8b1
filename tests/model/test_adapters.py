"""Adapters, hooks and quantised linears: what is put on a module works wherever the module is used."""

import itertools

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

import illada
from illada.config import ModelConfig
from illada.diffusion import make_batch
from illada.model import MaskedDiffusionModel
from illada.testing import relative_error

CONFIG = ModelConfig.preset("tiny", vocab_size=100, num_hidden_layers=2, qkv_bias=True, tie_word_embeddings=False,
                            model_type="dream", logits_shift=True)  # fmt: skip
TOKENS, STARTS = torch.arange(20), torch.tensor([0, 3, 3, 20], dtype=torch.int32)
ROWS = torch.tensor([0, 2, 3, 4, 19])


def linears(model):
    """Return (name, module) of each linear inside the layers."""
    return [(name, module) for name, module in model.layers.named_modules() if isinstance(module, nn.Linear)]


def with_hooks(model):
    for _, module in linears(model):
        module.register_forward_hook(lambda module, inputs, output: output * 1.5)


def with_pre_hooks(model):
    for _, module in linears(model):
        module.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 0.5,))


def with_replaced_forwards(model):
    for _, module in linears(model):
        module.forward = lambda x, before=module.forward: before(x) + 0.25


def with_lora(model):
    names = ["qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=names, init_lora_weights=False)
    torch.manual_seed(0)
    inject_adapter_in_model(config, model)


def with_int8(model):
    # The others' results depend on which rows a call is given: torch scales activations by the largest of them.
    names = {name: torch.ao.quantization.default_dynamic_qconfig for name, _ in linears(model) if "qkv_proj" in name}
    torch.ao.quantization.quantize_dynamic(model.layers, names, inplace=True)


def with_parametrizations(model):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    for _, module in linears(model):
        nn.utils.parametrize.register_parametrization(module, "weight", Doubled())


CHANGES = [with_hooks, with_pre_hooks, with_replaced_forwards, with_lora, with_int8, with_parametrizations]


@pytest.mark.filterwarnings("ignore:torch.ao.quantization")
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_some_rows_are_those_of_all(change):
    model = MaskedDiffusionModel(CONFIG, seed=2)
    plain = model(TOKENS, STARTS)
    change(model)
    want = model(TOKENS, STARTS)
    assert (want - plain).abs().max() > 1e-2, "the change must do something"
    torch.testing.assert_close(model(TOKENS, STARTS, rows=ROWS), want[ROWS], rtol=1e-4, atol=1e-4)
    positions = illada.model.positions(STARTS, len(TOKENS))
    first = model.first_layer(TOKENS, positions)
    got = model(TOKENS, STARTS, position_ids=positions, rows=ROWS, first=first)
    torch.testing.assert_close(got, want[ROWS], rtol=1e-4, atol=1e-4)


def test_a_trained_adapter_gets_the_gradient_of_some_rows():
    model = MaskedDiffusionModel(CONFIG, seed=2)
    with_lora(model)
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    probe = torch.randn(len(ROWS), CONFIG.hidden_size, generator=torch.Generator().manual_seed(1))
    some, every = model(TOKENS, STARTS, rows=ROWS), model(TOKENS, STARTS)[ROWS]
    got, want = (torch.autograd.grad((hidden * probe).sum(), adapters) for hidden in (some, every))
    for a, b in zip(got, want, strict=True):
        assert b.any() and relative_error(a, b) < 1e-4


def test_a_head_that_is_more_than_its_weight_is_refused():
    batch = make_batch(np.arange(16).reshape(1, 16), np.arange(1), seed=0, mask_id=CONFIG.mask_token_id)
    model = MaskedDiffusionModel(CONFIG, seed=2)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["lm_head"]), model)
    with pytest.raises(TypeError, match="lm_head is a Linear that does more than multiply by its weight .*merge"):
        model.loss(batch)
    model = MaskedDiffusionModel(CONFIG, seed=2)
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(TypeError, match="lm_head is a Linear that does more than"):
        model.loss(batch)
    model = MaskedDiffusionModel(CONFIG, seed=2)
    model.lm_head.__class__ = type("Added", (torch.nn.Linear,), {"forward": lambda self, x: x @ self.weight.T + 1})
    with pytest.raises(TypeError, match="lm_head is a Added that does more than"):
        model.loss(batch)
    model = MaskedDiffusionModel(CONFIG, seed=2)
    model.lm_head = nn.Linear(CONFIG.hidden_size, CONFIG.vocab_size)
    with pytest.raises(TypeError, match="lm_head is a Linear with a bias; the ops of the head take its weight alone"):
        model.loss(batch)


@pytest.mark.parametrize("change", [with_lora, with_int8])
@pytest.mark.filterwarnings("ignore:torch.ao.quantization")
def test_what_the_format_has_no_name_for_is_not_saved(change, tmp_path):
    model = MaskedDiffusionModel(CONFIG, seed=2)
    change(model)
    with pytest.raises(ValueError, match=r"the layout has no name for layers\.0\..*; merge adapters first"):
        illada.save_pretrained(model, tmp_path / "saved")
    assert not list(itertools.chain(tmp_path.iterdir()))


def test_parameters_that_do_not_fit_the_config_are_not_saved(tmp_path):
    model = MaskedDiffusionModel(CONFIG, seed=2)
    model.norm.weight = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"norm.weight must be \[192\] by the config, got \[3\]"):
        illada.save_pretrained(model, tmp_path / "saved")
    del model.norm
    with pytest.raises(ValueError, match=r"norm.weight must be \[192\] by the config, got none"):
        illada.save_pretrained(model, tmp_path / "saved")
