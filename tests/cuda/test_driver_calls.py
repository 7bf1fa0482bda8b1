"""What a launch costs the host: how often CUDA is asked about pointers and encodes tensor maps, and that what is wrong
is refused all the same."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

import illada
from illada._native import native
from illada.ops import raw
from illada.ops.op_types import RemaskStatus, TokenSample

BF16 = torch.bfloat16
ROOT = Path(__file__).resolve().parents[2]


class Counted:
    """The calls of CUDA within the context, counted by purpose."""

    def __enter__(self):
        self.before = native().driver_calls()
        return self

    def __exit__(self, *_):
        self.calls = {name: count - self.before[name] for name, count in native().driver_calls().items()}

    def __getitem__(self, name):
        return self.calls[name]


def make_calls(device) -> dict[str, dict]:
    """A legal call of each raw function with all tensors that it may take: its keywords."""
    has_sm90 = torch.cuda.get_device_capability(device) == (9, 0)

    def floats(*shape, dtype=torch.float32):
        return torch.ones(shape, dtype=dtype, device=device)

    def ints(*values, dtype=torch.int32):
        return torch.tensor(values, dtype=dtype, device=device)

    def bytes_of(size):
        return torch.empty(size, dtype=torch.uint8, device=device)

    rows, vocab, dim = 3, 20000, 64
    per_row = {"temperatures": floats(rows), "seeds": ints(1, 2, 3, dtype=torch.int64), "steps": ints(1, 2, 3)}
    per_row |= {"row_ids": ints(1, 2, 3, dtype=torch.int64), "bias_ids": ints(1, 2), "bias_values": floats(2)}

    def sample():
        return TokenSample(ints(7, 7, 7, dtype=torch.int64), *(floats(rows) for _ in range(4)))

    logits, hidden, weight = floats(rows, vocab), floats(rows, dim, dtype=BF16), floats(300, dim, dtype=BF16)
    tokens = {"targets": ints(1, 2, 3, dtype=torch.int64), "token_weights": floats(rows), "rows": ints(0, 1, 2)}
    size = raw.sample_tokens_workspace(rows, vocab, logits.device)
    calls = {"sample_tokens": {"out": sample(), "logits": logits, **per_row, "workspace": bytes_of(size)}}
    size = raw.masked_cross_entropy_workspace(rows, vocab, logits.device)
    results = {name: floats(rows) for name in ("nll", "lse", "target_logit")} | {"lse_parts": floats(rows, 2)}
    calls["masked_cross_entropy"] = {
        "logits": logits, **tokens, **results, "grad": floats(rows, vocab), "normalizer": floats(),
        "workspace": bytes_of(size),
    }  # fmt: skip
    calls["masked_cross_entropy_backward"] = {
        "grad": floats(rows, vocab), "logits": logits, **tokens, "lse_parts": floats(rows, 2), "dloss": floats(),
        "dlse": floats(rows), "normalizer": floats(),
    }  # fmt: skip
    calls["weighted_sum"] = {
        "loss": floats(), "nll": floats(rows), "token_weights": floats(rows), "normalizer": floats(),
    }  # fmt: skip
    calls["scale"] = {"data": floats(rows), "factor": floats()}
    if has_sm90:
        listed = ints(0, 1, 2)
        size = raw.linear_sample_tokens_workspace(hidden, weight, listed)
        calls["linear_sample_tokens"] = {
            "out": sample(), "hidden": hidden, "weight": weight, "rows": listed, **per_row,
            "workspace": bytes_of(size),
        }  # fmt: skip
        size = raw.linear_masked_cross_entropy_workspace(hidden, weight, listed)
        calls["linear_masked_cross_entropy"] = {
            "nll": floats(rows), "hidden": hidden, "weight": weight, **tokens, "normalizer": floats(),
            "hidden_grad": floats(rows, dim, dtype=BF16), "weight_grad": floats(300, dim),
            "workspace": bytes_of(size),
        }  # fmt: skip

    heads, pack = (4, 2, dim), (6, 6, 2)  # queries, keys, sequences
    lengths = {"cu_seqlens": ints(0, 2, 6), "cu_seqlens_k": ints(0, 3, 6), "seqused_k": ints(3, 2)}
    plan = torch.zeros(raw.attention_plan_rows(*pack, *heads), 4, dtype=torch.int32, device=device)
    calls["attention_plan"] = {
        "out": plan, **lengths, "total_q": 6, "total_k": 6, "num_heads": 4, "num_kv_heads": 2, "head_dim": dim,
    }  # fmt: skip
    q, out, dout = (floats(6, 4, dim, dtype=BF16) for _ in range(3))
    k, v = (floats(6, 2, dim, dtype=BF16) for _ in range(2))
    lse, number = floats(4, 6), {"num_sequences": 2, "softmax_scale": 0.125}
    size = raw.varlen_attention_workspace(6, 2, *heads)
    calls["varlen_attention"] = {
        "out": out, "lse": lse, "q": q, "k": k, "v": v, "plan": plan, **number, "workspace": bytes_of(size),
    }  # fmt: skip
    for recompute in (False, True):
        size = raw.varlen_attention_backward_workspace(*pack, *heads, False, recompute, 0)
        calls[f"varlen_attention_backward {recompute}"] = {
            "dq": torch.empty_like(q), "dk": torch.empty_like(k), "dv": torch.empty_like(v), "dout": dout,
            "dlse": floats(4, 6), "q": q, "k": k, "v": v, "out": out, "lse": lse, "plan": plan, **number,
            "workspace": bytes_of(size), "recompute_scores_for_dq": recompute,
        }  # fmt: skip
    calls["remask"] = {
        "out": RemaskStatus(*(floats(2).to(d) for d in (torch.int32, torch.int32, torch.bool, torch.bool))),
        "tokens": ints(-1, -1, -1, 4, dtype=torch.int64), "rows": ints(0, 1, 2), "cu_rows": ints(0, 2, 3),
        "token": ints(1, 2, 3, dtype=torch.int64), "confidence": floats(rows), "entropy": floats(rows), "rule": 0,
        "limit": 0.0, "limits": ints(1, 1), "mask_id": -1, "min_commit": 1,
        "end_ids": ints(3, dtype=torch.int64),
    }  # fmt: skip
    return calls


def call(name: str, keywords: dict) -> None:
    getattr(raw, name.split()[0])(**keywords)


def tensors_of(keywords: dict) -> list[tuple[str, str | None]]:
    """The names of all tensors, those in a tuple with their field's."""
    names: list[tuple[str, str | None]] = []
    for name, value in keywords.items():
        if isinstance(value, Tensor):
            names.append((name, None))
        elif isinstance(value, tuple):
            names += [(name, field) for field in value._fields]
    return names


