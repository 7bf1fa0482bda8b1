"""A whole step (sample and commit) in a CUDA graph and on other streams. Capture fails on any host synchronisation."""

import pytest
import torch

import illada
from illada.ops import raw
from illada.ops.op_types import RULES, RemaskStatus, TokenSample

MASK = 5
LENGTHS = (7, 0, 12, 3)


class Step:
    """The static buffers of one step; everything that changes between steps is on the device."""

    def __init__(self, device, vocab=9000):
        rows = sum(LENGTHS)
        self.logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device=device)
        self.tokens = torch.full((40,), MASK, device=device)
        self.rows = torch.arange(2, 2 + rows, dtype=torch.int32, device=device)
        self.cu_rows = torch.tensor([0, *LENGTHS]).cumsum(0).int().to(device)
        self.temperatures, self.seeds = (
            torch.zeros(rows, device=device),
            torch.zeros(rows, dtype=torch.int64, device=device),
        )
        self.steps = torch.zeros(rows, dtype=torch.int32, device=device)
        self.row_ids = torch.arange(rows, device=device)
        self.quota = torch.zeros(len(LENGTHS), dtype=torch.int32, device=device)
        self.ends = torch.tensor([17, 8000], device=device)
        self.bias = (
            torch.tensor([3, -1], dtype=torch.int32, device=device),
            torch.tensor([-torch.inf, 0.0], device=device),
        )
        self.sample = TokenSample(self.seeds.clone(), *(self.temperatures.clone() for _ in range(4)))
        self.status = RemaskStatus(
            *(self.quota.clone().to(d) for d in (torch.int32, torch.int32, torch.bool, torch.bool))
        )
        size = raw.sample_tokens_workspace(rows, vocab, self.logits.device)
        self.workspace = torch.empty(size, dtype=torch.uint8, device=device)

    def set(self, number):
        """Set new contents of every input, as the host does between two steps."""
        generator = torch.Generator().manual_seed(number)
        self.logits.copy_(torch.randn(self.logits.shape, generator=generator))
        self.tokens.copy_(torch.where(torch.rand(40, generator=generator) < 0.8, MASK, 30))
        self.temperatures.copy_(torch.rand(len(self.seeds), generator=generator).round(decimals=1))
        self.seeds.copy_(torch.randint(-(2**62), 2**62, self.seeds.shape, generator=generator))
        self.steps.fill_(number)
        self.quota.copy_(torch.randint(0, 5, self.quota.shape, generator=generator))

    def run_public(self):
        self.sample = illada.sample_tokens(
            self.logits, temperature=self.temperatures, seed=self.seeds, step=self.steps, row_ids=self.row_ids,
            logit_bias=self.bias, extras=("entropy", "margin"),
        )  # fmt: skip
        self.status = illada.remask(
            self.tokens, self.rows, self.cu_rows, self.sample, quota=self.quota, mask_id=MASK, end_ids=self.ends,
            return_status=True,
        )  # fmt: skip

    def run_raw(self):
        per_row = (self.temperatures, self.seeds, self.steps, self.row_ids)
        raw.sample_tokens(self.sample, self.logits, 0.0, 0, 0, *per_row, *self.bias, 0, workspace=self.workspace)
        raw.remask(
            self.status, self.tokens, self.rows, self.cu_rows, self.sample.token, self.sample.confidence, None,
            RULES.index("quota"), 0.0, self.quota, MASK, 1, self.ends,
        )  # fmt: skip

    def results(self):
        return [t.clone() for t in (self.tokens, *self.sample, *self.status)]


@pytest.mark.parametrize("how", ["run_public", "run_raw"])
def test_step_in_a_graph(how, device):
    captured, eager = Step(device), Step(device)
    captured.set(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        getattr(captured, how)()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        getattr(captured, how)()
    seen = []
    for number in range(1, 5):
        captured.set(number)
        eager.set(number)
        graph.replay()
        eager.run_public()
        for got, want in zip(captured.results(), eager.results(), strict=True):
            assert torch.equal(got, want)
        seen.append(captured.tokens.tolist())
    assert len({str(tokens) for tokens in seen}) == 4  # the replays did see their inputs


@pytest.mark.parametrize("rule", [{"threshold": 0.3}, {"factor": 1.2}, {"entropy_bound": 4.0}], ids=str)
def test_every_rule_can_be_captured(rule, device):
    step = Step(device, vocab=50)
    (name, limit), limits = next(iter(rule.items())), torch.zeros(len(LENGTHS), device=device)

    def run():
        sample = illada.sample_tokens(step.logits, temperature=0.5, seed=3, extras=("entropy",))
        return illada.remask(step.tokens, step.rows, step.cu_rows, sample, mask_id=MASK, **{name: limits})

    step.set(1)
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        committed = run()
    for scale in (0.0, 1.0, 3.0):
        limits.fill_(limit * scale)
        step.set(2)
        graph.replay()
        got, got_tokens = committed.clone(), step.tokens.clone()
        step.set(2)
        assert torch.equal(run(), got) and torch.equal(step.tokens, got_tokens)


def test_work_is_enqueued_on_the_current_stream(device):
    step, other = Step(device), Step(device)
    step.set(3)
    step.run_public()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        other.set(3)
        other.run_public()
        results = other.results()
    stream.synchronize()
    for got, want in zip(results, step.results(), strict=True):
        assert torch.equal(got, want)
    # A capture records what goes to its own stream alone: one whose calls went elsewhere would replay nothing.
    graph, captured = torch.cuda.CUDAGraph(), Step(device)
    captured.set(1)
    captured.run_raw()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        captured.run_raw()
    captured.set(3)
    graph.replay()
    assert torch.equal(captured.tokens, step.tokens)
