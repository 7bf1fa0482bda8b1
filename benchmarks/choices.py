"""The kernels that a choice of `illada.ops.variants` is about, by the choice's name.

New choices need no entry here.
"""

from __future__ import annotations

import re

from illada.ops.variants import Variant

#: The kinds of jobs, and the beginnings of the names of the choices that are about them.
PREFIXES = {
    "attention_forward": ("attention_forward", "attention_cluster", "l2_hints"),
    "attention_backward": ("attention_backward", "l2_hints"),
    "loss": ("masked_cross_entropy",),
    "linear_loss": ("loss", "linear_loss", "linear_masked_cross_entropy"),
    "sample_tokens": ("sample_tokens",),
    "linear_sample_tokens": ("linear_sample",),
    "remask": ("remask",),
}
#: The beginnings of the names of choices between kernels of sm_80 that sm_90a does not run, and the other way round.
SM80_ALONE = ("attention_forward_warps",)
SM90_ALONE = ("attention_forward_d", "attention_cluster", "attention_backward", "l2_hints", "loss")


def concerns(choice: str, kind: str, dim: int | None = None) -> bool:
    """Return whether `choice` may make a difference to jobs of `kind`, with heads of `dim`.

    A name that begins like no kind's, such as "pdl", is about all of them; "attention_..." about both
    directions.
    """
    if not any(choice.startswith(prefix) for prefixes in PREFIXES.values() for prefix in prefixes):
        return kind.startswith("attention") or not choice.startswith("attention")
    if not choice.startswith(PREFIXES[kind]):
        return False
    only = re.search(r"_d(\d+)(_|$)", choice)
    return dim is None or only is None or int(only[1]) == dim


def matters_on(choice: str, major: int | None) -> bool:
    """Return whether GPUs of compute capability `major`.x (None: some GPU) have the kernels that `choice` is about."""
    return major is None or not choice.startswith(SM80_ALONE if major == 9 else SM90_ALONE)


def others(choices: list[Variant], kind: str, dim: int | None = None) -> list[tuple[str, str]]:
    """Return (choice, value) for every value that is not the default and may make a difference."""
    return [(c.name, value) for c in choices if concerns(c.name, kind, dim) for value in c.values if value != c.default]