@pytest.fixture(scope="module")
def calls(device):
    made = make_calls(device)
    for name, keywords in made.items():  # kernels are loaded, maps encoded
        call(name, keywords)
    return made


@pytest.fixture
def unchecked(monkeypatch):
    """The raw calls as C++ makes them, who has addresses and no tensors."""
    launch = native().launch

    def without(**fields):
        return launch(**{**fields, "pointers_checked": False})

    monkeypatch.setattr(native(), "launch", without)


def test_of_tensors_nothing_is_asked_and_nothing_is_encoded_again(calls):
    for name, keywords in calls.items():
        with Counted() as counted:
            call(name, keywords)
        assert counted["launches"] > 0
        assert counted.calls == {**dict.fromkeys(counted.calls, 0), "launches": counted["launches"]}, name


def test_of_addresses_each_is_asked_about_once(calls, unchecked):
    for name, keywords in calls.items():
        with Counted() as counted:
            call(name, keywords)
        given = tensors_of(keywords)
        unused = ("workspace",) if name == "masked_cross_entropy" else ()  # one kernel does without
        assert counted["pointer_queries"] == len([1 for it, _ in given if it not in unused]), name
        assert counted["capture_queries"] == 1 and counted["tensor_maps"] == 0, name


def test_during_capture_nothing_is_asked(calls, unchecked, device):
    for name, keywords in calls.items():
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with Counted() as captured, torch.cuda.graph(graph, stream=side):
            call(name, keywords)
        assert captured["launches"] > 0 and captured["pointer_queries"] == 0, name
        with Counted() as replayed:
            graph.replay()
        assert not any(replayed.calls.values()), name


