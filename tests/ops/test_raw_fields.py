"""The fields of the native functions: both sides name them, and each value reaches the member of its name."""

import ast
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import illada
from illada._native import native
from illada.ops import raw
from illada.ops.op_types import RemaskStatus, TokenSample
from illada.ops.raw import attention, launch, loss, sampling

ROOT = Path(__file__).resolve().parents[2]
PARAMS = {
    "attention.h": {
        "PlanParams": "attention_plan_cpu",
        "ForwardParams": "varlen_attention",
        "BackwardParams": "varlen_attention_backward",
    },
    "cuda.h": {"CudaLaunch": "launch"},
    "linear_loss.h": {"LinearMaskedCrossEntropyParams": "linear_masked_cross_entropy"},
    "loss.h": {
        "MaskedCrossEntropyParams": "masked_cross_entropy",
        "WeightedSumParams": "weighted_sum",
        "ScaleParams": "scale",
    },
    "remask.h": {"RemaskParams": "remask"},
    "sampling.h": {"SampleTokensParams": "sample_tokens", "LinearSampleTokensParams": "linear_sample_tokens"},
}
CASES = [(header, struct, name) for header, structs in PARAMS.items() for struct, name in structs.items()]


def fields_of(name: str) -> list[str]:
    return list(inspect.signature(getattr(native(), name)).parameters)


def members_of(header: str, struct: str) -> set[str]:
    """Return the names of the members of a struct; those of a part (shape, sample) in place of the part."""
    text = re.sub(r"//[^\n]*", "", (ROOT / "csrc/include/illada" / header).read_text())
    body = re.search(rf"struct {struct} {{(.*?)\n}};", text, re.DOTALL)[1]
    names = set()
    for declaration in body.split(";")[:-1]:
        names |= {re.match(r"[\w:\s*]*?(\w+)\s*(=|$)", part.strip())[1] for part in declaration.split(",")}
    for part, of_part in {"shape": "PackShape", "sample": "SampleTokensParams"}.items():
        if part in names:
            names = names - {part} | members_of(header, of_part)
    return names


@pytest.mark.parametrize("header, struct, name", CASES)
def test_each_member_has_a_field(header, struct, name):
    if not hasattr(native(), name):
        pytest.skip("needs a build with CUDA")
    without = {"workspace_bytes"}  # the workspace tells
    if struct == "LinearSampleTokensParams":
        without |= {"logits", "logits_row_stride", "num_threads"}
    fields = fields_of(name)
    assert set(fields) == members_of(header, struct) - without
    assert len(set(fields)) == len(fields)


