"""What is read from files of results of any age, and shown: tables, CSV, plots, docs/results.md; the ceilings."""

import csv
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if importlib.util.find_spec("benchmarks") is None:
    sys.path.insert(0, str(ROOT))

from benchmarks import ceiling, compare, jsonl, plots, regression, report, results_page, runner  # noqa: E402
from benchmarks.__main__ import BENCHES  # noqa: E402

CPU = torch.device("cpu")
FILES = sorted((ROOT / "benchmarks" / "results").glob("*.jsonl"))
#: Those that a line of the first files had.
FIRST_KEYS = ("bench", "case", "provider", "median_ms", "p20_ms", "p80_ms", "flops", "bytes", "peak_memory_bytes",
              "error", "device", "torch", "commit")  # fmt: skip
#: A case with goals of each bench, on a CPU and on a GPU, and a peer that its goals look at.
CASES = [
    ("remask", "256x126464 T=0", "published", "clock"), ("remask", "step 128x155136 T=1", "published", "events"),
    ("remask", "sample 1024x155136 T=0", "compile", "graph"), ("attention", "fwd 4x128 8/2 D64", "sdpa flash", "clock"),
    ("attention", "bwd 1x8192 32/8 D128", "fa3", "events"), ("loss", "fwdbwd 512 t=0.5 256x16384", "eager", "clock"),
    ("loss", "fwdbwd 8192 t=0.5 4096x155136", "eager", "events"), ("generate", "tiny var 32 prompts", "one by one", "clock"),
    ("generate", "8b var 1 prompts", "illada block", "events"), ("score", "tiny 200 questions", "one by one", "clock"),
    ("score", "4 layers 20 questions", "one by one", "events"), ("train-step", "small 8x1024", "padded", "clock"),
    ("train-step", "8b 8192", "padded", "events"),
]  # fmt: skip
COUNTS = {"tokens": 32, "forwards": 16, "longest": 8192, "rows": 9, "dX error": 1e-3, "dW error": 1e-3, "dW rest": 1e-3}


def record(**changes):
    """A record with every key."""
    values = {"bench": "remask", "case": "c", "provider": "illada", "median_ms": 2.0, "p20_ms": 1.9, "p80_ms": 2.1}
    values |= {"flops": 1e9, "bytes": 1e6, "peak_memory_bytes": 1 << 20, "error": 1e-3, "counts": COUNTS, "device": "d"}
    values |= {"torch": "2.13", "commit": "abc", "timing": "clock", "date": "2026-11-30T10:00:00+00:00", "n": 7}
    return {**dict.fromkeys(runner.KEYS), **values, "dtype": "float32", "threads": 2, **changes}


