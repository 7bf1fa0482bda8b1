"""A short comparison of illada with its peers, the most wanted results first.

The peers are cuDNN and flash of torch, fa3-fwd, Liger and cuBLAS.

A case is timed with all of its providers in turn, in one process; every case has a process of its own. Where ours hangs
or kills it, the case is timed again without ours. What is the same for each run is not in here: `python -m benchmarks
BENCH` has more cases. Compilers take their time, so flex_attention comes last.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import attention, ceiling, dry_run, isolated, jsonl, loss, remask, report, runner, timing
from .attention_providers import Job as AttentionJob
from .attention_providers import equal, listed
from .isolated import OK, SKIPPED, Outcome, Step, Task
from .loss_providers import Job as LossJob
from .runner import Case, is_ours

ATTENTION = ("illada", "illada raw", "illada deterministic", "sdpa flash", "sdpa cudnn", "varlen_attn", "cudnn varlen",
             "fa3", "fa4")  # fmt: skip
LOSS = ("illada", "illada rows", "illada chunk_rows=1024", "illada grad_weight", "eager", "torch chunked", "liger",
        "liger tuned", "liger tuned unweighted", "liger scaled")  # fmt: skip
REMASK = ("illada", "mm+illada")
REPEATS = 10


@dataclass(frozen=True)
class Job:
    """A case of a benchmark with the providers that take part; its tensors are made in the child."""

    bench: str
    case: Case
    providers: Sequence[str]


def jobs(device: torch.device) -> list[Job]:
    """Return a job for each process; in a dry run a small one of each kind."""
    found: list[Job] = []

    def add(bench: str, case: Case, providers: Sequence[str]) -> None:
        found.append(Job(bench, case, providers))

    def attend(direction: str, pack: Any, heads: int, kv_heads: int, dim: int, providers: Sequence[str]) -> None:
        job = AttentionJob(pack, heads, kv_heads, dim, torch.bfloat16, device)
        add("attention", attention.make_case(job, direction, providers), providers)

    if dry_run.ACTIVE:
        for direction in ("fwd", "bwd"):
            attend(direction, equal(2, 40), 2, 1, 64, ("illada", "illada raw", "sdpa flash", "sdpa padded", "fa3"))
        add(
            "loss", loss.make_case(LossJob(100, 0.5, 64, 1000, device=device), names=LOSS), ("illada", "eager", "liger")
        )
        add("remask", remask.sample_case(3, 2000, 0.0, device=device), REMASK)
        return found
    packs = [equal(1, 8192), equal(8, 1024), equal(64, 128), equal(2, 4096)]
    for pack in packs:
        for direction in ("fwd", "bwd"):
            attend(direction, pack, 32, 8, 128, ATTENTION)
        if pack is packs[0]:
            add("loss", loss.make_case(LossJob(8192, 0.5, 4096, 155136, device=device), names=LOSS), LOSS)
    for rows in (128, 32, 1024):
        add("remask", remask.linear_case(rows, 4096, 155136, 0.0, device=device), REMASK)
    for rows, temperature in ((128, 0.0), (1024, 0.0), (128, 1.0), (1024, 1.0)):
        add("remask", remask.sample_case(rows, 155136, temperature, device=device), REMASK)
    for sequences, rows in ((32, 32), (1, 8192)):
        add("remask", remask.commit_case(sequences, rows, "quota", device), REMASK)
    for direction in ("fwd", "bwd"):
        attend(direction, listed(5120, 3072), 32, 8, 128, ATTENTION)
        for pack in (equal(1, 8192), equal(8, 1024)):
            attend(direction, pack, 32, 8, 64, ATTENTION)
    for pack in (packs[0], packs[1]):
        for direction in ("fwd", "bwd"):
            attend(direction, pack, 32, 8, 128, ("illada", "flex"))
    return found


def measure(job: Job, device: torch.device, path: str | None, kernels: str | None, ours: bool) -> list[str]:
    """Time the case in the child and write its records; return the providers left out, with the reason."""
    if dry_run.ACTIVE:
        timing.LEAST_COLD_BYTES = 1 << 20
    left_out: list[str] = []
    providers = [name for name in job.providers if ours or not is_ours(name)]

    def written(records: list[dict[str, Any]]) -> None:
        left_out.extend(f"{r['provider']}: {r['error']}" for r in records if r["median_ms"] is None)
        if path:
            report.write_json(records, path)

    repeats = 2 if dry_run.ACTIVE else REPEATS
    for bench, mine in ((ceiling.BENCH, ceiling.cases([job.case], device)), (job.bench, [job.case])):
        runner.run(
            bench, mine, providers=providers, repeats=repeats, device=device, after_case=written, keep_going=True
        )
    if kernels and ours and not dry_run.ACTIVE:  # no profiler looks into a simulator
        write_kernels(job.case, device, kernels)
    return left_out


def write_kernels(case: Case, device: torch.device, path: str) -> None:
    """Record the time of each of our kernels in one call of the case, with cold caches, for `compare`."""
    provider = next(p for p in case.make() if p.name == "illada")
    if provider.unavailable:
        return
    provider.call()
    found = timing.kernels(provider.call, device)
    jsonl.append(
        path,
        ({"case": case.name, "kernel": name, "us": us, "launches": launches} for name, (us, launches) in found.items()),
    )


def line(outcome: Outcome) -> str:
    """Return the outcome of a case as a line."""
    about = outcome.message or "; ".join(outcome.value or ()) or "all ran"
    return f"{outcome.status:<7} {outcome.seconds:5.1f} s  {outcome.task}: {about}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status.

    0: all that ran ended. 1: a case failed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python -m benchmarks.peers --json out.jsonl && python -m benchmarks.report out.jsonl\n"
        "  python -m benchmarks.peers --only bwd --seconds 60",
    )  # fmt: skip
    parser.add_argument("--json", metavar="PATH", help="append a line for each result, after every case")
    parser.add_argument("--kernels", metavar="PATH", help="append a line for each kernel of ours in each case")
    parser.add_argument("--outcomes", metavar="PATH", help="append a line for each case: did it run?")
    parser.add_argument("--seconds", type=float, default=240, metavar="S", help="for all of it (default 240)")
    parser.add_argument("--limit", type=float, default=60, metavar="S", help="for a case, its process included (60)")
    parser.add_argument("--only", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    options = parser.parse_args(arguments)
    device = torch.device("cuda", 0)
    mine = [job for job in jobs(device) if options.only is None or options.only in job.case.name]
    if not mine:
        parser.error(f"no case contains {options.only!r}; --list names them")
    if options.list:
        print("\n".join(f"{job.case.name}: {', '.join(job.providers)}" for job in mine))
        return 0
    deadline = time.monotonic() + options.seconds
    failed = False
    outcomes: list[Outcome] = []

    def tell(outcome: Outcome) -> None:
        outcomes.append(outcome)
        print(line(outcome), flush=True)
        if options.outcomes:
            jsonl.append(options.outcomes, [vars(outcome)])

    def carry_out(job: Job, ours: bool) -> Outcome:
        def run(known: Mapping[str, Any]) -> list[str]:
            return measure(job, device, options.json, options.kernels, ours)

        name = job.case.name + ("" if ours else ", peers alone")
        (outcome,) = isolated.run(
            [Task(name, [Step("measure", run)])], limit=options.limit, deadline=deadline, prepare=dry_run.prepare,
            report=tell,
        )  # fmt: skip
        return outcome

    for job in mine:
        outcome = carry_out(job, True)
        if outcome.status not in (OK, SKIPPED):
            failed = True
            carry_out(job, False)
    counts = Counter(outcome.status for outcome in outcomes)
    print("cases: " + ", ".join(f"{count} {status}" for status, count in counts.items()))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