def native_calls():
    """Yield (file and line, name, call) of each call `native().name(...)` in the package."""
    for path in sorted((ROOT / "python/illada").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value
                if isinstance(owner, ast.Call) and isinstance(owner.func, ast.Name) and owner.func.id == "native":
                    yield f"{path.name}:{node.lineno}", node.func.attr, node


def test_python_passes_names_that_exist():
    seen = set()
    for place, name, call in native_calls():
        function = getattr(native(), name, None)
        if function is None or not getattr(function, "__text_signature__", None):  # of CUDA; of pybind11
            continue
        assert not call.args, f"{place}: {name} takes keywords"
        names = {keyword.arg for keyword in call.keywords} - {None}
        assert names <= set(fields_of(name)), place
        seen.add(name)
    assert len(seen) >= 6


def test_other_arguments_are_refused():
    weighted_sum = native().weighted_sum_cpu
    with pytest.raises(TypeError, match=r"^weighted_sum_cpu\(\) takes keyword arguments only$"):
        weighted_sum(torch.ones(3), torch.ones(3), 3, 1.0, torch.empty(()))
    with pytest.raises(TypeError, match=r"^weighted_sum_cpu\(\) has no argument 'rows'$"):
        weighted_sum(nll=None, rows=3)
    wrong = {"num_rows": (3.0, 2**63, torch.ones(3)), "nll": ("x", 1.5), "scale": ("x", None)}
    for name, values in wrong.items():
        for value in values:
            with pytest.raises((TypeError, AttributeError), match=name if name != "nll" else "data_ptr"):
                weighted_sum(**{name: value})
    with pytest.raises(TypeError, match="targets_are_int64"):
        native().masked_cross_entropy(targets_are_int64=1)
    with pytest.raises(TypeError, match="num_threads"):
        native().masked_cross_entropy(num_threads=2**31)
    for value in (-1, (0, 0, True), "cuda"):
        with pytest.raises(TypeError, match="launch"):
            native().masked_cross_entropy(launch=value)
    with pytest.raises(TypeError, match="nll") as error:  # address 0 is that of a field left out
        weighted_sum(nll=torch._efficientzerotensor(3))
    assert "must be a tensor with memory" in str(error.value.__cause__)
    with pytest.raises(ValueError, match="cu_seqlens and plan must not be null"):
        native().attention_plan_cpu()


# Sizes that differ from one another, so that no two can change places unseen.
ROWS, VOCAB, TOKENS = 3, 7, 5
QUERIES, KEYS, HEADS, GROUPS, DIM = 6, 9, 4, 2, 8


class Recorder:
    """The native module, which remembers the keywords of each call before it is made."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(**keywords):
            self.calls.append((name, keywords))
            return getattr(native(), name)(**keywords)

        return call


@pytest.fixture
def recorder(monkeypatch):
    made = Recorder()
    for module in (attention, launch, loss, sampling):
        monkeypatch.setattr(module, "native", lambda: made)
    return made


@pytest.fixture
def tensors():
    def number(*shape):
        return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)))

    t = SimpleNamespace()
    t.logits, t.grad = number(ROWS, 11)[:, :VOCAB], torch.empty(ROWS, 13)[:, :VOCAB]
    t.targets, t.token_weights = torch.arange(1, TOKENS + 1), number(TOKENS)
    t.rows = torch.tensor([4, 0, 2], dtype=torch.int32)
    t.nll, t.lse, t.target_logit = (torch.empty(ROWS) for _ in range(3))
    t.lse_parts, t.normalizer, t.loss = torch.empty(ROWS, 2), torch.tensor(2.0), torch.empty(())
    t.dlse, t.dloss = number(ROWS), torch.tensor(0.5)
    t.q, t.dout, t.out, t.dq = (number(QUERIES, HEADS, DIM) + n for n in range(4))
    t.k, t.v, t.dk, t.dv = (number(KEYS, GROUPS, DIM) + n for n in range(4))
    t.attention_lse, t.attention_dlse = torch.zeros(HEADS, QUERIES), number(HEADS, QUERIES)
    t.plan = torch.tensor([[0, QUERIES, 0, KEYS]], dtype=torch.int32)
    t.sample = TokenSample(torch.zeros(ROWS, dtype=torch.int64), *(torch.zeros(ROWS) for _ in range(4)))
    t.temperatures, t.seeds = number(ROWS), torch.tensor([5, 6, 7])
    t.steps, t.row_ids = torch.tensor([1, 2, 3], dtype=torch.int32), torch.tensor([9, 8, 7])
    t.bias_ids, t.bias_values = torch.tensor([[1, -1]] * ROWS, dtype=torch.int32), number(ROWS, 2)
    t.top_ks, t.top_ps = torch.tensor([2, 3, 4], dtype=torch.int32), number(ROWS)
    t.tokens, t.cu_rows = torch.full((TOKENS,), 6), torch.tensor([0, ROWS], dtype=torch.int32)
    t.candidates, t.confidence, t.entropy = torch.tensor([1, 2, 3]), number(ROWS), number(ROWS)
    t.limits, t.end_ids = torch.tensor([2], dtype=torch.int32), torch.tensor([2, 3])
    t.status = RemaskStatus(
        *(torch.zeros(1, dtype=torch.int32) for _ in range(2)), *(torch.zeros(1, dtype=torch.bool) for _ in range(2))
    )
    return t


def cross_entropy_fields(t):
    return {
        "logits": t.logits, "logits_row_stride": 11, "num_rows": ROWS, "vocab_size": VOCAB, "vocab_start": 1,
        "dtype": 0, "rows": t.rows, "targets": t.targets, "targets_are_int64": True, "token_weights": t.token_weights,
        "num_tokens": TOKENS, "scale": 0.25, "normalizer": t.normalizer, "lse_parts": t.lse_parts, "grad": t.grad,
        "grad_row_stride": 13,
    }  # fmt: skip


def attention_fields(t):
    return {
        "total_q": QUERIES, "total_k": KEYS, "num_sequences": 1, "num_heads": HEADS, "num_kv_heads": GROUPS,
        "head_dim": DIM, "dtype": 0, "q": t.q, "k": t.k, "v": t.v, "softmax_scale": 0.3, "plan": t.plan,
        "plan_rows": 1, "out": t.out, "lse": t.attention_lse,
    }  # fmt: skip


def masked_cross_entropy(t):
    raw.masked_cross_entropy(
        t.logits, t.targets, t.token_weights, rows=t.rows, nll=t.nll, lse=t.lse, lse_parts=t.lse_parts,
        target_logit=t.target_logit, grad=t.grad, normalizer=t.normalizer, scale=0.25, vocab_start=1,
    )  # fmt: skip
    outputs = {"nll": t.nll, "lse": t.lse, "target_logit": t.target_logit}
    return {**cross_entropy_fields(t), **outputs, "workspace": None}


def masked_cross_entropy_backward(t):
    raw.masked_cross_entropy(t.logits, t.targets, t.token_weights, rows=t.rows, lse_parts=t.lse_parts, vocab_start=1)
    raw.masked_cross_entropy_backward(
        t.grad, t.logits, t.targets, t.token_weights, t.lse_parts, rows=t.rows, dloss=t.dloss, dlse=t.dlse,
        normalizer=t.normalizer, scale=0.25, vocab_start=1,
    )  # fmt: skip
    return {**cross_entropy_fields(t), "dlse": t.dlse, "dloss": t.dloss}


def weighted_sum_cpu(t):
    nll = t.token_weights + 1
    raw.weighted_sum(t.loss, nll, t.token_weights, normalizer=t.normalizer, scale=0.25)
    fields = {"nll": nll, "token_weights": t.token_weights, "num_rows": TOKENS, "loss": t.loss}
    return {**fields, "scale": 0.25, "normalizer": t.normalizer}


def varlen_attention(t):
    raw.varlen_attention(t.out, t.attention_lse, t.q, t.k, t.v, t.plan, 1, 0.3)
    return {**attention_fields(t), "workspace": None}


def varlen_attention_backward(t):
    raw.varlen_attention(t.out, t.attention_lse, t.q, t.k, t.v, t.plan, 1, 0.3)
    raw.varlen_attention_backward(
        t.dq, t.dk, t.dv, t.dout, t.attention_dlse, t.q, t.k, t.v, t.out, t.attention_lse, t.plan, 1, 0.3,
        deterministic=True,
    )  # fmt: skip
    flags = {"deterministic": True, "recompute_scores_for_dq": False, "workspace": None}
    return {
        **attention_fields(t), **flags, "dout": t.dout, "dlse": t.attention_dlse, "dq": t.dq, "dk": t.dk, "dv": t.dv
    }  # fmt: skip


def sample_tokens(t):
    values = {
        "temperature": 0.5, "seed": 17, "step": 2**31 + 4, "temperatures": t.temperatures, "seeds": t.seeds,
        "steps": t.steps, "row_ids": t.row_ids, "bias_ids": t.bias_ids, "bias_values": t.bias_values, "measure": 1,
        "top_k": 3, "top_p": 0.75, "top_ks": t.top_ks, "top_ps": t.top_ps, "confidence_at_temperature": True,
        "workspace": None,
    }  # fmt: skip
    raw.sample_tokens(t.sample, t.logits, **values)
    sizes = {"logits_row_stride": 11, "num_rows": ROWS, "vocab_size": VOCAB, "bias_count": 2, "bias_row_stride": 2}
    return {**values, **sizes, **t.sample._asdict(), "logits": t.logits, "dtype": 0}


def remask(t):
    raw.remask(
        t.status, t.tokens, t.rows, t.cu_rows, t.candidates, t.confidence, t.entropy, 0, 1.0, t.limits, 6, 2, t.end_ids
    )
    return {
        "tokens": t.tokens, "tokens_are_int64": True, "num_tokens": TOKENS, "rows": t.rows, "cu_rows": t.cu_rows,
        "num_rows": ROWS, "num_sequences": 1, "token": t.candidates, "confidence": t.confidence, "entropy": t.entropy,
        "rule": 0, "limit": 1.0, "limits": t.limits, "mask_id": 6, "min_commit": 2, "end_ids": t.end_ids,
        "num_end_ids": 2, **t.status._asdict(),
    }  # fmt: skip


CALLS = [
    masked_cross_entropy, masked_cross_entropy_backward, weighted_sum_cpu, varlen_attention, varlen_attention_backward,
    sample_tokens, remask,
]  # fmt: skip


def same(a, b) -> bool:
    return a is b if isinstance(a, torch.Tensor) or a is None else type(a) is type(b) and a == b


@pytest.mark.parametrize("call", CALLS)
def test_raw_passes_each_value_under_its_name(call, recorder, tensors):
    want = call(tensors)
    name, got = recorder.calls[-1]
    assert name == call.__name__
    if "num_threads" in got:
        want["num_threads"] = torch.get_num_threads()
    if "launch" in got:
        want["launch"] = None
    assert set(got) == set(want)
    assert {field for field in want if not same(got[field], want[field])} == set()


@pytest.mark.parametrize("call", CALLS)
def test_the_order_of_names_is_free(call, recorder, tensors):
    call(tensors)
    name, keywords = recorder.calls[-1]
    outputs = [value for value in keywords.values() if isinstance(value, torch.Tensor)]
    inputs = [value.clone() for value in outputs]
    if name == "remask":
        tensors.tokens.fill_(6)
        inputs = [value.clone() for value in outputs]
    getattr(native(), name)(**keywords)
    want = [value.clone() for value in outputs]
    for value, before in zip(outputs, inputs, strict=True):
        value.copy_(before)
    getattr(native(), name)(**dict(reversed(keywords.items())))
    assert all(torch.equal(a, b) for a, b in zip(outputs, want, strict=True))


def test_a_plan_is_made_of_its_names():
    """On a CPU the op calls the native function itself."""
    starts, starts_k = torch.tensor([0, 2, 6], dtype=torch.int32), torch.tensor([0, 4, 9], dtype=torch.int32)
    used = torch.tensor([3, 5], dtype=torch.int32)
    plan = illada.attention_plan(
        starts, cu_seqlens_k=starts_k, seqused_k=used, num_heads=4, num_kv_heads=2, head_dim=8, total_q=6
    )
    assert sorted(plan.work[:2].tolist()) == [[0, 2, 0, 3], [2, 6, 4, 9]]


def test_left_out_fields_keep_their_default():
    total = torch.empty(())
    native().weighted_sum_cpu(nll=torch.ones(3), token_weights=torch.ones(3), num_rows=3, loss=total)
    assert total == 3
