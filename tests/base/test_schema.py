"""Values from outside against type hints: what passes, and what is said of what does not."""

import dataclasses
import math
import tomllib
from typing import Any, Literal

import pytest

from illada.config import PRESETS, ModelConfig
from illada.schema import Count, Finite, Fraction, NonNegativeFloat, Positive, check_fields, check_object, checked
from illada.train.config import OptimizerConfig, RunConfig, TrainConfig


@pytest.mark.parametrize(
    "hint, value, match",
    [
        (Positive, 0, "x must be positive, got 0"),
        (Positive, True, "x must be int, got True"),
        (Positive, 1.0, r"x must be int, got 1\.0"),
        (Positive, "1", "x must be int, got '1'"),
        (Count, -1, "x must not be negative, got -1"),
        (Count, 2**60, r"x must be at most 2\^53, got 1152921504606846976"),
        (Finite, math.nan, "x must be finite, got nan"),
        (Finite, math.inf, "x must be finite, got inf"),
        (Fraction, 1.5, r"x must be at most 1, got 1\.5"),
        (bool, 0, "x must be bool, got 0"),
        (str, None, "x must be str, got None"),
        (Literal["a", "b"], "c", "x must be a or b, got 'c'"),
        (list[Finite], [1.0, "2"], r"x\[1\] must be float, got '2'"),
        (dict[str, dict[str, Any]], {"a": 3}, r"x\.a must be an object with keys, got 3"),
    ],
)
def test_what_a_hint_refuses(hint, value, match):
    with pytest.raises(ValueError, match=match):
        checked(hint, value, "x")


def test_what_a_hint_takes():
    assert checked(NonNegativeFloat, 3, "x") == 3.0 and isinstance(checked(float, 3, "x"), float)
    assert checked(list[Finite], [1, 2.5], "x") == [1.0, 2.5]

    @dataclasses.dataclass(frozen=True)
    class Some:
        rate: NonNegativeFloat = 1

        def __post_init__(self) -> None:
            check_fields(self, "some")

    globals()["Some"] = Some
    assert isinstance(Some().rate, float)
    with pytest.raises(ValueError, match="some.rate must not be negative, got -1"):
        Some(-1)


def test_objects():
    assert check_object({"a": 1, "b": "text", "more": None}, {"a": Count, "b": str}, "f.json") == {"a": 1, "b": "text"}
    for values, match in (
        ([1], "f.json must hold a JSON object, got list"),
        ({"b": "x"}, "f.json lacks a"),
        ({"a": -1, "b": ""}, "f.json: a must not be negative"),
    ):
        with pytest.raises(ValueError, match=match):
            check_object(values, {"a": Count, "b": str}, "f.json")


@pytest.mark.parametrize(
    "change, match",
    [
        ({"tie_word_embeddings": "no"}, "model.tie_word_embeddings must be bool, got 'no'"),
        ({"tie_word_embeddings": 0}, "model.tie_word_embeddings must be bool, got 0"),
        ({"max_position_embeddings": 1e3}, r"model.max_position_embeddings must be int, got 1000\.0"),
        ({"hidden_size": "abc"}, "model.hidden_size must be int, got 'abc'"),
        ({"head_dim": -2}, "model.head_dim must be positive"),
        ({"model_type": "gpt2"}, "model.model_type must be illada, llada, dream, qwen2 or illada_hf, got 'gpt2'"),
        ({"hidden_size": 2**70}, r"model.hidden_size must be at most 2\^30, got 1180591620717411303424"),
        ({"head_dim": 2**29}, r"x model.head_dim must be at most 2\^30, got \(6 \+ 2 x 2\) x 536870912 = 5368709120"),
        ({"eot_token_id": 4096}, r"model.eot_token_id must be in \[0, 4096\), got 4096"),
        ({"mask_token_id": None}, "model.mask_token_id must be int, got None"),
        ({"rms_norm_eps": "small"}, "model.rms_norm_eps must be float, got 'small'"),
        ({"num_hidden_layers": 10**9}, "model.num_hidden_layers must be at most 4096, got 1000000000"),
    ],
)
def test_every_field_of_a_model_has_a_type(change, match):
    with pytest.raises(ValueError, match=match):
        ModelConfig.from_dict({**PRESETS["tiny"], **change})
    assert isinstance(ModelConfig.from_dict({**PRESETS["tiny"], "rope_theta": 10000}).rope_theta, float)


def test_settings_that_would_train_something_else():
    for make, match in (
        (lambda: OptimizerConfig(clip_norm=-1), "optimizer.clip_norm must not be negative"),
        (lambda: OptimizerConfig(weight_decay=math.nan), "optimizer.weight_decay must be finite, got nan"),
        (lambda: OptimizerConfig(beta2=1.0), "optimizer.beta2 must be below 1"),
        (lambda: OptimizerConfig(learning_rate=math.inf), "optimizer.learning_rate must be finite, got inf"),
        (lambda: RunConfig(seed=-1), "train.seed must not be negative"),
        (lambda: RunConfig(device="tpu"), "train.device must be auto, cpu or cuda, got 'tpu'"),
    ):
        with pytest.raises(ValueError, match=match):
            make()


def test_any_text_survives_as_toml():
    config = TrainConfig(train=RunConfig(out_dir='a\nb\t"c"\\ \x01 \u2028'))
    for commented in (False, True):
        read = tomllib.loads(config.to_toml(commented=commented))
        assert TrainConfig.from_dict(read) == config


def test_every_key_of_a_commented_file_has_its_comment():
    lines = TrainConfig().to_toml(commented=True).splitlines()
    keys = [line for line in lines if " = " in line and not line.startswith("preset")]
    assert len(keys) > 30 and not [line for line in keys if "  # " not in line]
