"""The shapes that a user gives on the command line, instead of those that a bench has.

A bench that takes some of them names them in `OWN` and has `own(shapes, device) -> list[Case]`; what is not given stays
as the bench has it.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .runner import Case

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

MOST_SEQUENCES = 2**20  # more is a slip, and the list of them alone could fill the memory


@dataclass(frozen=True)
class Shapes:
    """The shapes that were given on the command line; None where one was not given.

    seqlens: tokens of each sequence. heads: query heads and key-value heads. rows: of logits, or tokens with a weight.
    """

    seqlens: tuple[int, ...] | None = None
    heads: tuple[int, int] | None = None
    head_dim: int | None = None
    vocab: int | None = None
    rows: int | None = None
    hidden: int | None = None
    dtype: torch.dtype | None = None

    @property
    def given(self) -> list[str]:
        """The names of the shapes that were given."""
        return [field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None]


def seqlens(text: str) -> tuple[int, ...]:
    """Parse the lengths of sequences.

    8x1024: eight sequences of 1024; 100,7,33: three; both may be mixed.
    """
    found: list[int] = []
    for part in text.split(","):
        count, times, length = part.rpartition("x")
        numbers = [count, length] if times else [length]
        if not all(number.strip().isdecimal() for number in numbers) or (times and int(count) < 1):
            raise argparse.ArgumentTypeError(f"got {text!r}; COUNTxLENGTH such as 8x1024, or lengths such as 100,7,33")
        if len(found) + (number := int(count) if times else 1) > MOST_SEQUENCES:
            raise argparse.ArgumentTypeError(f"got {text!r}; at most {MOST_SEQUENCES} sequences")
        found += [int(length)] * number
    if not sum(found):
        raise argparse.ArgumentTypeError(f"got {text!r}, which has no token")
    return tuple(found)


def heads(text: str) -> tuple[int, int]:
    """Parse the numbers of heads.

    32/8: query heads and key-value heads; 32: as many of both.
    """
    query, slash, keys = text.partition("/")
    parts = (query, keys if slash else query)
    if not all(part.isdecimal() and int(part) > 0 for part in parts) or int(parts[0]) % int(parts[1]):
        raise argparse.ArgumentTypeError(f"got {text!r}; QUERY/KEYS such as 32/8, the first a multiple of the second")
    return int(parts[0]), int(parts[1])


def positive(text: str) -> int:
    """Parse a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; a whole number from 1 on")
    return int(text)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of shapes to the command's parser."""
    group = parser.add_argument_group(
        "shapes of one's own", "instead of the bench's; what is not given stays as the bench has it"
    )
    group.add_argument("--seqlens", type=seqlens, metavar="L", help="tokens of each sequence: 8x1024, or 100,7,33")
    group.add_argument("--heads", type=heads, metavar="H/G", help="query heads and key-value heads: 32/8, or 32")
    group.add_argument("--head-dim", type=positive, metavar="D", help="elements of a head")
    group.add_argument("--rows", type=positive, metavar="N", help="rows of logits; of loss: tokens, all with a weight")
    group.add_argument("--hidden", type=positive, metavar="C", help="width of the hidden states")
    group.add_argument("--vocab", type=positive, metavar="V", help="size of the vocabulary")
    group.add_argument("--dtype", choices=DTYPES, help="of the tensors (default: float32 on a CPU, bfloat16 on a GPU, "
                       "and of remask on both)")  # fmt: skip


def given(options: argparse.Namespace) -> Shapes:
    """Return the shapes that the command line gave."""
    fields = [field.name for field in dataclasses.fields(Shapes)]
    found = {name: getattr(options, name) for name in fields}
    return Shapes(**{**found, "dtype": DTYPES.get(found["dtype"])})


def cases(name: str, bench: Any, shapes: Shapes, device: torch.device, **more: Any) -> list[Case]:
    """Return the bench's cases of these shapes.

    ValueError: the bench does not take one of them.
    """
    taken: Sequence[str] = getattr(bench, "OWN", ())
    lacking = [option(field) for field in shapes.given if field not in taken]
    if lacking:
        takes = f"it takes {', '.join(map(option, taken))}" if taken else "it takes no shapes of one's own"
        raise ValueError(f"{name} has no {' and no '.join(lacking)}; {takes}")
    least = getattr(bench, "LEAST_VOCAB", 1)
    if shapes.vocab is not None and shapes.vocab < least:
        raise ValueError(f"{name} needs a --vocab of at least {least}, got {shapes.vocab}")
    found = bench.own(shapes, device, **more)
    if shapes.dtype is None:
        return found
    suffix = f" {str(shapes.dtype).removeprefix('torch.')}"
    return [dataclasses.replace(case, name=case.name + suffix) for case in found]


def option(field: str) -> str:
    """Return the name of an option as on the command line."""
    return "--" + field.replace("_", "-")
