"""Wrong calls of the sampling ops on CUDA tensors: the documented exception, before anything is written."""

import pytest
import torch

import illada
from illada._native import native
from illada.ops import raw
from illada.ops.op_types import RemaskStatus, TokenSample

CALLS = {  # what is wrong: (exception, message, arguments of the call)
    "dtype": (TypeError, "logits must be float32, bfloat16, float16, got float64", lambda x, cpu: (x.double(), {})),
    "row_ids": (ValueError, "row_ids is on cpu, but logits is on cuda:0", lambda x, cpu: (x, {"row_ids": cpu.long()})),
    "temperature": (ValueError, "temperature is on cpu, but logits is on cuda:0", lambda x, cpu: (x, {"temperature": cpu})),
    "seed": (ValueError, "seed is on cpu", lambda x, cpu: (x, {"seed": cpu.long()})),
    "step": (ValueError, "step is on cpu", lambda x, cpu: (x, {"step": cpu.int()})),
    "bias ids": (ValueError, "logit_bias ids is on cpu", lambda x, cpu: (x, {"logit_bias": (cpu.int(), x[0, :3])})),
    "bias values": (ValueError, "logit_bias values is on cpu", lambda x, cpu: (x, {"logit_bias": (cpu.int().to(x.device), cpu)})),
    "host logits": (ValueError, "row_ids is on cuda:0, but logits is on cpu", lambda x, cpu: (x.cpu(), {"row_ids": cpu.long().to(x.device)})),
    "strides": (ValueError, "last dimension of logits must be contiguous", lambda x, cpu: (x.t(), {})),
    "empty": (ValueError, "vocabulary is empty", lambda x, cpu: (x[:, :0], {})),
    "number": (ValueError, "temperature must be finite", lambda x, cpu: (x, {"temperature": float("nan")})),
}  # fmt: skip


@pytest.mark.parametrize("what", CALLS)
def test_sample_tokens(what, device):
    error, message, make = CALLS[what]
    logits, keywords = make(torch.zeros(3, 9, device=device), torch.zeros(3))
    with pytest.raises(error, match=message):
        illada.sample_tokens(logits, **keywords)


def test_linear_sample_tokens(device):
    hidden, weight = torch.zeros(4, 8, device=device), torch.zeros(9, 8, device=device)
    rows = torch.zeros(2, dtype=torch.int32, device=device)
    for error, message, arguments, keywords in [
        (ValueError, "weight is on cpu, but hidden is on cuda:0", (hidden, weight.cpu()), {}),
        (ValueError, "rows is on cpu, but hidden is on cuda:0", (hidden, weight), {"rows": rows.cpu()}),
        (TypeError, "weight must be float32, got bfloat16", (hidden, weight.bfloat16()), {}),
        (TypeError, "hidden must be float32, bfloat16, float16", (hidden.double(), weight.double()), {}),
        (TypeError, "rows must be int32", (hidden, weight), {"rows": rows.float()}),
        (ValueError, r"weight must have shape \[V, 8\]", (hidden, weight[:, :7]), {}),
        (ValueError, r"seed must have shape \[2\]", (hidden, weight), {"rows": rows, "seed": rows.long().repeat(2)}),
    ]:
        with pytest.raises(error, match=message):
            illada.linear_sample_tokens(*arguments, **keywords)


def make_remask(device):
    fields = torch.ones(3, dtype=torch.int64, device=device), *torch.ones(3, 3, device=device)
    rows = torch.arange(3, dtype=torch.int32, device=device)
    return torch.full((4,), 5, device=device), rows, rows[[0, 2]] * 3 // 2, TokenSample(*fields)


@pytest.mark.parametrize("name", ["rows", "cu_rows", "sample.token", "sample.confidence", "sample.entropy", "quota", "end_ids"])  # fmt: skip
def test_remask_with_one_tensor_on_the_host(name, device):
    tokens, rows, cu_rows, sample = make_remask(device)
    arguments = {"rows": rows, "cu_rows": cu_rows}
    keywords = {"quota": rows[:1], "end_ids": sample.token}
    if name == "sample.entropy":
        keywords["entropy_bound"] = torch.ones(1, device=device)
        del keywords["quota"]
    for holder in (arguments, keywords):
        if name in holder:
            holder[name] = holder[name].cpu()
    if name.startswith("sample."):
        field = name.removeprefix("sample.")
        sample = sample._replace(**{field: getattr(sample, field).cpu()})
    with pytest.raises(ValueError, match=f"remask: {name} .*(is on cpu|host memory)"):
        illada.remask(tokens, **arguments, sample=sample, mask_id=5, **keywords)
    assert tokens.tolist() == [5] * 4


