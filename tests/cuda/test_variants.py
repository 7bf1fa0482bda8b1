"""The choices between kernels: named, listed, refused where unknown, and restored."""

import os
import subprocess
import sys

import pytest
import torch

import illada
from illada.ops.variants import Variant, describe, set_variant, use_variants, variants


def choices() -> dict[str, Variant]:
    return {choice.name: choice for choice in variants()}


def test_every_choice_has_names_a_description_and_a_default():
    for choice in variants():
        assert choice.environment.startswith("ILLADA_") and choice.environment == choice.environment.upper()
        assert choice.description and choice.default == choice.values[0] and choice.value in choice.values
        assert len(set(choice.values)) == len(choice.values) > 1
    assert len(choices()) == len(variants())


def test_values_hold_within_the_context_alone():
    before = choices()
    for choice in before.values():
        with use_variants(**{choice.name: choice.values[-1]}):
            assert choices()[choice.name].value == choice.values[-1]
            assert f"{choice.name}={choice.values[-1]}" in describe()
        assert choices() == before


def test_what_there_is_not_is_refused():
    with pytest.raises(ValueError, match='set_variant: there is no choice "speed"; there are pdl'):
        set_variant("speed", "high")
    with pytest.raises(ValueError, match='pdl: got "late"; allowed are wait, early, 0'):
        set_variant("pdl", "late")
    before = choices()
    with pytest.raises(ValueError, match="there is no choice"), use_variants(pdl="0", speed="high"):
        pass
    with pytest.raises(ValueError, match="allowed are"), use_variants(pdl="late"):
        pass
    assert choices() == before


def test_the_environment_chooses():
    code = "from illada.ops.variants import describe; print(describe())"

    def run(**environment):
        return subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
        )

    assert run(ILLADA_PDL="early").stdout.strip() == "pdl=early"
    assert run(ILLADA_PDL="").stdout.strip() == "default"
    refused = run(ILLADA_PDL="sometimes")
    assert refused.returncode != 0
    assert 'ILLADA_PDL: got "sometimes"; allowed are wait, early, 0' in refused.stderr


@pytest.mark.parametrize("pdl", ["early", "wait", "0"])
def test_programmatic_launch_changes_no_result(device, pdl):
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(0)).to(device)
    want = illada.sample_tokens(logits, temperature=0.5, seed=3)
    with use_variants(pdl=pdl):
        got = illada.sample_tokens(logits, temperature=0.5, seed=3)
    assert torch.equal(got.token, want.token) and torch.equal(got.confidence, want.confidence)
