"""The command `python -m benchmarks BENCH`, which runs one benchmark or all of them.

It prints rows as they come and tables, and writes files.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .registry import BENCHES

if TYPE_CHECKING:
    import torch  # imported only by what needs it: the command's help is fast

ALL = "all"

EPILOG = """\
examples:
  python -m benchmarks remask --json out.jsonl --plot out.png
  python -m benchmarks remask --device cuda --only linear
  python -m benchmarks attention --direction fwdbwd --only 8/2
  python -m benchmarks attention --seqlens 4x96,33 --heads 8/2 --head-dim 64
  python -m benchmarks loss --rows 512 --hidden 256 --vocab 32000
  python -m benchmarks loss --direction fwd --spread 8 --only t=0.5
  python -m benchmarks generate --device cuda --only '8b var' --provider 'illada block'
  python -m benchmarks train-step --provider illada --repeats 3
  python -m benchmarks all --quick --time-budget 300 --json out.jsonl --plot out.png
  python -m benchmarks all --quick --compare out.jsonl    # runs again: is anything of ours slower than in that run?
  python -m benchmarks.regression out.jsonl new.jsonl     # the same for two files, without a run
  python -m benchmarks compare out.jsonl    # something else: measured against PREDICTED times; compare --help
"""

LISTED = """\
A case is one job on one input; its name says which, as below. All providers of a case do the same job on the same
input, by turns. A provider is one way to do it: `illada` is ours as users call it, and other names that contain it
are variants of ours. The others are peers, called as their users would. --only TEXT chooses cases, --provider NAME
providers.
"""


@dataclass
class Plan:
    """The device and the cases of one bench that a run will measure."""

    name: str
    bench: Any
    device: Any
    cases: list[Any]


def choose_device(supported: Sequence[str], wanted: str | None = None) -> torch.device:
    """Return `wanted`, or by default the GPU where there are one and kernels for it.

    ValueError: why the wanted device cannot run.
    """
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


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser with all options of a run."""
    from . import shapes

    found = argparse.ArgumentParser(
        prog=prog,
        description="Time illada against its peers in one process, interleaved, and compare errors and memory. On a "
        "GPU single calls are timed by events, with cold caches, and short ones in a CUDA graph as well.",
        epilog=EPILOG.replace("python -m benchmarks ", f"{prog} ").replace("benchmarks.", f"{__package__}."),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("bench", choices=[*BENCHES, ALL], help="all: one after the other")
    found.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there are a GPU and kernels")
    found.add_argument("--list", action="store_true", help="say what cases and providers are, and name them; no run")
    what = found.add_argument_group("what is run")
    what.add_argument("--only", metavar="TEXT", help="cases whose name contains TEXT")
    what.add_argument("--provider", action="append", metavar="NAME", help="this provider only; may be repeated")
    what.add_argument("--quick", action="store_true", help="a few small cases, at most 5 calls of each provider")
    what.add_argument("--time-budget", type=float, metavar="SECONDS", help="shared among the cases: slow providers are "
                      "called less often, and what does not fit is left out and named")  # fmt: skip
    what.add_argument("--repeats", type=int, metavar="N", help="timed calls of each provider (default: the bench's)")
    what.add_argument(
        "--direction",
        choices=["fwd", "bwd", "fwdbwd"],
        help="of attention (default: fwd) and loss (default: fwdbwd; no bwd)",
    )
    what.add_argument("--spread", type=float, metavar="S", help="of loss: standard deviation of the logits; 1 is a "
                      "model at initialisation (default), 8 a trained one, whose softmax is peaked")  # fmt: skip
    shapes.add_options(found)
    out = found.add_argument_group("what is written", "after every case, and what there is when a signal ends the run")
    out.add_argument("--json", metavar="PATH", help="append one JSON line for each result")
    out.add_argument("--csv", metavar="PATH", help="write the results as CSV, a column for each key of the JSON")
    out.add_argument("--plot", metavar="PATH", help="draw the results (needs matplotlib); "
                     f"`python -m {__package__}.report FILE.jsonl --plot PATH` draws them again")  # fmt: skip
    gate = found.add_argument_group("what decides the exit status", "0: all went well; 130, 143: a signal ended it")
    gate.add_argument("--check", action="store_true", help="1 where a goal of the bench is missed, or a peer is faster "
                      "than ours by more than the noise")  # fmt: skip
    gate.add_argument("--compare", metavar="OLD.jsonl", help="1 where ours is slower, by more than the noise, than in "
                      "the earlier run that wrote this file")  # fmt: skip
    return found


def refuse_early(options: argparse.Namespace) -> None:
    """Raise ValueError for options whose use would fail after the run."""
    if options.repeats is not None and options.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {options.repeats}")
    if options.time_budget is not None and not 0 < options.time_budget < math.inf:
        raise ValueError(f"--time-budget must be a positive number of seconds, got {options.time_budget:g}")
    if options.spread is not None and not 0 < options.spread < math.inf:
        raise ValueError(f"--spread must be a positive number, got {options.spread:g}")
    for name in ("json", "csv", "plot"):
        if path := getattr(options, name):
            try:
                refuse_unwritable(Path(path))
            except OSError as error:
                raise ValueError(f"--{name} {path}: {error.strerror}") from error
    if options.plot:
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
        except ImportError as error:
            raise ValueError(f"--plot needs matplotlib: {error}; pip install 'illada[plot]'") from error
        known = FigureCanvasAgg.filetypes
        if (ending := Path(options.plot).suffix.removeprefix(".")) not in known:
            raise ValueError(f"--plot {options.plot}: no picture ends in {ending!r}; {', '.join(sorted(known))} do")


def refuse_unwritable(path: Path) -> None:
    """Raise OSError if nothing can be written at `path`; an existing file stays as it is."""
    was_there = path.exists()
    path.open("ab").close()
    if not was_there:
        path.unlink()


def plan(name: str, options: argparse.Namespace) -> Plan:
    """Return one bench's cases.

    ValueError: the bench has no such device, direction, shape or provider.
    """
    from . import shapes

    bench = importlib.import_module(BENCHES[name], __package__)
    device = choose_device(bench.DEVICES, options.device)
    more = {}
    if options.direction:
        directions = getattr(bench, "DIRECTIONS", ())
        if not directions:
            raise ValueError(f"{name} has no --direction; attention and loss have")
        if options.direction not in directions:
            raise ValueError(f"{name} has no --direction {options.direction}, only {' and '.join(directions)}")
        more["direction"] = options.direction
    if options.spread is not None:
        if not hasattr(bench, "SPREAD"):
            raise ValueError(f"{name} has no --spread; loss has")
        more["spread"] = options.spread
    given = shapes.given(options)
    if given.given:
        return Plan(name, bench, device, shapes.cases(name, bench, given, device, **more))
    return Plan(name, bench, device, (bench.quick if options.quick else bench.cases)(device, **more))


def plans(options: argparse.Namespace) -> list[Plan]:
    """Return the plan of each bench that was asked for.

    ValueError: the options do not fit together, or no case is left.
    """
    from . import shapes

    own = shapes.given(options).given
    if options.bench == ALL and (own or options.direction or options.spread is not None):
        wrong = [
            *map(shapes.option, own),
            *(f"--{n}" for n in ("direction", "spread") if getattr(options, n) is not None),
        ]
        raise ValueError(f"{', '.join(wrong)}: of one bench; all takes none of them")
    if options.quick and own:
        raise ValueError(f"--quick and {shapes.option(own[0])}: the shapes of one are not those of the other")
    found = [plan(name, options) for name in (BENCHES if options.bench == ALL else [options.bench])]
    offered = [case.name for p in found for case in p.cases]
    for p in found:
        p.cases = [case for case in p.cases if options.only is None or options.only in case.name]
    if not any(p.cases for p in found):
        raise ValueError(f"no case of {options.bench} contains {options.only!r}: {', '.join(offered)}")
    known = list(dict.fromkeys(name for p in found for name in p.bench.providers(p.device)))
    for name in options.provider or ():
        if name not in known:
            there = ", ".join(map(repr, known))
            raise ValueError(f"{options.bench} has no provider {name!r} on {found[0].device.type}; it has {there}")
    return [p for p in found if p.cases]


def show_list(found: Sequence[Plan]) -> None:
    """Print explanations of cases and providers, and the names of all of them."""
    print(LISTED)
    for p in found:
        print(f"==== {p.name}\n\n{(p.bench.__doc__ or '').strip()}\n")
        if more := getattr(p.bench, "PROVIDERS_DOC", None):
            print(f"{more.strip()}\n")
        print(
            f"providers of {p.name} on {p.device.type}:\n"
            + "".join(f"  {name}\n" for name in p.bench.providers(p.device))
        )
        print(f"cases of {p.name} on {p.device.type}:\n" + "".join(f"  {case.name}\n" for case in p.cases))


def row(record: dict[str, Any], records: Sequence[dict[str, Any]]) -> str:
    """Return the line of a new result.

    records: those that came with it, for the ratio to our time.
    """
    from . import runner

    timing = ", graph" if record["timing"] == "graph" else ""
    times = runner.ratio(records, record["case"], record["provider"], timing=record["timing"])
    text = f"{record['case']}: {record['provider']}{timing} {record['median_ms']:.4g} ms"
    text += f" ({record['p20_ms']:.4g} to {record['p80_ms']:.4g})" if record["n"] > 1 else ""
    text += "" if times is None or record["provider"] == "illada" else f", {times:.2f} of ours"
    marks = runner.marks(record)
    return text + (f"  [{marks}]" if marks else "")


def main(arguments: list[str] | None = None, prog: str = "python -m benchmarks") -> int:
    """Run the command and return its exit status.

    0: done. 1: a goal of --check was missed, or ours is slower than in the run of --compare. 2: nothing was measured,
    or nothing is in both runs. 128 + N: signal N.
    """
    began = time.monotonic()
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["compare"]:
        from . import compare

        return compare.main(arguments[1:], prog=f"{prog} compare")
    said = parser(prog)
    options = said.parse_args(arguments)
    from . import dry_run, report

    dry_run.prepare()
    try:
        found = plans(options)
        if not options.list:
            refuse_early(options)
        before = report.read_json(options.compare) if options.compare and not options.list else None
    except (ValueError, OSError) as error:
        said.error(str(error))
    if options.list:  # not above: a reader of it that is gone is no wrong argument
        show_list(found)
        return 0
    if before is not None and not any(r["median_ms"] for r in before):
        said.error(f"--compare {options.compare}: there are no results in it")
    try:
        return run(found, options, before, began)
    except BrokenPipeError:
        raise
    except OSError as error:  # 1 would say that something is slower
        print(f"{prog}: error: the results could not be written: {error}", file=sys.stderr)
        return 2


def run(
    found: Sequence[Plan], options: argparse.Namespace, before: Sequence[dict[str, Any]] | None, began: float
) -> int:
    """Run all plans, report and write the results, and return the exit status.

    before: the rows of --compare.
    """
    from . import regression

    lines: list[dict[str, Any]] = []
    try:
        status = execute(found, options, lines, began)
    except Exception:  # ours failed; what there was is shown
        finish(found, options, lines)
        raise
    records = [r for r in lines if r["median_ms"] is not None]
    failed = finish(found, options, lines)
    if not records and not status:
        print("nothing was measured", file=sys.stderr)
        return 2
    compared = 0 if before is None else regression.show(records, before, options.compare)
    return status or compared or int(failed)


def execute(found: Sequence[Plan], options: argparse.Namespace, lines: list[dict[str, Any]], began: float) -> int:
    """Run all plans into `lines`, and return 0, or 128 and the number of the signal that ended them."""
    from tqdm import tqdm

    from illada.cli.signals import Ended, as_exceptions

    from . import ceiling, report, runner
    from .budget import Budget

    def keep(new: list[dict[str, Any]]) -> None:
        lines.extend(new)
        if options.json:
            report.write_json(new, options.json)
        for record in new:
            if record["median_ms"] is not None:
                tqdm.write(row(record, new), file=sys.stdout)
        sys.stdout.flush()

    try:
        with as_exceptions():
            jobs: list[tuple[str, Any, list[Any]]] = [(p.name, p.device, p.cases) for p in found]
            for device in dict.fromkeys(p.device for p in found):
                measured = [case for p in found if p.device == device for case in p.cases]
                jobs.insert(0, (ceiling.BENCH, device, ceiling.cases(measured, device)))
            seconds = options.time_budget
            if seconds is not None:  # tables, a plot and the exit take some as well
                seconds = max(0.0, seconds - max(1.5, 0.1 * seconds) - (time.monotonic() - began))
            budget = Budget(seconds, sum(len(cases) for _, _, cases in jobs))
            for name, device, cases in jobs:
                repeats = options.repeats
                for case in cases:
                    if options.quick and repeats is None:
                        case.repeats = min(case.repeats, 5)
                runner.run(
                    name,
                    cases,
                    providers=options.provider,
                    repeats=repeats,
                    device=device,
                    after_case=keep,
                    budget=budget,
                )
    except KeyboardInterrupt:
        return 130
    except Ended as end:
        return 128 + end.number
    return 0


def finish(found: Sequence[Plan], options: argparse.Namespace, lines: Sequence[dict[str, Any]]) -> bool:
    """Print tables and goals, and write the plot and the CSV.

    Returns True with --check where a goal is missed.
    """
    from . import plots, regression, report, runner

    missed, records = False, [r for r in lines if r["median_ms"] is not None]
    for p in found:
        mine = report.with_ceilings([r for r in records if r["bench"] == p.name], records)
        if not mine and len(found) > 1:
            continue
        print(f"\n{p.name}:" if len(found) > 1 else "")
        report.print_table(mine)
        goals = p.bench.goals(mine)
        if options.check:
            goals = [*goals, *regression.peer_goals(mine, getattr(p.bench, "rivals", None))]
        for goal in goals:
            print(report.goal_line(goal))
        missed = missed or not all(goal.met for goal in goals)
    late = dict.fromkeys(f"{r['bench']} {r['case']}: {r['provider']}" for r in lines if r["error"] == runner.NO_TIME)
    if late:
        print(f"\nDid not fit into --time-budget {options.time_budget:g}:\n" + "\n".join(f"- {text}" for text in late))
    if options.csv:
        report.write_csv(lines, options.csv)
    if options.plot and records:
        plots.plot(records, options.plot)
    return options.check and missed


def command() -> int:
    """Run `main` as the command of a process, so that `guarded` sees a reader that is gone."""
    from illada.cli.signals import importing

    with importing():
        import torch  # noqa: F401
    status = main()
    sys.stdout.flush()  # a reader that is gone is noticed here, not at the exit
    return status


if __name__ == "__main__":
    from illada.cli import guarded

    sys.exit(guarded(command))