@pytest.mark.parametrize("way", ["tensors", "addresses"])
def test_each_tensor_on_the_host_is_refused(way, calls, request):
    """Every one of every call: a list of what is checked in Python could leave one out."""
    if way == "addresses":
        request.getfixturevalue("unchecked")
    messages = "must be device memory, got a pointer to host memory|are on the CPU|is on the CPU|takes CUDA tensors"
    for name, keywords in calls.items():
        for argument, field in tensors_of(keywords):
            if name == "masked_cross_entropy" and argument == "workspace":
                continue  # one kernel does without: nobody looks
            value = keywords[argument]
            wrong = value.cpu() if field is None else value._replace(**{field: getattr(value, field).cpu()})
            with Counted() as counted, pytest.raises(ValueError, match=messages):
                call(name, {**keywords, argument: wrong})
            assert counted["launches"] == 0, (name, argument, field)


def test_public_functions_ask_nothing(device):
    """A step of training and one of generation, forward and backward."""
    hidden = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).to(device, BF16).requires_grad_()
    weight = torch.ones(300, 64, device=device, dtype=BF16).requires_grad_()
    starts = torch.tensor([0, 2, 6], dtype=torch.int32, device=device)
    targets, weights = torch.arange(6, device=device), torch.ones(6, device=device)
    tokens, rows = torch.full((6,), -1, device=device), torch.arange(6, dtype=torch.int32, device=device)
    with Counted() as counted:
        x = hidden.unflatten(1, (1, 64))
        attended = illada.varlen_attention(x, x, x, starts).flatten(1)
        (illada.linear_masked_cross_entropy(attended, weight, targets, weights) / 2).backward()
        illada.masked_cross_entropy((hidden @ weight.t()).detach().requires_grad_(), targets, weights).backward()
        sample = illada.linear_sample_tokens(hidden.detach(), weight.detach(), rows=rows, temperature=1.0)
        illada.remask(tokens, rows, starts, sample, quota=1, mask_id=-1)
        illada.sample_tokens((hidden @ weight.t()).detach())
    assert counted["launches"] >= 10
    assert counted["pointer_queries"] == counted["capture_queries"] == 0


def test_maps_of_other_shapes_at_the_same_address_are_their_own(device):
    """The same memory as other numbers of tokens and heads, in turn and again: each gives what it gave at first."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("tensor maps are of sm_90a")
    memory = torch.randn(3, 24 * 128, generator=torch.Generator().manual_seed(0)).to(device, BF16)
    starts = {n: torch.tensor([0, 5, n], dtype=torch.int32, device=device) for n in (6, 12, 24)}
    first: dict[tuple[int, int, int], Tensor] = {}
    for turn in range(2):
        with Counted() as counted:
            for tokens, heads, dim in ((24, 2, 64), (24, 1, 128), (12, 2, 128), (12, 4, 64), (6, 4, 128)):
                q, k, v = (x.view(tokens, heads, dim) for x in memory)
                out = illada.varlen_attention(q, k, v, starts[tokens])
                assert torch.equal(out, first.setdefault((tokens, heads, dim), out))
        # Later the maps of q, k and v are known; those of the results are not, which are elsewhere.
        assert 5 < counted["tensor_maps"] if turn == 0 else counted["tensor_maps"] <= 5


def test_maps_from_the_cache_are_those_of_the_driver(device, nvcc, tmp_path):
    """tests/cpp/tensor_maps.cu: more maps than the cache holds, from several threads, and what a hit costs."""
    program, common = tmp_path / "tensor_maps", ROOT / "csrc" / "common"
    sources = (ROOT / "tests" / "cpp" / "tensor_maps.cu", common / "tensor_map.cpp", common / "driver_calls.cpp")
    folders = (f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}")
    subprocess.run([nvcc, "-std=c++17", "-O2", "-cudart", "shared", *folders, *sources, "-o", program], check=True)
    toolkit = Path(nvcc).resolve().parents[1]
    libraries = [os.environ.get("LD_LIBRARY_PATH", ""), str(toolkit / "lib64"), str(toolkit / "lib")]
    environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries))}
    done = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=120)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5000 maps, in 4 threads: all as the driver encodes them" in done.stdout
