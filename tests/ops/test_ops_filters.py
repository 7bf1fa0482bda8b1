"""top_k, top_p and confidence_at_temperature of sample_tokens and linear_sample_tokens against float64."""

import inspect

import pytest
import sample_filters as checks
import torch

import illada
from illada.ops import raw, reference, sampling

DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.only("cuda"))]


def make_rows(case, dtype, generator, *, strided):
    count, vocab, spread = case
    values = (torch.randn(count, vocab, generator=generator) * spread).to(dtype)
    if not strided:
        return values
    wide = torch.full((count, vocab + 5), torch.nan, dtype=dtype)
    wide[:, 1 : vocab + 1] = values
    return wide[:, 1 : vocab + 1]


@pytest.mark.parametrize("at_temperature", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*checks.CASES, (12, 40000, 0.02)], ids=str)
def test_matches_fp64(case, dtype, at_temperature, device, generator):
    # The last case has more ids in a bin than a CUDA kernel's list holds.
    checks.check_reference(
        make_rows(case, dtype, generator, strided=at_temperature), device, at_temperature=at_temperature
    )


@pytest.mark.parametrize("measure", ["margin", "entropy", "random"])
def test_measures_and_bias(measure, device, generator):
    logits = torch.randn(12, 2700, generator=generator) * 2
    ids = torch.randint(-1, 2700, (12, 4), generator=generator, dtype=torch.int32)
    ids[:, 0], ids[:, 3] = logits.argmax(-1), 2699
    bias = (ids, torch.tensor([[-torch.inf, 5.0, 9.0, 6.5]]).expand(12, 4).contiguous())
    checks.check_reference(logits, device, at_temperature=True, logit_bias=bias, measure=measure)


def test_which_ids_are_kept(device):
    checks.check_kept_ids(device)


def test_the_entropy_of_one_kept_id_is_0(device):
    checks.check_entropy_of_one_kept_id(device)


def test_broken_rows_are_not_filtered(device):
    checks.check_broken_rows(device)


def test_frequencies_are_the_renormalised_softmax(device, generator):
    checks.check_frequencies(device, generator, draws=2000 if device.type == "cuda" else 60_000)


@pytest.mark.parametrize("count", [2, 300])  # on CUDA several CTAs a row, and one
def test_batch_and_split_change_nothing(count, device, generator):
    rows = make_rows((2, 20001, 3.0), torch.bfloat16, generator, strided=False).to(device)
    place = torch.arange(count, device=device) % 2
    ids = torch.tensor([11, 77], device=device)
    for at_temperature in (False, True):
        keywords = {
            "temperature": 1.3, "top_k": 900, "top_p": 0.8, "seed": 3, "extras": checks.ALL,
            "confidence_at_temperature": at_temperature,
        }  # fmt: skip
        alone = checks.to_host(illada.sample_tokens(rows[:1], row_ids=ids[:1], **keywords))
        many = checks.to_host(illada.sample_tokens(rows[place], row_ids=ids[place], **keywords))
        for name, field, single in zip(many._fields, many, alone, strict=True):
            assert (field[::2] == single).all(), name  # bit for bit


@pytest.mark.parametrize("vocab", [33, 30000])
def test_ties_and_far_logits(vocab, device):
    """Equal logits in numbers that no list holds; ranges of logits that leave one bin for all but the first."""
    flat = torch.zeros(vocab)
    far = torch.arange(vocab).float() * -1.5
    wide = torch.full((vocab,), -3e38)
    wide[5:9] = torch.tensor([3e38, 2.9e38, -1.0, 0.0])
    settings = [(1.0, 0, 0.37), (1.0, 7, 0.5), (50.0, 20, 1.0), (1e3, 25, 0.9), (1e37, 3, 0.99)]
    for row in (flat, far, wide, flat.bfloat16(), far.bfloat16()):
        for temperature, top_k, top_p in settings:
            logits = row.to(device).expand(10, -1)
            keywords = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": 5}
            got = illada.sample_tokens(logits, **keywords).token.cpu()
            kept = reference.kept_ids(row.double(), temperature, top_k, top_p)
            assert kept[got].all()
            one = logits[:1].cpu()
            assert torch.equal(got[:1], reference.sample_tokens(one, **keywords).token)


@pytest.mark.parametrize("rows", [None, torch.tensor([7, 3, 299, 3], dtype=torch.int32)])
def test_linear_sample_tokens(rows, generator):
    hidden, weight = torch.randn(300, 16, generator=generator), torch.randn(1000, 16, generator=generator)
    count = 300 if rows is None else len(rows)
    keywords = {
        **checks.per_row(count, torch.device("cpu")),
        "seed": 3,
        "extras": checks.ALL,
        "confidence_at_temperature": True,
    }
    got = illada.linear_sample_tokens(hidden, weight, rows=rows, **keywords)  # several chunks
    want = illada.sample_tokens((hidden if rows is None else hidden[rows.long()]) @ weight.T, **keywords)
    assert torch.equal(got.token, want.token)
    torch.testing.assert_close(got.confidence, want.confidence)


