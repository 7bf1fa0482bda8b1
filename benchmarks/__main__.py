"""python -m benchmarks BENCH: run one benchmark, print a table, write JSON lines and a plot."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

#: Command to module; each has `DEVICES`, `cases(device) -> list[Case]` and `goals(records) -> list[Goal]`. Where there
#: are `DIRECTIONS`, `cases` takes one of them as well, and where there is a `SPREAD` another one; `plot(records, path)`
#: draws instead of the report's bars.
BENCHES = {
    "remask": "benchmarks.remask",
    "attention": "benchmarks.attention",
    "loss": "benchmarks.loss",
    "generate": "benchmarks.generate",
    "score": "benchmarks.score",
    "train-step": "benchmarks.train_step",
    "overhead": "benchmarks.overhead",
}


def choose_device(supported: Sequence[str], wanted: str | None = None):
    """The torch.device to run on: `wanted`, else the GPU if there are one and kernels for it. ValueError: why not."""
    import torch

    from illada._native import has_cuda

    if wanted is not None and wanted not in supported:
        raise ValueError(f"this bench runs on {', '.join(supported)}, not on {wanted}")
    lacking = None
    if not torch.cuda.is_available():
        lacking = "torch sees no GPU"
    elif not has_cuda():
        lacking = "illada was built without CUDA kernels; install it again where there is an nvcc"
    if wanted == "cuda" and lacking:
        raise ValueError(f"--device cuda: {lacking}")
    if wanted == "cpu" or lacking or "cuda" not in supported:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def main(arguments: list[str] | None = None) -> int:
    """0: done. 1: --check and a goal was missed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["compare"]:
        from benchmarks import compare

        return compare.main(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time illada against its peers in one process, interleaved, and compare errors and memory. On a "
        "GPU single calls are timed by events, with cold caches, and short ones in a CUDA graph as well.",
        epilog="example:\n  python -m benchmarks remask --json out.jsonl --plot out.png\n"
        "  python -m benchmarks remask --device cuda --only linear\n"
        "  python -m benchmarks attention --direction fwdbwd --only 8/2\n"
        "  python -m benchmarks loss --only t=0.5 --plot loss.png\n"
        "  python -m benchmarks loss --direction fwd --spread 8\n"
        "  python -m benchmarks generate --device cuda --only '8b var' --provider 'illada block'\n"
        "  python -m benchmarks train-step --provider illada --repeats 3\n"
        "  python -m benchmarks compare out.jsonl    # predicted against measured; compare --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bench", choices=BENCHES)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there are a GPU and kernels")
    parser.add_argument("--only", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument(
        "--direction",
        choices=["fwd", "bwd", "fwdbwd"],
        help="of attention (default: fwd) and loss (default: fwdbwd; no bwd)",
    )
    parser.add_argument("--spread", type=float, metavar="S", help="of loss: standard deviation of the logits; 1 is a "
                        "model at initialisation (default), 8 a trained one, whose softmax is peaked")  # fmt: skip
    parser.add_argument("--provider", action="append", metavar="NAME", help="this provider only; may be repeated")
    parser.add_argument("--repeats", type=int, metavar="N", help="timed calls of each provider (default: the bench's)")
    parser.add_argument("--json", metavar="PATH", help="append one JSON line for each result, after every case")
    parser.add_argument("--plot", metavar="PATH", help="draw the medians (needs matplotlib)")
    parser.add_argument("--check", action="store_true", help="exit 1 where a goal of the bench is missed")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    options = parser.parse_args(arguments)
    from benchmarks import dry_run, report, runner

    dry_run.prepare()
    bench = importlib.import_module(BENCHES[options.bench])
    try:
        device = choose_device(bench.DEVICES, options.device)
    except ValueError as error:
        parser.error(str(error))
    more = {}
    if options.direction:
        directions = getattr(bench, "DIRECTIONS", ())
        if not directions:
            parser.error(f"{options.bench} has no --direction; attention and loss have")
        if options.direction not in directions:
            parser.error(f"{options.bench} has no --direction {options.direction}, only {' and '.join(directions)}")
        more["direction"] = options.direction
    if options.spread is not None:
        if not hasattr(bench, "SPREAD"):
            parser.error(f"{options.bench} has no --spread; loss has")
        if not 0 < options.spread < float("inf"):
            parser.error(f"--spread must be a positive number, got {options.spread:g}")
        more["spread"] = options.spread
    offered = bench.cases(device, **more)
    cases = [case for case in offered if options.only is None or case.yardstick or options.only in case.name]
    if all(case.yardstick for case in cases):
        parser.error(f"no case of {options.bench} contains {options.only!r}: {', '.join(c.name for c in offered)}")
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    records = runner.run(
        options.bench,
        cases,
        providers=options.provider,
        repeats=options.repeats,
        device=device,
        after_case=(lambda new: report.write_json(new, options.json)) if options.json else None,
    )
    report.print_table(records)
    if options.plot:
        getattr(bench, "plot", report.plot)(records, options.plot)
    goals = bench.goals(records)
    for goal in goals:
        print(report.goal_line(goal))
    return 1 if options.check and not all(goal.met for goal in goals) else 0


if __name__ == "__main__":
    sys.exit(main())
