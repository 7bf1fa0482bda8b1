"""A training step on CUDA tensors: loss, gradients and what AdamW makes of them, against the CPU and float64.

The loss is in plain torch on both devices where what is judged is what the model asks of attention.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_generate import make_models, reference_forward

from illada.batch import Batch
from illada.config import ModelConfig
from illada.data.corpus import prepare
from illada.model import MaskedDiffusionModel
from illada.testing import assert_close_like, relative_error
from illada.train import load_config, train

LENGTHS = [70, 1, 33, 130]
MASK_ID = 5


def make_config(dim: int, group: int, **options) -> ModelConfig:
    return ModelConfig.preset(
        "tiny", hidden_size=128, num_attention_heads=4, num_key_value_heads=4 // group, head_dim=dim, vocab_size=600,
        intermediate_size=96, num_hidden_layers=2, max_position_embeddings=256, initializer_range=0.1,
        mask_token_id=MASK_ID, **options,
    )  # fmt: skip


def make_batch() -> Batch:
    """Mask each sequence at its own rate t; the one of a single token is masked as a whole."""
    generator = torch.Generator().manual_seed(3)
    rates = torch.tensor([0.3, 1.0, 0.9, 0.5]).repeat_interleave(torch.tensor(LENGTHS))
    masked = torch.rand(len(rates), generator=generator) < rates
    targets = torch.randint(10, 600, (len(rates),), generator=generator)
    return Batch(
        tokens=targets.masked_fill(masked, MASK_ID),
        targets=targets,
        token_weights=masked / rates,
        cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0).int(),
        position_ids=torch.cat([torch.arange(n) for n in LENGTHS]),
        rows=masked.nonzero().flatten().int(),
    )


def plain_loss(model, batch: Batch, hidden_states=None, all_rows=True) -> torch.Tensor:
    """Compute `model.loss` in plain torch; without `all_rows` the last layer's other queries are left out."""
    rows = batch.rows.long()
    if hidden_states is not None:
        hidden = hidden_states(model, batch.tokens, batch.cu_seqlens)[rows]
    elif all_rows:
        hidden = model(batch.tokens, batch.cu_seqlens, position_ids=batch.position_ids)[rows]
    else:
        hidden = model(batch.tokens, batch.cu_seqlens, position_ids=batch.position_ids, rows=batch.rows)
    logits = hidden @ model.head_weight.T
    logits = logits.float() if logits.dtype != torch.float64 else logits
    losses = F.cross_entropy(logits, batch.targets[rows], reduction="none")
    return (losses * batch.token_weights[rows]).sum() / batch.num_tokens


def step(model, batch: Batch, **how) -> SimpleNamespace:
    """Run one step of AdamW: return the loss, and by name gradients and the parameters after it, on the CPU."""
    # With a small eps the first step is the sign of the gradient, which is anything where that is nearly zero.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, eps=0.01, weight_decay=0.1)
    loss = plain_loss(model, batch, **how)
    loss.backward()
    grads = {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}
    optimizer.step()
    parameters = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
    return SimpleNamespace(loss=loss.detach().cpu(), grads=grads, parameters=parameters)


@pytest.mark.parametrize("all_rows", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_step_of_the_cpu(dim, group, checkpointing, all_rows, device):
    config = make_config(dim, group, qkv_bias=group == 4, tie_word_embeddings=group == 4)
    on_cpu, on_gpu = make_models(config, torch.bfloat16, device)
    exact = MaskedDiffusionModel(config, dtype=torch.float64)
    exact.load_state_dict(on_cpu.state_dict())
    for model in (on_cpu, on_gpu):
        model.activation_checkpointing = checkpointing
    batch = make_batch()
    want = step(exact, batch, hidden_states=reference_forward)
    baseline = step(on_cpu, batch, all_rows=all_rows)
    got = step(on_gpu, batch.to(device), all_rows=all_rows)

    assert relative_error(got.loss, want.loss) < torch.finfo(torch.bfloat16).eps / 8  # one number can be right by luck
    for of in ("grads", "parameters"):
        for name, found in getattr(got, of).items():
            try:
                assert_close_like(found, getattr(want, of)[name], getattr(baseline, of)[name])
            except AssertionError as error:
                raise AssertionError(f"{of} of {name}: {error}") from None
    assert got.grads.keys() == baseline.grads.keys() == dict(exact.named_parameters()).keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loss_of_the_cpu(dtype, device):
    """`MaskedDiffusionModel.loss` and its gradients, of a model in 16 bits and of a float32 one under autocast."""
    on_cpu, on_gpu = make_models(make_config(64, 4), dtype, device)
    batch = make_batch()
    grads = []
    for model in (on_cpu, on_gpu):
        where = next(model.parameters()).device
        with torch.autocast(where.type, torch.bfloat16, enabled=dtype == torch.float32):
            loss = model.loss(batch.to(where))
        loss.backward()
        grads.append({"loss": loss.detach().cpu()} | {n: p.grad.cpu() for n, p in model.named_parameters()})
    for name, want in grads[0].items():
        assert grads[1][name].dtype == want.dtype and relative_error(grads[1][name], want) < 0.03, name


def test_trainer(tmp_path, device):
    """The trainer learns on a GPU what it learns on a CPU."""
    (tmp_path / "text").mkdir()
    for i in range(20):
        (tmp_path / "text" / f"{i}.txt").write_text(f"a b c d e f g h {i} " * 40)
    prepare(f"dir:{tmp_path / 'text'}", tmp_path / "corpus", vocab_size=300, validation_fraction=0.2)
    bounds = {}
    for where in ("cpu", "auto"):
        values = {
            "model.preset": '"tiny"', "model.hidden_size": 64, "model.intermediate_size": 48, "model.head_dim": 64,
            "model.num_hidden_layers": 1, "model.num_attention_heads": 1, "model.num_key_value_heads": 1,
            "data.path": f'"{tmp_path / "corpus"}"', "data.window": 32, "train.out_dir": f'"{tmp_path / where}"',
            "train.steps": 3, "train.windows_per_step": 4, "train.windows_per_micro_batch": 2,
            "train.dtype": '"bfloat16"', "train.device": f'"{where}"', "optimizer.learning_rate": 1e-2,
            "schedule.warmup_steps": 1, "validation.windows": 4, "validation.strata": 2,
        }  # fmt: skip
        result = train(load_config(None, [f"--{key}={value}" for key, value in values.items()]), progress=False)
        bounds[where] = result.validation_bound
    assert bounds["auto"] == pytest.approx(bounds["cpu"], rel=0.02)
