"""Requests to a run, which another process leaves as files in its folder."""

from __future__ import annotations

from pathlib import Path

from illada.files import write_text
from illada.train.config import load_config

_DECAY = "decay-now"


def request_decay(run: Path) -> None:
    """Ask a run to begin the decay of the learning rate after its current step.

    The run saves a checkpoint with that decision. A run that is not running takes the request when it is resumed.

    Args:
        run: The folder of the run, train.out_dir.

    Raises:
        FileNotFoundError: There is no run. ValueError: It has no decay.
    """
    if not (run / "config.toml").is_file():
        raise FileNotFoundError(f"{run} is not a run (no config.toml); give the train.out_dir of one")
    if load_config(run / "config.toml").schedule.decay == "none":
        raise ValueError(f"the run in {run} has no decay (schedule.decay is none)")
    write_text(run / _DECAY, "")


def decay_is_requested(run: Path) -> bool:
    """Return whether `request_decay` was called and not yet forgotten."""
    return (run / _DECAY).exists()


def forget_decay_request(run: Path) -> None:
    """Remove the request."""
    (run / _DECAY).unlink(missing_ok=True)
