"""What a run shows: the loss by masking probability, and plots of one or several runs."""

import json
import re

import numpy as np
import pytest
import torch
from tiny_runs import change, metrics

from illada import cli
from illada.config import ModelConfig
from illada.diffusion import make_batch
from illada.model import MaskedDiffusionModel
from illada.train import train
from illada.train.log import read_metrics
from illada.train.loss_by_t import BUCKETS, LossByT
from illada.train.plot import PANELS, draw


def test_loss_by_t_is_the_mean_of_each_bucket():
    p = torch.tensor([0.01, 0.1, 0.13, 0.5, 0.99, 1.0])
    nll = torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0, 11.0])
    sums = LossByT("cpu")
    sums.add(torch.cat([nll, torch.zeros(2)]), torch.cat([1 / p, torch.zeros(2)]))  # two tokens that are not masked
    sums.add(torch.tensor([1.0]), torch.tensor([1 / 0.99]))
    assert sums.take() == [2.0, 5.0, None, None, 7.0, None, None, 7.0]
    assert sums.take() == [None] * BUCKETS


def test_loss_by_t_counts_many_tokens():
    """Where float32 would not count on: 2^24 + 2^23 tokens of one bucket."""
    sums = LossByT(torch.device("cpu", 0))
    for count in (2**24, 2**22, 2**22):
        sums.add(torch.full((count,), 2.5), torch.ones(count))
    assert sums.take()[-1] == 2.5


def test_loss_by_t_of_a_model_is_its_loss():
    config = ModelConfig.from_dict(
        {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
         "num_key_value_heads": 2, "mask_token_id": 49, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 2}
    )  # fmt: skip
    model = MaskedDiffusionModel(config, seed=1)
    batch = make_batch(np.arange(64).reshape(2, 32) % 48, np.arange(2), seed=3, mask_id=49)
    loss, nll = model.loss_and_nll(batch)
    assert not nll.requires_grad and loss.requires_grad
    assert torch.equal(nll != 0, batch.token_weights != 0)
    torch.testing.assert_close((nll * batch.token_weights).sum() / 64, loss.detach())
    torch.testing.assert_close(model.loss(batch), loss)


def test_the_log_of_a_run_has_it(config):
    train(config, progress=False)
    lines = [record for record in metrics(config) if record["kind"] == "train"]
    assert all(len(line["loss_by_t"]) == BUCKETS for line in lines)
    values = [value for line in lines for value in line["loss_by_t"] if value is not None]
    assert values and all(0 < value < 10 for value in values)


@pytest.fixture
def runs(config, tmp_path):
    second = change(config, schedule={"decay_start": 0.5}, train={"out_dir": str(tmp_path / "second")})
    for options in (config, second):
        train(options, progress=False)
    return tmp_path / "run", tmp_path / "second"


def test_plot(runs, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    sizes = []
    for options in ([str(runs[0])], [*map(str, runs)], [*map(str, runs), "--panels", "loss, loss_by_t"],
                    [str(runs[0] / "metrics.jsonl"), "--axis", "tokens"], [str(runs[1]), "--axis", "seconds"]):  # fmt: skip
        file = tmp_path / f"{len(sizes)}.png"
        assert cli.main(["plot", *options, "--output", str(file)]) == 0
        assert file.read_bytes().startswith(b"\x89PNG")
        sizes.append(file.stat().st_size)
    assert len(set(sizes)) == len(sizes)
    assert cli.main(["plot", str(runs[0]), "--output", str(tmp_path / "a.svg")]) == 0
    text = (tmp_path / "a.svg").read_text()
    assert "<svg" in text
    capsys.readouterr()


@pytest.mark.parametrize("panel", PANELS)
def test_each_panel_shows_its_curve(runs, tmp_path, panel):
    """Every panel draws a line whose points are the values of the records."""
    figures = pytest.importorskip("matplotlib.figure")
    records = read_metrics(runs[0] / "metrics.jsonl")
    axes = figures.Figure().add_subplot()
    PANELS[panel](axes, records, "step", "C0", "")
    found = [y for line in axes.get_lines() for y in line.get_ydata()]
    lines = [record for record in records if record["kind"] == "train"]
    want = lines[-1][panel] if panel != "loss_by_t" else next(v for v in lines[-1]["loss_by_t"] if v is not None)
    assert want in found


def test_plot_errors(runs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").touch()
    (tmp_path / "other.jsonl").write_text(
        json.dumps({"kind": "train", "step": 1, "loss": 1.0, "loss_by_t": "x"}) + "\n"
    )
    for arguments, message in [
        ([str(tmp_path / "none")], "none is not a run"),
        ([str(tmp_path / "empty")], "has no line yet"),
        ([str(tmp_path / "other.jsonl")], "other.jsonl, line 1: loss_by_t must be a list"),
        ([str(runs[0]), "--panels", "loss,height"], "there is no 'height'; there are loss"),
        ([str(runs[0]), "--panels", ","], "there is no ','"),
        ([str(runs[0]), "--output", str(tmp_path / "plot.txt")], "the suffix of .*plot.txt must be one of"),
    ]:
        assert cli.main(["plot", *arguments]) == 2, arguments
        assert re.search(message, capsys.readouterr().err), message
    assert not (tmp_path / "plot.txt").exists()


def test_a_run_of_an_older_version_is_drawn(tmp_path):
    """Its lines have no loss by t."""
    pytest.importorskip("matplotlib")
    records = [{"kind": "train", "step": 1, "seconds": 1.0, "loss": 2.0}]
    draw({"old": records, "none": []}, tmp_path / "old.png")
    assert (tmp_path / "old.png").stat().st_size