def test_remask_refuses_samples_of_other_dtypes(device):
    tokens, rows, cu_rows, sample = make_remask(device)
    for field, dtype, wanted in (("token", torch.int32, "int64"), ("confidence", torch.float64, "float32"), ("entropy", torch.bfloat16, "float32")):  # fmt: skip
        wrong = sample._replace(**{field: getattr(sample, field).to(dtype)})
        with pytest.raises(TypeError, match=f"sample.{field} must be {wanted}"):
            illada.remask(tokens, rows, cu_rows, wrong, entropy_bound=1.0, mask_id=5)
    with pytest.raises(ValueError, match=r"sample.entropy must have shape \[3\]"):
        illada.remask(tokens, rows, cu_rows, sample._replace(entropy=sample.entropy[:2]), entropy_bound=1.0, mask_id=5)
    assert tokens.tolist() == [5] * 4


def test_what_cuda_refuses_is_a_runtime_error(device):
    """With the op, what it did and CUDA's own words, and no source text."""
    tokens, rows, cu_rows, sample = make_remask(device)
    arguments = (tokens, rows, cu_rows, sample.token, sample.confidence)
    out = RemaskStatus(
        *torch.empty(2, 1, dtype=torch.int32, device=device), *torch.empty(2, 1, dtype=torch.bool, device=device)
    )
    with pytest.raises(
        RuntimeError, match=r"^remask: using device 99: cudaErrorInvalidDevice \(invalid device ordinal\)$"
    ):
        native().remask(
            tokens=tokens, num_tokens=4, rows=rows, cu_rows=cu_rows, num_rows=2, num_sequences=1, limit=1.0,
            token=sample.token, confidence=sample.confidence, mask_id=5, **out._asdict(),
            launch=native().launch(device=99, pointers_checked=True),  # no such device
        )  # fmt: skip
    assert len(illada.remask(*arguments[:3], sample, quota=1, mask_id=5)) == 1  # the error is not told again


def test_a_failed_launch_names_the_shapes(device, monkeypatch):
    def fail(*arguments, **keywords):
        raise RuntimeError("sample_tokens: launching 1 CTAs: cudaErrorInvalidConfiguration (invalid configuration)")

    monkeypatch.setattr(raw, "sample_tokens", fail)
    with pytest.raises(RuntimeError, match=r"cudaErrorInvalidConfiguration .*; called with float32 \[3, 9\]$"):
        illada.sample_tokens(torch.zeros(3, 9, device=device))


# ---------------------------------------------------------------------------------------- raw calls: pointers only

ROWS, VOCAB = 3, 20000  # several vocab tiles per row: needs a workspace


@pytest.fixture
def sampler(device):
    """Return (logits, out, workspace) of a legal raw call."""
    out = TokenSample(torch.full((ROWS,), -7, device=device), *torch.full((4, ROWS), -7.0, device=device))
    logits = torch.zeros(ROWS, VOCAB, device=device)
    size = raw.sample_tokens_workspace(ROWS, VOCAB, logits.device)
    assert size > 0
    return logits, out, torch.empty(size, dtype=torch.uint8, device=device)


def untouched(sample):
    return all((field == -7).all() for field in sample)


def wrong_sample_calls(logits, out, workspace):
    host, none = torch.zeros(ROWS), logits[:0, 0]
    ids, values = torch.zeros(2, dtype=torch.int32, device=logits.device), torch.zeros(2, device=logits.device)
    inside = logits.view(-1)
    for name in ("token", "confidence", "logprob", "entropy", "margin"):
        field = getattr(out, name)
        yield (
            f"{name} must be device memory, got a pointer to host memory",
            (out._replace(**{name: field.cpu()}), logits),
            {},
        )
    for name in ("token", "confidence", "logprob"):
        yield f"{name} must not be null", (out._replace(**{name: none}), logits), {}
    yield "temperature must be device memory", (out, logits), {"temperatures": host}
    yield "seed must be device memory", (out, logits), {"seeds": host.long()}
    yield "step must be device memory", (out, logits), {"steps": host.int()}
    yield "row_ids must be device memory", (out, logits), {"row_ids": host.long()}
    yield "logit_bias ids must be device memory", (out, logits), {"bias_ids": ids.cpu(), "bias_values": values}
    yield "logit_bias values must not be null", (out, logits), {"bias_ids": ids}
    yield "confidence overlaps logprob", (out._replace(confidence=out.logprob), logits), {}
    yield "margin|entropy overlaps", (out._replace(entropy=out.margin), logits), {}
    yield "logprob overlaps logits", (out._replace(logprob=inside[-ROWS:]), logits), {}
    yield "token overlaps row_ids", (out, logits), {"row_ids": out.token}
    yield "confidence overlaps temperature", (out, logits), {"temperatures": out.confidence}
    yield (
        f"workspace must have {len(workspace)} bytes, got {len(workspace) - 1}",
        (out, logits),
        {"workspace": workspace[:-1]},
    )
    yield "workspace must have .* bytes, got 0", (out, logits), {"workspace": None}
    yield "workspace must be 16-byte aligned", (out, logits), {"workspace": torch.cat([workspace, workspace])[4:]}
    yield "workspace must be device memory", (out, logits), {"workspace": workspace.cpu()}
    yield "workspace overlaps logits", (out, logits), {"workspace": inside.view(torch.uint8)}
    yield "temperature must be finite", (out, logits), {"temperature": -1.0}


