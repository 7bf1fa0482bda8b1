"""A comparison of this run with an earlier one, row by row.

A row is slower if it became so by more than the noise of both.

    same      the intervals of both runs overlap
    SLOWER    the whole interval of this run is above that of the earlier one
    FASTER    it is below

A row's interval reaches from p20 to p80, and at least as far from the median as so few calls can tell (NOISE). Where
the peers of the same case (without any, of all cases) took longer as well, so did the machine: under the same torch
their code is the same. Ours is judged against that.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import report
from .runner import Goal, is_ours, once, ratio

Records = Sequence[dict[str, Any]]

SAME, SLOWER, FASTER = "same", "SLOWER", "FASTER"
#: (calls, least half-width of the interval as a share of the median), each for rows of fewer calls than that.
NOISE = ((2, 0.2), (5, 0.1), (float("inf"), 0.03))
#: A row that took this many times as long, but is within the noise, is named.
UNCLEAR = 1.25
#: The least number of rows of peers, over all cases, from which the machine's share is judged.
LEAST_PEERS = 3


def interval(record: dict[str, Any]) -> tuple[float, float]:
    """Return the milliseconds between which the median of a repeated run is expected."""
    ms = record["median_ms"]
    known = record["n"] or (1 if once(record) else 5)
    noise = ms * next(share for calls, share in NOISE if known < calls)
    low, high = (ms if record[key] is None else record[key] for key in ("p20_ms", "p80_ms"))
    return min(low, ms - noise), max(high, ms + noise)


@dataclass(frozen=True)
class Line:
    """A row that both runs have."""

    record: dict[str, Any]
    before: dict[str, Any]
    machine: float  # how many times longer everything takes now

    @property
    def ratio(self) -> float:
        """This run's time divided by the earlier one's."""
        return self.record["median_ms"] / self.before["median_ms"]

    @property
    def verdict(self) -> str:
        """The row's verdict: slower (also beyond the machine's share), faster or the same."""
        (low, high), (low_before, high_before) = interval(self.record), interval(self.before)
        if low > high_before * max(self.machine, 1):
            return SLOWER
        return FASTER if high < low_before else SAME


def key(record: dict[str, Any]) -> tuple[Any, ...]:
    """Return what must be the same in both runs for rows to be compared.

    The oldest files name no timing: it was the clock.
    """
    return record["bench"], record["case"], record["provider"], record["timing"] or "clock"


def compare(records: Records, before: Records) -> list[Line]:
    """Return the rows that both runs have; of several earlier ones the last."""
    old = {key(r): r for r in before if r["median_ms"]}
    pairs = [(r, old[key(r)]) for r in records if r["median_ms"] and key(r) in old]
    peers = [(new, new["median_ms"] / was["median_ms"]) for new, was in pairs if _is_yardstick(new, was)]
    whole = statistics.median(times for _, times in peers) if len(peers) >= LEAST_PEERS else 1.0

    def machine(record: dict[str, Any]) -> float:
        beside = [times for new, times in peers if key(new)[:2] == key(record)[:2]]
        return statistics.median(beside) if beside else whole

    return [Line(new, was, machine(new) if is_ours(new["provider"]) else 1.0) for new, was in pairs]


def _is_yardstick(now: dict[str, Any], before: dict[str, Any]) -> bool:
    """Return whether the ratio of two times tells of the machine.

    It does for a peer, whose own code is the same, where each time is of several calls.
    """
    return not is_ours(now["provider"]) and now["torch"] == before["torch"] and not once(now) and not once(before)


def differences(records: Records, before: Records) -> list[str]:
    """Return the other differences between both runs that a time may depend on."""
    found = []
    for name in ("device", "threads", "torch", "driver", "variants"):
        old, new = ({str(r[name]) for r in run if r.get(name) is not None} for run in (before, records))
        if old and new and old != new:
            found.append(f"{name}: {', '.join(sorted(old))} before, {', '.join(sorted(new))} now")
    old_loads, new_loads = ([r["load"] for r in run if r.get("load") is not None] for run in (before, records))
    if old_loads and new_loads:
        old_load, new_load = max(old_loads), max(new_loads)
        if max(old_load, new_load) > 1.5 * min(old_load, new_load) + 1:
            found.append(f"load: up to {old_load:g} before, up to {new_load:g} now")
    return found


def table(lines: Sequence[Line]) -> str:
    """Return the lines as a Markdown table."""
    rows = ["| case | provider | before ms | now ms | now / before | |", "| --- | --- | ---: | ---: | ---: | --- |"]
    for x in lines:
        timing = ", graph" if x.record["timing"] == "graph" else ""
        times = f"{x.before['median_ms']:.4f} | {x.record['median_ms']:.4f} | {x.ratio:.2f}"
        rows.append(f"| {x.record['case']} | {x.record['provider']}{timing} | {times} | {x.verdict} |")
    return "\n".join(rows)


def show(records: Records, before: Records, name: str) -> int:
    """Print the comparison and return the exit status.

    0: nothing of ours is slower. 1: something is. 2: nothing is in both runs.
    """
    lines = compare(records, before)
    print(f"\n## This run against the earlier one in {name}\n")
    if not lines:
        print("No case and provider is in both runs.")
        return 2
    print(table(lines) + "\n")
    for text in differences(records, before):
        print(f"- not the same in both runs: {text}")
    slowest = max((x.machine for x in lines), default=1.0)
    if slowest > 1.05:
        print(f"- peers took up to {slowest:.2f} times as long as before: the machine did; ours is judged by that")
    absent = {key(r)[:3] for r in before if r["median_ms"]} - {key(r)[:3] for r in records if r["median_ms"]}
    if absent:
        print(f"- {len(absent)} rows of the earlier run were not measured now")
    unclear = [
        x
        for x in lines
        if is_ours(x.record["provider"]) and x.verdict == SAME and x.ratio > UNCLEAR * max(x.machine, 1)
    ]
    for x in unclear:
        print(f"- too noisy to tell, measure again: {x.record['case']}: {x.record['provider']}, {x.ratio:.2f} times")
    slower = [x for x in lines if is_ours(x.record["provider"]) and x.verdict == SLOWER]
    count = {
        verdict: sum(is_ours(x.record["provider"]) and x.verdict == verdict for x in lines)
        for verdict in (SLOWER, SAME, FASTER)
    }
    print(f"- ours: {count[SLOWER]} slower, {count[SAME]} the same, {count[FASTER]} faster")
    return 1 if slower else 0


def peer_goals(records: Records, rivals: Any = None) -> list[Goal]:
    """Return a missed goal for each case and way of timing in which a peer is faster by more than the noise of both.

    rivals: says of a peer's name whether it does the same job; default: all do.
    """
    found = []
    for ours in (r for r in records if r["provider"] == "illada"):
        for peer in records:
            same = peer["case"] == ours["case"] and peer["timing"] == ours["timing"] and not is_ours(peer["provider"])
            if same and (rivals is None or rivals(peer["provider"])) and interval(peer)[1] < interval(ours)[0]:
                times = ratio(records, ours["case"], peer["provider"], timing=ours["timing"])
                found.append(Goal(f"{ours['case']}: {peer['provider']} takes {times:.2f} of our time", False))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status.

    0: nothing of ours is slower. 1: something is. 2: the files have nothing in common, or cannot be read.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.regression",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "before", metavar="OLD.jsonl", help=f"written by `python -m {__package__} BENCH --json OLD.jsonl`"
    )
    parser.add_argument("now", metavar="NEW.jsonl", help="likewise, later")
    options = parser.parse_args(arguments)
    try:
        before, now = (report.read_json(path) for path in (options.before, options.now))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return show(now, before, options.before)


if __name__ == "__main__":
    from illada.cli import guarded

    sys.exit(guarded(main))
