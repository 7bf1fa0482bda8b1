"""The smoke jobs: right with the defaults, and each launches the kernels that it says."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
if importlib.util.find_spec("benchmarks") is None:
    sys.path.insert(0, str(ROOT))

from benchmarks import smoke, timing  # noqa: E402
from benchmarks.smoke_jobs import Job, jobs  # noqa: E402

SIMULATED = "CUSIM_ASYNC" in os.environ


def launched(job: Job, folder: Path) -> set[str]:
    """The kernels of ours that the job puts on the device."""
    if not SIMULATED:
        device = torch.device("cuda", 0)
        job.run(device)
        return set(timing.kernels(lambda: job.run(device), device))
    report = folder / "report"
    command = [sys.executable, "-m", "benchmarks.smoke", "--in-process", job.name]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "ILLADA_DRY_RUN": "1", "CUSIM_REPORT": str(report), "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    names = [json.loads(line)["kernel"] for line in report.read_text().splitlines()]
    return {re.search(r"illada_([a-z0-9_]+)", name)[1] for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("job", jobs(), ids=lambda job: job.name)
def test_right(job, device):
    smoke.checked(job, {})


@pytest.mark.slow
@pytest.mark.parametrize("job", smoke.covering(jobs()), ids=lambda job: job.name)
def test_launches_what_it_says(job, device, tmp_path):
    is_sm90 = torch.cuda.get_device_capability(device) == (9, 0)
    assert launched(job, tmp_path) == set(job.kernels if is_sm90 else job.portable)
