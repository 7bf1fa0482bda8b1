"""The output of a run: lines on stdout and in metrics.jsonl, a progress bar, and loss.png."""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from illada.files import write_text
from illada.schema import Count, Finite, check_object
from illada.terminal import shows
from illada.text.files import parse_json, read_lines
from illada.train.plot import draw

#: What a line of metrics.jsonl must hold, and what of each kind is drawn.
_LINE = {"kind": Literal["train", "validation", "decay"], "step": Count}
_VALUES: dict[str, dict[str, Any]] = {
    "train": {"loss": Finite},
    "validation": {"bound": Finite, "unigram_entropy": Finite},
    "decay": {"reason": str},
}
_DRAWN = {
    "seconds": Finite,
    "tokens_seen": Count,
    "learning_rate": Finite,
    "grad_norm": Finite,
    "tokens_per_second": Finite,
    "loss_by_t": list[Finite | None],
}


class Log:
    """The log of one run.

    metrics.jsonl continues where the resumed checkpoint left it: later lines of a lost run are cut off.

    Args:
        out_dir: Folder of the run.
        step: Optimizer steps of the resumed checkpoint; 0: a new run.
        steps: Optimizer steps of the run.
        progress: Show a progress bar, on a terminal.
        validated: The checkpoint has the validation after its step.
        decayed: The checkpoint has a decay that begins at its step.
    """

    def __init__(
        self, out_dir: Path, *, step: int, steps: int, progress: bool, validated: bool = True, decayed: bool = True
    ) -> None:
        self.file = out_dir / "metrics.jsonl"
        self.plot_file = out_dir / "loss.png"
        self.steps = steps
        unknown = {kind for kind, known in (("validation", validated), ("decay", decayed)) if not known}
        self.records: list[dict[str, Any]] = [
            record
            for record in read_metrics(self.file, up_to=step)
            if record["step"] < step or record["kind"] not in unknown
        ]
        write_text(self.file, "".join(json.dumps(r) + "\n" for r in self.records))
        self.stream = self.file.open("a", encoding="utf-8")
        self.lost: OSError | None = None  # why stdout takes no more lines
        self.bar = tqdm(total=steps, initial=step, unit=" steps", disable=not shows(progress))

    def advance(self) -> None:
        """Count one optimizer step."""
        self.bar.update(1)

    def train(self, *, step: int, seconds: float, loss_by_t: list[float | None], **values: float) -> None:
        """Log loss, loss_by_t, learning_rate, grad_norm, tokens_per_second, tokens_seen since the last call.

        data_wait: seconds since the last call that training waited for data.
        """
        line = {"kind": "train", "step": step, "seconds": round(seconds, 3), **values, "loss_by_t": loss_by_t}
        self._write(line)
        self.say(
            f"step {step:>6}/{self.steps}  loss {values['loss']:7.4f}  lr {values['learning_rate']:.2e}  "
            f"grad {values['grad_norm']:6.3f}  {values['tokens_per_second']:>8.0f} tokens/s  "
            f"data_wait {values['data_wait']:.2f} s  {_clock(seconds)}"
        )

    def validation(self, *, step: int, seconds: float, bound: float, unigram_entropy: float, tokens_seen: int) -> None:
        """Log the bound and the entropy that it has to beat, in nats per token."""
        self._write(
            {
                "kind": "validation",
                "step": step,
                "seconds": round(seconds, 3),
                "bound": bound,
                "unigram_entropy": unigram_entropy,
                "tokens_seen": tokens_seen,
            }
        )
        self.say(
            f"step {step:>6}/{self.steps}  validation bound {bound:.4f} nats/token "
            f"(unigram entropy {unigram_entropy:.4f}, {_percent(bound, unigram_entropy)})  {_clock(seconds)}"
        )

    def decay(self, *, step: int, end: int, reason: Literal["plateau", "command"]) -> None:
        """Log that the decay begins at optimizer step `step`, and the number of steps that the run now has."""
        self.steps = self.bar.total = end
        self._write({"kind": "decay", "step": step, "end": end, "reason": reason})
        why = {"plateau": "the validation bound has stopped falling", "command": "by command"}[reason]
        self.say(f"step {step:>6}/{end}  the learning rate decays from here on: {why}")

    def say(self, line: str) -> None:
        """Print a line on stdout, above the progress bar."""
        try:
            if self.bar.disable:
                print(line, flush=True)
            else:
                tqdm.write(line)
        except OSError as error:  # its reader or terminal is gone, which is no reason to lose the run
            self.lost = error
        except ValueError:  # the program that trains has closed it itself
            pass

    def has_validation(self, step: int) -> bool:
        """Return whether there is a validation of this step, in this run or in one that it continues."""
        return any(r["kind"] == "validation" and r["step"] == step for r in self.records)

    def plot(self) -> Path | None:
        """Draw loss.png and return its path.

        None: matplotlib is not installed, or the picture cannot be written.
        """
        try:
            draw({"": self.records}, self.plot_file, panels=["loss"])
        except ImportError:
            return None
        except OSError as error:  # a full disk is no reason to lose the run
            self.say(f"no plot: {error}")
            return None
        return self.plot_file

    def close(self) -> None:
        """Flush the file and clear the bar."""
        self.bar.close()
        self.stream.close()

    def _write(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        self.stream.write(json.dumps(record) + "\n")
        self.stream.flush()


def read_metrics(file: Path, up_to: float = math.inf) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl.

    Lines after step `up_to` are left out, and one that a kill cut short.

    ValueError: a line that is another program's, with its number.
    """
    records = []
    if file.is_file():
        for where, line in read_lines(file):
            try:
                record = parse_json(line, where)
            except ValueError:
                continue
            check_object(record, _LINE, where)
            check_object(record, _VALUES[record["kind"]], where, _DRAWN)
            if record["step"] <= up_to:
                records.append(record)
    return records


def _percent(bound: float, unigram_entropy: float) -> str:
    return f"{100 * (bound / unigram_entropy - 1):+.1f}%" if unigram_entropy else "of a single token"


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=int(seconds)))
