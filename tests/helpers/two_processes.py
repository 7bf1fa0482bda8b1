"""Two processes that call one function: what tests of DDP, FSDP2 and sharded heads run, with gloo on CPUs."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist

WORLD = 2
_CALL = """\
import importlib, json, sys
sys.path[:] = json.loads(sys.argv[1])
getattr(importlib.import_module(sys.argv[2]), sys.argv[3])(*sys.argv[4:])
"""


def run_in_two(function: Callable[..., None], *arguments: object, timeout: float, **environment: str) -> list[str]:
    """Call `function(*arguments)`, as texts, in two processes at once; each has RANK and the like, as of torchrun.

    Args:
        function: at the top of a module of tests; both processes import that.
        timeout: seconds for each; then both are ended.
        environment: further variables.

    Returns:
        What each process printed, errors included. AssertionError, with both texts: one failed.
    """
    command = [sys.executable, "-c", _CALL, json.dumps(sys.path), function.__module__, function.__name__]
    shared = {"WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", **environment}
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(WORLD)]  # a pipe may fill up
        processes = [
            subprocess.Popen(
                [*command, *map(str, arguments)], stdout=output, stderr=subprocess.STDOUT, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank, output in enumerate(outputs)
        ]  # fmt: skip
        try:
            for process in processes:
                process.wait(timeout)
        finally:
            for process in processes:
                process.kill()  # nothing, where it has ended
            for output in outputs:
                output.seek(0)
        said = [output.read() for output in outputs]
    assert all(process.returncode == 0 for process in processes), "\n".join(said)
    return said


@contextlib.contextmanager
def gloo(folder: str | Path) -> Iterator[int]:
    """The group of both processes, which meet in `folder`; gives this one's rank."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    try:
        yield rank
    finally:
        dist.destroy_process_group()
