"""Training runs of a few seconds: their configuration, and what they leave."""

import dataclasses
import json
from pathlib import Path

import torch

from illada.checkpoints.weights import load_pretrained


def settings(corpus, out, **more):
    values = {
        "model.preset": '"tiny"', "model.hidden_size": 32, "model.intermediate_size": 48, "model.num_hidden_layers": 1,
        "model.num_attention_heads": 4, "data.path": f'"{corpus}"', "data.window": 32, "train.out_dir": f'"{out}"',
        "train.steps": 6, "train.windows_per_step": 4, "train.windows_per_micro_batch": 2, "train.log_every": 1,
        "train.save_every": 2, "train.keep_last": 10, "schedule.warmup_steps": 2, "optimizer.learning_rate": 1e-2,
        "validation.every": 3, "validation.windows": 4, "validation.strata": 2, **more,
    }  # fmt: skip
    return [f"--{key}={value}" for key, value in values.items()]


def change(config, **sections):
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    )


def weights(path):
    return {name: p.detach() for name, p in load_pretrained(path).named_parameters()}


def metrics(config):
    lines = (Path(config.train.out_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)
