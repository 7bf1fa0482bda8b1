"""What a run takes by arithmetic, against torch's FLOP counter, autograd's own storage, and the paper's model."""

import json

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from illada import cli
from illada.config import ModelConfig
from illada.diffusion import make_batch
from illada.model import MaskedDiffusionModel
from illada.train import load_config
from illada.train.estimate import estimate, flop_of
from illada.train.loop import _optimizer

SMALL = {"model.preset": "small", "model.vocab_size": 2048, "model.num_hidden_layers": 2, "data.window": 128,
         "train.windows_per_step": 4, "train.windows_per_micro_batch": 2, "train.device": "cpu"}  # fmt: skip


def configured(**options):
    config = load_config(None, [f"--{key}={value}" for key, value in {**SMALL, **options}.items()])
    return config, config.model_config({})


def micro_batch(config, model_config):
    count, window = config.train.windows_per_micro_batch, config.data.window
    tokens = np.arange(count * window).reshape(count, window) % 1000 + 10
    return make_batch(tokens, np.arange(count), seed=0, mask_id=model_config.mask_token_id, config=config.diffusion)


def test_flop_are_those_that_torch_counts():
    config, model_config = configured(**{"diffusion.split_probability": 0.5})
    model = MaskedDiffusionModel(model_config)
    batch = micro_batch(config, model_config)
    with FlopCounterMode(display=False) as counter:
        model.loss(batch).backward()
    lengths = batch.cu_seqlens.diff().tolist()
    want = flop_of(model_config, lengths, masked=len(batch.rows))
    assert counter.get_total_flops() == pytest.approx(want, rel=1e-6)


def test_state_is_what_the_trainer_keeps():
    config, model_config = configured()
    model = MaskedDiffusionModel(model_config)
    optimizer = _optimizer(model, config)
    moments = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    kept = sum(p.numel() * 4 for p in [*model.parameters(), *moments]) + sum(p.numel() * 4 for p in model.parameters())
    found = estimate(config, model_config)
    assert (found.state_bytes, found.parameters) == (kept, sum(p.numel() for p in model.parameters()))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_saves(checkpointing):
    """Within a tenth: the estimate leaves out RoPE's tables and what is one number a row."""
    config, model_config = configured(**{"train.activation_checkpointing": str(checkpointing).lower()})
    model = MaskedDiffusionModel(model_config)
    model.activation_checkpointing = checkpointing
    batch = micro_batch(config, model_config)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(batch.tokens, batch.cu_seqlens)
    total = sum(size for size, _ in saved.values())
    found = estimate(config, model_config).activation_bytes
    if checkpointing:  # one layer more is alive while it is recomputed
        deep, deep_model = configured(**{"model.num_hidden_layers": 3})
        flat = estimate(configured()[0], model_config).activation_bytes
        found -= estimate(deep, deep_model).activation_bytes - flat
    assert found == pytest.approx(total, rel=0.1)


def test_the_papers_model():
    config = load_config("configs/illada_8b.toml")
    model_config = config.model_config({})
    alone = estimate(config, model_config)
    assert alone.state_bytes == 16 * model_config.num_parameters and 120e9 < alone.state_bytes < 124e9
    many = estimate(config, model_config, ranks=256, peak_tflops=989, mfu=0.4)
    assert many.sharded_bytes < alone.state_bytes / 50
    assert many.flop_per_step == alone.flop_per_step
    assert 1.1 < many.flop_per_step / (6 * model_config.num_parameters * many.tokens_per_step) < 1.5  # attention beside
    assert many.seconds_per_step == pytest.approx(many.flop_per_step / (989e12 * 0.4 * 256))


def test_steps_end_with_the_decay():
    config, model_config = configured(
        **{"train.steps": 1000, "schedule.decay_start": 200.0, "schedule.decay_steps": 50}
    )
    found = estimate(config, model_config)
    assert (found.steps, found.tokens) == (250, 250 * found.tokens_per_step)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"ranks": 0}, "ranks must be positive, got 0"),
        ({"peak_tflops": 0.0}, "peak_tflops must be positive, got 0"),
        ({"peak_tflops": float("nan")}, "peak_tflops must be positive, got nan"),
        ({"mfu": 1.5}, "mfu must be in .0, 1., got 1.5"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        estimate(*configured(), **options)


def test_command(tmp_path, capsys):
    run = ["train", "illada_8b", "--dry-run", f"--data.path={tmp_path}"]
    assert cli.main(run) == 0
    text = capsys.readouterr().out
    assert "parameters        7,6" in text and "time on" not in text and "sharded" not in text
    assert cli.main([*run, "--ranks", "256", "--peak-tflops", "989"]) == 0
    text = capsys.readouterr().out
    assert "time on 256 devices" in text and "one of 256 ranks" in text and "docs/embedding.md" in text
    assert cli.main([*run, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == ModelConfig.preset("illada_8b").num_parameters
    for option in (["--json"], ["--ranks", "8"], ["--peak-tflops", "900"], ["--mfu", "0.3"]):
        assert cli.main(["train", "illada_8b", *option]) == 2
        assert f"{option[0]} belongs to --dry-run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
