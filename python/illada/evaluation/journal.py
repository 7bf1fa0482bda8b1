"""A journal of an evaluation's finished requests on disk, with which an interrupted evaluation continues."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from illada.files import append, locked
from illada.schema import check_object
from illada.text.files import parse_json

if TYPE_CHECKING:
    from illada.model import MaskedDiffusionModel

_SAMPLED_VALUES = 1024  # of each parameter, for the model's fingerprint


class Journal:
    """A JSONL file of {"key", "result"}, appended to and synced with every `add`.

    A line that a kill or a full disk cut short, or that holds something else, is no result: it is skipped, and its
    request computed again.

    Args:
        path: the file; None keeps everything in memory. It is locked as long as this object lives.
        rank: of several processes each appends to a file of its own (PATH.rank1, ...) and all are read.

    Raises:
        BlockingIOError: another evaluation writes this file.
    """

    def __init__(self, path: str | Path | None = None, rank: int = 0) -> None:
        self.path = None if path is None else Path(f"{path}.rank{rank}" if rank else path)
        self._results: dict[str, Any] = {}
        if path is None:
            return
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = contextlib.ExitStack()
        lock.enter_context(locked(self.path.with_name(f".{self.path.name}.lock"), f"{self.path} is being written"))
        weakref.finalize(self, lock.close)
        for file in journal_files(path):
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    record = check_object(parse_json(line, str(file)), {"key": str, "result": Any}, str(file))
                except ValueError:
                    continue
                self._results[record["key"]] = record["result"]

    def __contains__(self, key: str) -> bool:
        return key in self._results

    def __getitem__(self, key: str) -> Any:
        return self._results[key]

    def add(self, results: Iterable[tuple[str, Any]]) -> None:
        """Store these (key, result) pairs; they are on disk when this returns."""
        new = list(results)
        self._results.update(new)
        if self.path is None:
            return
        lines = "".join(json.dumps({"key": key, "result": result}) + "\n" for key, result in new)
        append(self.path, lines)


def journal_files(path: str | Path) -> list[Path]:
    """Return the files of all ranks that exist of the journal at `path`."""
    path = Path(path)
    ranks = sorted(path.parent.glob(f"{glob.escape(path.name)}.rank*")) if path.parent.is_dir() else []
    return [file for file in (path, *ranks) if file.is_file()]


def request_key(*parts: Any) -> str:
    """Return a hash of everything that a result depends on; the parts are JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def fingerprint(model: MaskedDiffusionModel) -> str:
    """Return a hash that tells models apart.

    It is of the config, and of values spread evenly over each parameter.
    """
    import torch

    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        count = min(len(flat), _SAMPLED_VALUES)
        index = torch.linspace(0, max(0, len(flat) - 1), count, dtype=torch.float64, device="cpu")
        values = flat[index.long().to(flat.device)].float().cpu()
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:32]
