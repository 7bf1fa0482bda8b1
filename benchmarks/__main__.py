"""python -m benchmarks BENCH: run one benchmark, print a table, write JSON lines and a plot."""

from __future__ import annotations

import argparse
import importlib
import sys

#: Command to module; each has `cases() -> list[Case]` and `goals(records) -> list[Goal]`.
BENCHES = {"remask": "benchmarks.remask", "train-step": "benchmarks.train_step"}


def main(arguments: list[str] | None = None) -> int:
    """0: done. 1: --check and a goal was missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time illada against its peers in one process, interleaved, and compare errors and memory.",
        epilog="example:\n  python -m benchmarks remask --json out.jsonl --plot out.png\n"
        "  python -m benchmarks train-step --provider illada --repeats 3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bench", choices=BENCHES)
    parser.add_argument("--only", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument("--provider", action="append", metavar="NAME", help="this provider only; may be repeated")
    parser.add_argument("--repeats", type=int, metavar="N", help="timed calls of each provider (default: the bench's)")
    parser.add_argument("--json", metavar="PATH", help="append one JSON line for each case and provider")
    parser.add_argument("--plot", metavar="PATH", help="draw the medians as bars (needs matplotlib)")
    parser.add_argument("--check", action="store_true", help="exit 1 where a goal of the bench is missed")
    options = parser.parse_args(arguments)
    from benchmarks import runner

    bench = importlib.import_module(BENCHES[options.bench])
    cases = [case for case in bench.cases() if options.only is None or options.only in case.name]
    if not cases:
        parser.error(
            f"no case of {options.bench} contains {options.only!r}: {', '.join(c.name for c in bench.cases())}"
        )
    records = runner.run(options.bench, cases, providers=options.provider, repeats=options.repeats)
    runner.print_table(records)
    if options.json:
        runner.write_json(records, options.json)
    if options.plot:
        runner.plot(records, options.plot)
    goals = bench.goals(records)
    for goal in goals:
        print(f"{'met   ' if goal.met else 'MISSED'} {goal.text}")
    return 1 if options.check and not all(goal.met for goal in goals) else 0


if __name__ == "__main__":
    sys.exit(main())