def write(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


# --------------------------------------------------------------------------------------------------------- old files


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_of_results_is_shown(path, tmp_path, capsys):
    records = report.read_json(path)
    assert all(list(r)[: len(runner.KEYS)] == list(runner.KEYS) for r in records)
    report.main([str(path), "--markdown", "--csv", str(tmp_path / "o.csv")])
    shown = capsys.readouterr()
    benches = {r["bench"] for r in records} - {ceiling.BENCH}  # ceilings are rows of the other benches' tables
    assert shown.err == "" and shown.out.count("\n## ") + 1 == len(benches)
    assert shown.out.count("| illada |") == sum(r["provider"] == "illada" for r in records)
    with (tmp_path / "o.csv").open(newline="") as file:
        times = [row["median_ms"] for row in csv.DictReader(file)]
    assert [float(time) if time else None for time in times] == [r["median_ms"] for r in records]
    assert compare.measurements(compare.read_lines([str(path)]))
    assert regression.main([str(path), str(path)]) == 0


def test_lines_with_fewer_keys_are_shown(tmp_path, capsys):
    """Each key is absent in turn, and all that came after the first files at once."""
    for bench, case, peer, timing in CASES:
        both = [record(bench=bench, case=case, provider=p, timing=timing) for p in ("illada", peer)]
        assert [r["bench"] for r in both] == [bench] * 2 and bench in BENCHES
        fewer = [
            [{k: v for k, v in r.items() if k != key} for r in both]
            for key in runner.KEYS
            if key not in ("bench", "case", "provider")
        ]
        for lines in (both, *fewer, [{k: r[k] for k in FIRST_KEYS} for r in both]):
            found = report.read_json(write(tmp_path / "o.jsonl", *lines))
            assert len(found) == 2 and all(
                r[k] is None for r, line in zip(found, lines, strict=True) for k in r.keys() - line
            )
            measured = [r for r in found if r["median_ms"] is not None]
            for mine in report.groups(measured):
                assert report.markdown(mine) and isinstance(report.goals(mine), list)
            regression.show(measured, measured, "o")
            compare.measurements(found)
            assert isinstance(plots.about(measured), str) and all(p.title for p in plots.panels(measured))
    assert "Traceback" not in capsys.readouterr().err


def test_unknown_keys_and_benches_are_kept(tmp_path, capsys):
    path = write(tmp_path / "o.jsonl", record(bench="of later", weather="fine"), record(bench="of later", provider="p"))
    assert report.read_json(path)[0]["weather"] == "fine"
    report.main([str(path), "--csv", str(tmp_path / "o.csv")])
    assert "of later" in capsys.readouterr().out
    header, first, second = (tmp_path / "o.csv").read_text().splitlines()
    assert header.endswith(",weather") and first.endswith(",fine") and second.endswith(",")


@pytest.mark.parametrize("damaged", ['{"bench": "remask", "ca', '{"a": 1} x', "[1]", "7", "\ud800", '"'])
def test_a_damaged_line_is_reported_and_skipped(damaged, tmp_path, capsys):
    path = write(tmp_path / "o.jsonl", record(), record(provider="p"))
    with path.open("a", encoding="utf-8", errors="surrogatepass") as file:
        file.write(damaged)
    assert [r["provider"] for r in report.read_json(path)] == ["illada", "p"]
    assert f"skipped a damaged line: {path}, line 3: " in capsys.readouterr().err
    report.write_json([record(provider="after")], path)  # a later run of the same command
    assert [r["provider"] for r in report.read_json(path)] == ["illada", "p", "after"]


@pytest.mark.parametrize("line", [
    {"case": "c", "kernel": "k", "us": 1.0}, {**record(), "median_ms": 0}, {**record(), "median_ms": "fast"},
    {**record(), "case": None}, {**record(), "median_ms": float("nan")},
    {**record(), "n": "five"}, {**record(), "p20_ms": "x"}, {**record(), "device": ["x"]}, {**record(), "counts": [1]},
])  # fmt: skip
def test_a_line_that_is_no_result_is_reported_and_skipped(line, tmp_path, capsys):
    assert len(report.read_json(write(tmp_path / "o.jsonl", line, record()))) == 1
    assert "that is no result: {" in capsys.readouterr().err


def test_files_that_are_none(tmp_path, capsys):
    (tmp_path / "o.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for name, why in (("none.jsonl", "No such file or directory"), ("o.png", "no line is a JSON object")):
        with pytest.raises(SystemExit) as stopped:
            report.main([str(tmp_path / name)])
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and why in said and name in said
    (tmp_path / "empty.jsonl").touch()
    report.main([str(tmp_path / "empty.jsonl")])
    assert capsys.readouterr().out == "No results.\n" and jsonl.read(tmp_path / "empty.jsonl") == []


# ------------------------------------------------------------------------------------------------------------- tables


def test_report_of_files(tmp_path, capsys):
    graph = record(case="step 128x155136 T=0", timing="graph", median_ms=0.02, device="a GPU")
    first, second = write(tmp_path / "1", graph), write(tmp_path / "2", record(bench="train-step", device="a CPU"))
    report.main([str(first), str(second), "--markdown"])
    out = capsys.readouterr().out
    assert out.index("## remask on a GPU, 2 threads, torch 2.13,") < out.index("## train-step on a CPU, 2 threads")
    assert "| step 128x155136 T=0 | illada | graph |" in out and "- met    step 128x155136 T=0: 20.0 us" in out
    report.main([str(first)])
    assert "remask:\na GPU, 2 threads, torch 2.13, commit abc, 2026-11-30\ncase " in capsys.readouterr().out


def test_shares_of_what_the_machine_can_do(tmp_path, capsys):
    bars = [
        record(bench="ceiling", case="copy", provider="copy", flops=None, bytes=4e6, dtype=None, counts=None),
        record(bench="ceiling", case="matmul 9 float32", provider="matmul", flops=2e9, bytes=None, counts=None),
        record(bench="ceiling", case="matmul 9 bfloat16", provider="matmul", bytes=None, dtype="bfloat16", counts=None),
    ]
    other = record(bench="loss", case="other", bytes=None, device="another")
    again = [{**bars[0], "median_ms": ms} for ms in (1.0, 20.0)]  # of another process; the middle one counts
    path = write(tmp_path / "o.jsonl", *bars, *again, record(), record(provider="p", median_ms=4.0), other)
    report.main([str(path), "--markdown"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    table = [dict(zip(rows[0], row, strict=True)) for row in rows[2:6]]
    assert [row["provider"] for row in table] == ["illada", "p", "copy", "matmul"]  # none of another dtype
    assert [row["% of copy"] for row in table] == ["25%", "12%", "100%", "-"]
    assert [row["% of matmul"] for row in table] == ["50%", "25%", "-", "100%"]
    assert len(rows) == 6 + 3 and "% of" not in "".join(rows[6])  # the other device has no ceiling


def test_ceilings_of_cases():
    cases = [
        runner.Case("a", list, bytes=1),
        *(runner.Case("b", list, flops=1, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float32)),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ceiling, "COPY_BYTES", {"cpu": 4096})
        patch.setattr(ceiling, "MATMUL_SIZE", {"cpu": 64})
        found = ceiling.cases(cases, CPU)
    assert [case.name.split()[::2] for case in found] == [
        ["copy", "MiB"],
        ["matmul", "float32"],
        ["matmul", "bfloat16"],
    ]
    assert ceiling.cases([runner.Case("c", list)], CPU) == []
    records = runner.run(ceiling.BENCH, found, providers=["illada"], repeats=3)  # whoever else was asked for
    sizes = [int(case.name.split()[1]) for case in found[1:]]
    assert [(r["provider"], r["bytes"], r["flops"], r["dtype"]) for r in records] == [
        ("copy", 8192, None, None), ("matmul", None, 2 * sizes[0] ** 3, "float32"),
        ("matmul", None, 2 * sizes[1] ** 3, "bfloat16"),
    ]  # fmt: skip
    assert all(16 <= size <= 64 for size in sizes)


def test_share_of_a_ceiling():
    copy, ours = record(case="copy", provider="copy", bytes=2e6, median_ms=1.0), record()
    assert ceiling.share([copy, ours], ours, "bytes") == 0.25
    assert ceiling.share([copy, ours], ours, "flops") is None and ceiling.share([ours], ours, "bytes") is None
    assert ceiling.share([copy, ours], record(bytes=None), "bytes") is None
    assert ceiling.share([copy, ours], record(device="another"), "bytes") is None
    matmul = record(provider="matmul", flops=2e9)
    assert ceiling.share([matmul], ours, "flops") == 0.5
    assert ceiling.share([matmul], record(dtype="bfloat16"), "flops") is None


# -------------------------------------------------------------------------------------------------------------- plots


def test_panels_are_relative_to_ours():
    lines = [
        record(), record(provider="illada", median_ms=4.0, p20_ms=3.0, p80_ms=6.0), record(provider="p", median_ms=8.0),
        record(timing="graph", median_ms=1.0), record(provider="p", timing="graph", median_ms=3.0),
        record(case="solo"), record(case="copy", provider="copy"),
        record(case="peers", provider="q", median_ms=6.0), record(case="peers", provider="p", median_ms=5.0),
    ]  # fmt: skip
    found = plots.panels(lines)
    assert [panel.title for panel in found] == ["c", "c, CUDA graph", "peers (p = 1)"]
    assert [[round(panel.relative(r), 2) for r in panel.records] for panel in found] == [[1, 2], [1, 3], [1.2, 1]]
    assert found[0].ends(found[0].base) == (0.25, 0.5) and found[0].ends(record(p20_ms=None)) == (0, 0)
    (alone,) = plots.alone([record(), record(case="solo")])
    assert [r["provider"] for r in alone.records] == ["illada, c", "illada, solo"] and plots.alone([]) == []


@pytest.mark.parametrize(("ms", "text"), [
    (0.0123, "12.3 us"), (0.4963, "496 us"), (0.99951, "1.00 ms"), (3.4964, "3.50 ms"), (20.39, "20.4 ms"), (99.97, "100 ms"), (957.1, "957 ms"),
    (999.6, "1.00 s"), (24846.0, "24.8 s"), (123456.0, "123 s"),
])  # fmt: skip
def test_times_have_three_digits(ms, text):
    assert plots.time_text(ms) == text


def drawn(records, monkeypatch, tmp_path):
    """The figure that `plot` draws."""
    from matplotlib.figure import Figure

    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: seen.append(figure))
    plots.plot(records, tmp_path / "o.png")
    return seen[0]


def test_few_cases_are_bars(monkeypatch, tmp_path):
    lines = [record(), record(provider="p", median_ms=6.0, p20_ms=3.0, p80_ms=9.0),
             record(provider="q", median_ms=4.0, p20_ms=4.0, p80_ms=4.0, n=1)]  # fmt: skip
    figure = drawn([*lines, record(bench="ceiling", case="copy", provider="copy", bytes=2e7)], monkeypatch, tmp_path)
    (axes,) = figure.axes
    assert axes.get_xscale() == "linear" and axes.get_xlim()[0] == 0 and axes.get_title("left") == "c"
    assert [bar.get_width() for bar in axes.patches][::-1] == [1, 3, 2]
    assert [bool(bar.get_hatch()) for bar in axes.patches][::-1] == [False, False, True]
    assert [text.get_text() for text in axes.texts][::-1] == [
        "2.00 ms, 1 MiB",
        "~6.00 ms, 3.00x, 1 MiB",
        "4.00 ms, 2.00x, 1 MiB",
    ]
    title, below = figure.get_suptitle(), figure.get_supxlabel()
    assert (
        title
        == "remask: time relative to illada (= 1), less is better\nd, 2 threads, torch 2.13, commit abc, 2026-11-30"
    )
    assert "~ noisy" in below and "hatched: one call" in below and "copy: 10.0 GB/s" in below


@pytest.mark.parametrize(("cases", "benches", "parts"), [(1, 1, 1), (12, 1, 12), (13, 1, 1), (2, 2, 2)])
def test_many_cases_are_dots(cases, benches, parts, monkeypatch, tmp_path):
    lines = [
        record(bench=bench, case=f"case {i}", provider=p, median_ms=ms)
        for bench in ("remask", "loss")[:benches]
        for i in range(cases)
        for p, ms in (("illada", 2.0), ("p", 40.0), ("q", 1.0))
    ]
    figure = drawn(lines, monkeypatch, tmp_path)
    assert len(figure.axes) == parts
    if parts == 12 or cases == 1:
        return
    axes = figure.axes[0]
    assert len(axes.get_yticklabels()) == cases and axes.get_yticklabels()[0].get_text() == "case 0   2.00 ms"
    assert axes.get_xscale() == "log" and [t.get_text() for t in axes.get_legend().get_texts()] == ["p", "q"]
    assert [axes.get_title("left") for axes in figure.axes] == (["remask", "loss"] if benches == 2 else [""])


def test_a_plot_is_the_same_every_time(tmp_path):
    lines = [record(), record(provider="p", median_ms=6.0)]
    for name in ("1.png", "2.png"):
        plots.plot(lines, tmp_path / name)
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()
    assert (tmp_path / "1.png").stat().st_size > 5000
    plots.plot([], tmp_path / "empty.svg")
    assert "no results" in (tmp_path / "empty.svg").read_text()


# ---------------------------------------------------------------------------------------------------- docs/results.md


def test_the_page_of_results_is_what_make_results_writes(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "plot", lambda records, path: drawn.append(path.name))
    folder = ROOT / "docs"
    written = results_page.page(FILES, folder / "results", folder)
    assert (folder / "results.md").read_text(encoding="utf-8") == written, "`make results` writes another page"
    assert sorted(drawn) == sorted(path.name for path in (folder / "results").iterdir())
    for path in FILES:
        assert f"## {path.stem}\n" in written
    cpu = write(tmp_path / "c.jsonl", record())
    assert "On GPUs nothing is measured yet" in results_page.page([cpu], tmp_path, tmp_path)
    assert "Intel(R) Xeon(R) Processor, torch 2.13.0+cpu, commit 6d3bce5, 2026-11-24" in written
    for of_a_gpu in ({"timing": "events"}, {"timing": "thread", "gpu": "a GPU"}):
        found = write(tmp_path / "g.jsonl", record(device="a GPU", **of_a_gpu))
        assert "On GPUs nothing" not in results_page.page([found], tmp_path, tmp_path)
    drawn.clear()
    results_page.page([write(tmp_path / "g.jsonl", record(device="a"), record(device="b"))], tmp_path, tmp_path)
    assert drawn == ["g-remask.png", "g-remask-2.png"]


def test_results_page_command(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "2026-11-30-x.jsonl", record(date=None), record(provider="p", median_ms=3.0))
    command = ["--results", str(tmp_path / "in"), "--page", str(tmp_path / "out" / "page.md")]
    pictures = tmp_path / "out" / "page"
    results_page.main(command)
    first = {path.name: path.read_bytes() for path in pictures.iterdir()} | {
        "": (tmp_path / "out" / "page.md").read_bytes()
    }
    (pictures / "of a file that is gone.png").touch()
    results_page.main(command)
    assert first == {p.name: p.read_bytes() for p in pictures.iterdir()} | {
        "": (tmp_path / "out" / "page.md").read_bytes()
    }
    assert list(first) == ["2026-11-30-x-remask.png", ""] and b"abc, 2026-11-30\n" in first[""]
    assert b"(../in/2026-11-30-x.jsonl)" in first[""] and b"![remask](page/2026-11-30-x-remask.png)" in first[""]
    with pytest.raises(SystemExit):
        results_page.main(["--results", str(pictures)])
    assert "there is no *.jsonl in" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- the summary

#: How a row of its tables begins, the case that it is about, and the providers in the order of its columns.
OPS = {
    "sample and commit, 256 rows": ("256x126464 T=1", "illada compile published"),
    "the same, temperature 0": ("256x126464 T=0", "illada compile published"),
    "the same, 32 rows": ("32x155136 T=1", "illada compile published"),
    "training step": ("small 8x1024", "illada padded"),
}
#: Of whole jobs, beside the loop that takes one at a time.
JOBS = {
    "generate 32 tokens for 32 prompts": "tiny var 32 prompts", "the same on a whole canvas": "tiny fixed 32 prompts",
    "32 prompts, `small`": "small var 32 prompts", "Eq. 2 of 200 questions": "tiny 200 questions",
    "of 20 questions": "small 20 questions",
}  # fmt: skip


def test_the_summary_says_what_the_files_say():
    summary = (ROOT / "benchmarks" / "results" / "summary.md").read_text(encoding="utf-8")
    rows = [line for line in summary.splitlines() if line.startswith("| ")]
    quoted = ("2026-11-24-cpu-2-cores.jsonl", "2026-11-26-cpu-2-cores-inference.jsonl")
    records = [r for name in quoted for r in report.read_json(ROOT / "benchmarks" / "results" / name)]

    def row(start):
        (found,) = (line for line in rows if line.startswith(f"| {start}"))
        return found

    def median(case, provider):
        (found,) = (r for r in records if (r["case"], r["provider"]) == (case, provider))
        return found

    for start, (case, providers) in OPS.items():
        times = [median(case, p)["median_ms"] for p in providers.split()]
        said = [
            1e3 * float(n) if unit == "s" else float(n) for n, unit in re.findall(r"\| ([\d.]+) (ms|s) ", row(start))
        ]
        assert said == pytest.approx(times, rel=0.03), start
        ratios = [float(n) for n in re.findall(r"([\d.]+)x", row(start).rsplit("|", 2)[1])]
        assert ratios == pytest.approx([t / times[0] for t in times[1:]], rel=0.05), start
    for start, case in JOBS.items():
        ours, theirs = median(case, "illada"), median(case, "one by one")
        said = [float(n) for n in re.findall(r"\| ([\d.]+) (?:tokens/s|s) (?=\|)", row(start))]
        tokens = (ours["counts"] or {}).get("tokens")
        times = [r["median_ms"] / 1e3 for r in (ours, theirs)]
        assert said == pytest.approx([tokens / t for t in times] if tokens else times, rel=0.03), start
        assert f" {times[1] / times[0]:.1f}x |" in row(start), start


def test_the_costs_of_calls_are_those_of_their_file():
    """docs/ops.md: the function's time, then ratios to torch of the function, of its op, and of an empty op."""
    text = (ROOT / "docs/ops.md").read_text(encoding="utf-8").split("## What a call costs")[1].split("\n## ")[0]
    (name,) = re.findall(r"\(results\.md#([\w-]+)\)", text)
    lines = report.read_json(ROOT / "benchmarks" / "results" / f"{name}.jsonl")
    times = {(r["case"], r["provider"]): r["median_ms"] for r in lines if r["bench"] == "overhead"}
    rows = re.findall(r"^\| (\w+)[^(|]*\(([\d.]+) us\) \|(.*)\|$", text, flags=re.MULTILINE)
    assert len(rows) == 5
    for op, microseconds, cells in rows:
        assert float(microseconds) == pytest.approx(1e3 * times[f"{op} no grad", "illada"], rel=0.03), op
        for grad, cell in zip(("no grad", "grad", "both"), cells.split("|"), strict=True):
            of = [times.get((f"{op} {grad}", p)) for p in ("illada", "illada registered", "torch empty op", "torch")]
            shown = [f"{time / of[3]:.2f}" for time in of[:3]] if of[3] else []
            assert re.findall(r"[\d.]+", cell) == shown, (op, grad)
