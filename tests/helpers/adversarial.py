"""Values that break kernels, and how a result is compared with float64 where there are NaNs and infinities among them.

A kind is a rule for the values along a tensor's last dimension: a row of logits, or of q, k or v.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_Fill = Callable[[Tensor, torch.finfo, torch.Generator], Tensor]


def _some(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random half of the places of x."""
    return torch.rand(x.shape, generator=generator, dtype=x.dtype) < 0.5


def _first(x: Tensor, share: float) -> Tensor:
    """Return the first places of each row, about `share` of them."""
    return torch.arange(x.shape[-1]).expand(x.shape) < int(share * x.shape[-1])


def _at(x: Tensor, place: int) -> Tensor:
    """Return one place of each row; -1 is the last."""
    return torch.arange(x.shape[-1]).expand(x.shape) == place % max(1, x.shape[-1])


def _middle(x: Tensor) -> int:
    return x.shape[-1] // 2


#: Finite values: every op must give what float64 gives.
FINITE: dict[str, _Fill] = {
    "normal": lambda x, info, g: x,
    "peaked": lambda x, info, g: 30 * x,
    "offset 1e4": lambda x, info, g: 1e4 + 3 * x,
    "offset -1e4": lambda x, info, g: -1e4 + 3 * x,
    "offset 1e6": lambda x, info, g: 1e6 + 3 * x,
    "huge": lambda x, info, g: x.sign() * info.max * torch.rand(x.shape, generator=g, dtype=x.dtype),
    "largest": lambda x, info, g: torch.full_like(x, info.max),
    "largest and lowest": lambda x, info, g: torch.where(_some(x, g), info.max, -info.max),
    "lowest": lambda x, info, g: torch.full_like(x, -info.max),
    "denormal": lambda x, info, g: (8 * x).round() * info.smallest_normal * info.eps,
    "ties": lambda x, info, g: x.round(),
    "constant": lambda x, info, g: torch.full_like(x, 3.0),
    "zeros of both signs": lambda x, info, g: torch.where(_some(x, g), 0.0, -0.0),
}

#: Rows with -inf, which have a softmax unless nothing is above it.
MINUS_INFINITY: dict[str, _Fill] = {
    "half -inf": lambda x, info, g: x.masked_fill(_some(x, g) & ~_at(x, -1), -torch.inf),
    "-inf first": lambda x, info, g: x.masked_fill(_first(x, 0.9), -torch.inf),
    "-inf last": lambda x, info, g: x.masked_fill(~_first(x, 0.1) & ~_at(x, 0), -torch.inf),
    "only the first above -inf": lambda x, info, g: x.masked_fill(~_at(x, 0), -torch.inf),
    "only the last above -inf": lambda x, info, g: x.masked_fill(~_at(x, -1), -torch.inf),
    "lowest and -inf": lambda x, info, g: torch.where(_at(x, _middle(x)), -info.max, -torch.inf),
    "offset 1e4 and -inf": lambda x, info, g: (1e4 + 3 * x).masked_fill(_some(x, g) & ~_at(x, -1), -torch.inf),
}

#: Rows whose softmax has no value.
NO_SOFTMAX: dict[str, _Fill] = {
    "all -inf": lambda x, info, g: torch.full_like(x, -torch.inf),
    "+inf": lambda x, info, g: x.masked_fill(_at(x, _middle(x)), torch.inf),
    "two +inf": lambda x, info, g: x.masked_fill(_at(x, 0) | _at(x, -1), torch.inf),
    "both infinities": lambda x, info, g: torch.where(_some(x, g), torch.inf, -torch.inf).masked_fill(
        _at(x, 0), torch.inf
    ),
    "NaN first": lambda x, info, g: x.masked_fill(_at(x, 0), torch.nan),
    "NaN last": lambda x, info, g: x.masked_fill(_at(x, -1), torch.nan),
    "NaN in -inf": lambda x, info, g: torch.full_like(x, -torch.inf).masked_fill(_at(x, _middle(x)), torch.nan),
    "all NaN": lambda x, info, g: torch.full_like(x, torch.nan),
}

KINDS: dict[str, _Fill] = {**FINITE, **MINUS_INFINITY, **NO_SOFTMAX}


def values(kind: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return values of that kind, on the CPU. What the dtype cannot hold becomes its largest or lowest number."""
    info = torch.finfo(dtype)
    x = KINDS[kind](torch.randn(shape, generator=generator, dtype=torch.float64), info, generator)
    return torch.where(x.isfinite(), x.clamp(-info.max, info.max), x).to(dtype)


def assert_near(got: Tensor, want: Tensor, tolerance: float | Tensor, name: str = "result") -> None:
    """Assert |got - want| <= tolerance wherever `want` is finite; NaN where it is NaN, and the same infinities."""
    if got.shape != want.shape:
        raise AssertionError(f"{name}: shape {list(got.shape)}, expected {list(want.shape)}")
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    allowed = torch.as_tensor(tolerance, dtype=torch.float64).expand_as(want)
    same = (got == want) | (got.isnan() & want.isnan())
    near = want.isfinite() & got.isfinite() & ((got - want).abs() <= allowed)
    if bool((wrong := ~(same | near)).any()):
        place = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}{list(place)} is {got[place].item()!r}, expected {want[place].item()!r} +- "
            f"{allowed[place].item():.3g}; {int(wrong.sum())} of {wrong.numel()} are wrong"
        )
