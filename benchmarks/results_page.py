"""The page docs/results.md: summary.md, then the files of benchmarks/results as tables, plots and goals.

The same files give the same page.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

from . import plots, report
from .runner import on_gpu

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md"

HEAD = """\
# Results

`make results` writes this page from the files in `benchmarks/results`. Each `*.jsonl` is what one or more runs of
`python -m benchmarks BENCH --json FILE` left. All providers of a case take turns in one process; times are medians.
`ratio` is how many times illada's time a provider takes. `spread` is how far p20 and p80 are apart, in percent of the
median. Rows are marked that vary more than 20% or were timed by one call. `% of copy` and `% of matmul` are shares of
what the machine's own copy and matrix product of the same dtype reached in the same run; older files have none,
and the oldest no date but in its name.
`python -m benchmarks BENCH --list` says what the cases and providers are.

"""
NO_GPU = (
    "**On GPUs nothing is measured yet**: all of these files are of CPUs. `benchmarks/run_on_gpu.sh` measures one.\n\n"
)


def page(files: Sequence[Path], pictures: Path, folder: Path) -> str:
    """Return the Markdown, and draw a picture for each bench of each file into `pictures`.

    folder: The page's folder, for its links.

    A summary.md beside the files comes first. Its links count from the page.
    """
    parts, any_gpu = [], False
    summary = files[0].parent / "summary.md"
    if summary.exists():
        parts.append(summary.read_text(encoding="utf-8"))
    for path in files:
        lines = report.read_json(path)
        records = [{**r, "date": r["date"] or _date(path)} for r in lines if r["median_ms"] is not None]
        any_gpu = any_gpu or any(map(on_gpu, records))
        link = Path(os.path.relpath(path, folder)).as_posix()
        parts.append(f"## {path.stem}\n\n[{path.name}]({link})\n\n")
        drawn: list[str] = []
        for mine in report.groups(records):
            bench = mine[0]["bench"]
            drawn.append(bench)  # of a second device a second time
            number = f"-{drawn.count(bench)}" if drawn.count(bench) > 1 else ""
            picture = pictures / f"{path.stem}-{bench}{number}.png"
            plots.plot(mine, picture)
            shown = Path(os.path.relpath(picture, folder)).as_posix()
            parts.append(f"### {bench}\n\n{plots.about(mine)}\n\n![{bench}]({shown})\n\n{report.markdown(mine)}\n")
            parts += [f"- {report.goal_line(goal)}\n" for goal in report.goals(mine)]
            parts.append("\n")
        parts += [f"{line}\n" for line in report.left_out(lines)]
    return (HEAD + ("" if any_gpu else NO_GPU) + "".join(parts)).rstrip() + "\n"


def _date(path: Path) -> str | None:
    """Return the date at the start of the file's name, or None."""
    found = re.match(r"\d{4}-\d\d-\d\d", path.name)
    return found and found[0]


def main(arguments: list[str] | None = None) -> None:
    """Write docs/results.md and its pictures from all files of results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results_page", description=main.__doc__)
    parser.add_argument("--results", default=str(RESULTS), metavar="FOLDER", help="default: benchmarks/results")
    parser.add_argument("--page", default=str(PAGE), metavar="PATH", help="default: docs/results.md; pictures go into "
                        "a folder beside it, of the same name")  # fmt: skip
    options = parser.parse_args(arguments)
    out, files = Path(options.page), sorted(Path(options.results).glob("*.jsonl"))
    if not files:
        parser.error(f"there is no *.jsonl in {options.results}")
    pictures = out.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    for old in pictures.glob("*.png"):
        old.unlink()
    out.write_text(page(files, pictures, out.parent), encoding="utf-8")


if __name__ == "__main__":
    main()
