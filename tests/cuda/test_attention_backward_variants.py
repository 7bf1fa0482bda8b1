"""Every way of adding dq up on compute capability 9.0, against float64 as in tests/ops/test_ops_attention_backward.py."""

import pytest
import torch
from attention_cases import Pack, gradients, random_grads, sums_in_short_packs, to_device  # noqa: F401
from attention_cases import check_gradients as check

import illada
from illada.ops.variants import use_variants, variants

SUMS = ("red2", "red4", "bulk", "recompute")
PACKS = {"short and empty": [0, 1, 63, 64, 65, 0, 127, 128, 129], "many steps": [700, 3, 300]}

pytestmark = [
    pytest.mark.usefixtures("sums_in_short_packs"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="other GPUs have one way"
    ),
]


def test_values_are_those_of_the_choices():
    choices = {choice.name: choice.values for choice in variants()}
    assert choices["attention_backward_sums"] == SUMS
    assert choices["attention_backward_start"] == ("together", "staggered")
    assert choices["attention_backward_reports"] == ("1", "2", "4")


@pytest.mark.parametrize("pack", ["short and empty", pytest.param("many steps", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("hints", ["off", "on"])
@pytest.mark.parametrize("sums", SUMS)
def test_sums(sums, hints, dim, pack, device):
    with use_variants(attention_backward_sums=sums, l2_hints=hints):
        check(Pack(PACKS[pack], device, dim=dim), ways=("any order",))


@pytest.mark.parametrize("sums", SUMS)
@pytest.mark.parametrize(
    "heads, kv_heads", [(2, 2), (14, 2), (16, 1), *(pytest.param(h, 1, marks=pytest.mark.slow) for h in (32, 64))]
)
def test_groups(sums, heads, kv_heads, device):
    with use_variants(attention_backward_sums=sums):
        check(Pack([5, 130, 0, 70], device, heads=heads, kv_heads=kv_heads, dtype=torch.float16), ways=("any order",))


@pytest.mark.slow
@pytest.mark.parametrize("reports", ["1", "2", "4"])
@pytest.mark.parametrize("sums", ["red2", "bulk"])
@pytest.mark.parametrize("dim", [64, 128])
def test_staggered_starts_and_reports(dim, sums, reports, device):
    choices = {"attention_backward_sums": sums, "attention_backward_reports": reports}
    with use_variants(attention_backward_start="staggered", **choices):
        check(Pack([1, 900, 0, 257, 64], device, dim=dim), ways=("any order",))


@pytest.mark.parametrize("reports", ["2", "4"])
def test_reports_held_back_until_the_end(reports, device):
    # One tile of keys: every step is the tile's own, and as many are due at once as there may be.
    with use_variants(attention_backward_reports=reports):
        check(Pack([100, 128, 17], device, heads=8, kv_heads=1), ways=("any order",))


@pytest.mark.parametrize("sums", SUMS)
def test_order_outweighs_the_choice(sums, device):
    """deterministic=True has one way of adding; every run gives the same bits."""
    pack = Pack([300, 129], device)
    grads = to_device(pack, random_grads(pack))
    inputs = (pack.on_device(), pack.on_device_lengths(), grads)
    want = gradients(illada.varlen_attention, *inputs, deterministic=True)
    with use_variants(attention_backward_start="staggered", attention_backward_reports="4", l2_hints="on"):
        got = gradients(illada.varlen_attention, *inputs, deterministic=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with use_variants(attention_backward_sums=sums):
        check(pack, ways=("in order",))