def test_raw_sample_tokens(sampler):
    logits, out, workspace = sampler
    for message, arguments, keywords in wrong_sample_calls(*sampler):
        with pytest.raises(ValueError, match=message):
            raw.sample_tokens(*arguments, **{"workspace": workspace, **keywords})
        assert untouched(out), message
    with pytest.raises(ValueError, match="inputs are on the CPU, but the outputs are on cuda"):
        raw.sample_tokens(out, logits.cpu())
    raw.sample_tokens(out, logits, workspace=workspace)  # and no error was left behind
    assert not out.token.any()


def test_raw_remask(device):
    tokens, rows, cu_rows, sample = make_remask(device)
    out = RemaskStatus(*(torch.full((1,), True, dtype=d, device=device) for d in (torch.int32, torch.int32, torch.bool, torch.bool)))  # fmt: skip
    good = {
        "out": out, "tokens": tokens, "rows": rows, "cu_rows": cu_rows, "token": sample.token,
        "confidence": sample.confidence, "entropy": sample.entropy, "rule": 0, "limit": 1.0, "limits": None,
        "mask_id": 5, "min_commit": 1, "end_ids": None,
    }  # fmt: skip
    none = rows[:0]
    for message, wrong in [
        ("tokens overlaps sample.token", {"token": tokens}),
        ("rows must be device memory", {"rows": rows.cpu()}),
        ("cu_rows must be device memory", {"cu_rows": cu_rows.cpu()}),
        ("sample.token must not be null", {"token": none}),
        ("sample.confidence must not be null", {"confidence": none}),
        ("sample.entropy must be device memory", {"entropy": sample.entropy.cpu()}),
        ("entropy_bound needs a sample with entropies", {"entropy": None, "rule": 3}),
        ("limit must be device memory", {"limits": none.new_ones(1).cpu()}),
        ("end_ids must be device memory", {"end_ids": torch.tensor([3])}),
        ("committed must not be null", {"out": out._replace(committed=none)}),
        ("committed overlaps remaining", {"out": out._replace(remaining=out.committed)}),
        ("finished overlaps ended", {"out": out._replace(ended=out.finished)}),
        ("remaining overlaps rows", {"out": out._replace(remaining=rows)}),
        ("ended must be device memory", {"out": out._replace(ended=out.ended.cpu())}),
        ("min_commit must not be negative", {"min_commit": -1}),
    ]:
        with pytest.raises(ValueError, match=message):
            raw.remask(**{**good, **wrong})
        assert tokens.tolist() == [5] * 4 and all(field.tolist() == [1] for field in out), message
    raw.remask(**good)
    assert tokens.tolist() == [1, 5, 5, 5] and [field.tolist() for field in out] == [[1], [2], [False], [False]]


def test_memory_of_another_device(sampler):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    logits, out, workspace = sampler
    with pytest.raises(ValueError, match="token is memory of device 1, but the launch is on device 0"):
        raw.sample_tokens(out._replace(token=out.token.to("cuda:1")), logits, workspace=workspace)
    with pytest.raises(ValueError, match="row_ids is on cuda:1, but logits is on cuda:0"):
        illada.sample_tokens(logits, row_ids=torch.zeros(ROWS, dtype=torch.int64, device="cuda:1"))
    # A launch goes to the device of its tensors, not to the current one.
    assert not illada.sample_tokens(logits.to("cuda:1")).token.any()
