"""What an installation has in the package, and a checkout beside it: `illada benchmark` and `illada train NAME`."""

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from illada import cli
from illada.cli import shipped

ROOT = Path(__file__).resolve().parents[2]


def test_arguments_of_benchmark_go_on_as_they_are(monkeypatch):
    name = "benchmarks" if shipped.shipped("benchmarks").parent != shipped.PACKAGE else "illada.benchmarks"
    command = importlib.import_module(f"{name}.__main__")
    given = []
    monkeypatch.setattr(command, "main", lambda arguments, prog: given.append((arguments, prog)) or 3)
    arguments = ["--device", "cpu", "loss", "--only", "t=0.5", "--help", "--version"]
    assert cli.main(["benchmark", *arguments]) == 3
    assert given == [(arguments, "illada benchmark")]


def test_a_configuration_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "demo", "--print-config", "--train.steps=77"]) == 0
    out = capsys.readouterr().out
    assert 'preset = "tiny"' in out and "steps = 77" in out and 'out_dir = "runs/demo"' in out
    (tmp_path / "demo").write_text("[train]\nsteps = 5\n")  # a file goes before a name
    assert cli.main(["train", "demo", "--print-config"]) == 0 and "steps = 5 " in capsys.readouterr().out
    assert cli.main(["train", "demoo"]) == 2
    assert "no configuration file at demoo; those that come with illada are demo, illada_8b" in capsys.readouterr().err
    assert cli.main(["train", "configs/demo"]) == 2
    assert "no configuration file at configs/demo" in capsys.readouterr().err


def test_an_installation_without_them_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shipped, "PACKAGE", tmp_path / "site" / "illada")
    assert cli.main(["benchmark", "loss"]) == 2
    assert "this installation of illada lacks its benchmarks" in capsys.readouterr().err
    assert cli.main(["train", "demo"]) == 2 and "no configuration file at demo" in capsys.readouterr().err


@pytest.mark.slow
def test_the_build_ships_them(tmp_path):
    """In a process that has no checkout to find them in; the native module is the one that is in use here."""
    site = tmp_path / "site"
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(site)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for folder, pattern in (("benchmarks", "*.py"), ("configs", "*.toml")):
        there = {file.name for file in (site / "illada" / folder).glob(pattern)}
        assert there == {file.name for file in (ROOT / folder).glob(pattern)} != set()
    assert not list(site.rglob("*.sh")) and not list(site.rglob("*.cu")) and not list(site.rglob("results"))
    native = Path(importlib.util.find_spec("illada._C").origin)
    shutil.copy(native, site / "illada" / native.name)
    code = (
        "import sys, illada; from illada import cli; assert illada.__file__.startswith(sys.argv[1]), illada.__file__;"
        "assert cli.main(['train', 'demo', '--print-config']) == 0;"
        "assert cli.main(['benchmark', 'train-step', '--device', 'cpu', '--list']) == 0;"
        "helps = ('benchmark', 'overhead', '--help'), ('benchmark', 'compare', '--help')\n"
        "for words in helps:\n"
        "    try: cli.main([*words])\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "import illada.benchmarks.train_step as step; assert 'benchmarks' not in sys.modules;"
        "assert step.measure_memory('tiny 2x64', 'illada') >= 0;"
        "from illada.benchmarks.runner import commit; assert commit() is None"
    )
    env = {k: v for k, v in os.environ.items() if k != "ILLADA_COMMIT"} | {"PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(site)], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "python -m benchmarks" not in done.stdout and "  illada benchmark compare runs/gpu" in done.stdout
    assert 'out_dir = "runs/demo"' in done.stdout and "cases of train-step on cpu:\n  small 8x1024\n" in done.stdout