def test_registered_op(generator):
    logits = torch.randn(4, 33, generator=generator)
    of_rows = (torch.full((4,), 3, dtype=torch.int32), torch.full((4,), 0.5))
    for filters in ((3, 0.5, None, None, True), (0, 1.0, *of_rows, False)):
        arguments = (1.0, 3, 2, None, None, None, None, None, None, 0, *filters, True, False)
        torch.library.opcheck(torch.ops.illada.sample_tokens.default, (logits, *arguments))
    compiled = torch.compile(illada.sample_tokens, fullgraph=True, backend="aot_eager")
    keywords = {"temperature": 1.0, "top_k": of_rows[0], "top_p": 0.9}
    assert torch.equal(compiled(logits, **keywords).token, illada.sample_tokens(logits, **keywords).token)
    out = illada.sample_tokens(logits, extras=checks.ALL)
    raw.sample_tokens(out, logits, 1.0, top_k=5, top_ps=of_rows[1], confidence_at_temperature=True)
    want = illada.sample_tokens(logits, temperature=1.0, top_k=5, top_p=of_rows[1], confidence_at_temperature=True)
    assert torch.equal(out.token, want.token) and torch.equal(out.logprob, want.logprob)
    meta = illada.sample_tokens(logits.to("meta"), temperature=1.0, top_k=5, top_p=0.5)
    assert meta.token.shape == (4,)


@pytest.mark.parametrize("op, inputs", [("sample_tokens", 1), ("linear_sample_tokens", 3)])
def test_ops_and_raw_calls_agree_in_the_order_of_arguments(op, inputs):
    of_op = [argument.name for argument in getattr(torch.ops.illada, op).default._schema.arguments]
    _, *of_raw = inspect.signature(getattr(raw, op)).parameters  # the first one is out, the last one workspace
    assert of_op[: len(of_raw) - 1] == of_raw[:-1] and len(of_raw) >= inputs + 10


@pytest.mark.parametrize(
    "keywords,error,message",
    [
        ({"top_k": -1}, ValueError, "top_k must be an integer of at least 0, got -1"),
        ({"top_k": 1.5}, ValueError, "top_k must be an integer of at least 0, got 1.5"),
        ({"top_k": torch.ones(3)}, TypeError, "top_k must be int32, got float32"),
        ({"top_k": torch.ones(2, dtype=torch.int32)}, ValueError, r"top_k must have shape \[3\], got \[2\]"),
        (
            {"top_k": torch.tensor([1, 2, -3], dtype=torch.int32)},
            ValueError,
            "top_k must be at least 0, got -3 in row 2",
        ),
        ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\], got 0"),
        ({"top_p": float("nan")}, ValueError, r"top_p must be in \(0, 1\], got nan"),
        ({"top_p": 1e-50}, ValueError, r"top_p must be in \(0, 1\], got 1e-50"),
        ({"top_p": None}, TypeError, "top_p must be a number or a tensor of 3, got None"),
        ({"temperature": "1"}, TypeError, "temperature must be a number or a tensor of 3, got '1'"),
        ({"top_p": torch.ones(3).double()}, TypeError, "top_p must be float32, got float64"),
        ({"top_p": torch.tensor([1, 1.5, 1])}, ValueError, r"top_p must be in \(0, 1\], got 1.5 in row 1"),
    ],
    ids=str,
)
def test_errors_name_the_argument(keywords, error, message):
    with pytest.raises(error, match=message):
        illada.sample_tokens(torch.zeros(3, 9), **keywords)


def test_errors_name_the_first_argument_of_either_sampler():
    elsewhere = torch.ones(3, device="meta")
    with pytest.raises(ValueError, match="temperature is on meta, but logits is on cpu"):
        illada.sample_tokens(torch.zeros(3, 9), temperature=elsewhere)
    with pytest.raises(ValueError, match="temperature is on meta, but hidden is on cpu"):
        illada.linear_sample_tokens(torch.zeros(3, 4), torch.zeros(9, 4), temperature=elsewhere)


def test_settings_have_the_order_of_the_schema_and_of_the_raw_calls():
    """They are passed on by position, so a setting in another place would take another's value."""
    names = list(sampling._Settings._fields)
    schema = [argument.name for argument in torch.ops.illada.sample_tokens.default._schema.arguments]
    assert schema == ["logits", *names]
    assert list(inspect.signature(raw.sample_tokens).parameters) == ["out", "logits", *names[:-2], "workspace"]
    fused = list(inspect.signature(raw.linear_sample_tokens).parameters)
    assert fused == ["out", "hidden", "weight", "rows", *names[: names.index("top_k")], "workspace"]
