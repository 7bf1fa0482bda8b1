"""Checks of values from outside (JSON, TOML, the command line) against type hints.

Errors name the key, and what it may be.

A hint is a type, or `Annotated` with bounds of `annotated_types`. Types are strict: neither "1" nor 1.0 is an int, and
neither 0 nor "no" is a bool; an int is a float.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt

LARGEST = 3.4028234663852886e38  # of float32
_SHOWN = 5  # items of a list in an error
_MOST = 2**53  # of counts: what a float64 holds exactly

Count = Annotated[int, Ge(0), Le(_MOST)]
Size = Annotated[int, Gt(0), Le(2**30)]  # of a dimension: the product of two is an int64
TokenId = Annotated[int, Ge(0), Lt(2**30)]
Positive = Annotated[int, Gt(0), Le(_MOST)]
Finite = Annotated[float, Ge(-LARGEST), Le(LARGEST)]
PositiveFloat = Annotated[float, Gt(0), Le(LARGEST)]
NonNegativeFloat = Annotated[float, Ge(0), Le(LARGEST)]
Fraction = Annotated[float, Ge(0), Le(1)]


def _short(limit: float) -> str:
    power = int(limit).bit_length() - 1
    return f"2^{power}" if power > 16 and limit == 2**power else f"{limit:g}"


_SAID: dict[str, Callable[[dict[str, Any]], str]] = {
    "int_type": lambda limits: "must be int",
    "int_from_float": lambda limits: "must be int",
    "float_type": lambda limits: "must be float",
    "bool_type": lambda limits: "must be bool",
    "string_type": lambda limits: "must be str",
    "dict_type": lambda limits: "must be an object with keys",
    "list_type": lambda limits: "must be a list",
    "greater_than": lambda limits: "must be positive" if limits["gt"] == 0 else f"must be above {limits['gt']}",
    "greater_than_equal": lambda limits: (
        "must not be negative" if limits["ge"] == 0 else f"must be at least {limits['ge']}"
    ),
    "less_than": lambda limits: f"must be below {_short(limits['lt'])}",
    "less_than_equal": lambda limits: f"must be at most {_short(limits['le'])}",
    "literal_error": lambda limits: f"must be {limits['expected'].replace(chr(39), '')}",
}


def checked(hint: Any, value: Any, name: str) -> Any:
    """Return the value, if it is what the hint says.

    ValueError: `name` must be ..., got ...
    """
    from pydantic import ValidationError

    try:
        return _adapter(hint).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = name + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
        if _is_infinite(first["input"], first["type"]):
            said = "must be finite"
        elif say := _SAID.get(first["type"]):
            said = say(first.get("ctx", {}))
        else:
            said = first["msg"].replace("Input should", "must")
        raise ValueError(f"{place} {said}, got {first['input']!r:.80}") from None


def _is_infinite(value: Any, problem: str) -> bool:
    """Return whether a value is inf, nan, or an int that no float holds."""
    if isinstance(value, float):
        return not math.isfinite(value)
    return problem == "float_type" and isinstance(value, int) and not isinstance(value, bool)


def check_fields(instance: Any, section: str) -> None:
    """Check the fields of a dataclass against their hints, in its __post_init__.

    An int for a float becomes one.
    """
    kind: Any = type(instance)
    for name, hint in hints_of(kind).items():
        object.__setattr__(instance, name, checked(hint, getattr(instance, name), f"{section}.{name}"))


def check_object(
    values: Any, keys: Mapping[str, Any], where: str, optional: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the values of these keys, {key: hint}, of a JSON object, and of `optional` ones that are not null.

    ValueError: one is missing or is something else.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where} must hold a JSON object, got {type(values).__name__}")
    if missing := [key for key in keys if key not in values]:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    hints = {**keys, **{key: hint for key, hint in (optional or {}).items() if values.get(key) is not None}}
    return {key: checked(hint, values[key], f"{where}: {key}") for key, hint in hints.items()}


def names_of(kind: type) -> list[str]:
    """Return the names of a dataclass's fields."""
    return [field.name for field in dataclasses.fields(kind)]


@functools.lru_cache
def hints_of(kind: Any) -> dict[str, Any]:
    """Return the type hints of a dataclass's fields, by name."""
    return typing.get_type_hints(kind, include_extras=True)


@functools.lru_cache(maxsize=256)
def _adapter(hint: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(hint)


def some_of(items: Sequence[str], separator: str = ", ") -> str:
    """Return a list for an error: its first items, none of them long, and how many more there are."""
    shown = separator.join(f"{item:.160}" for item in items[:_SHOWN])
    return shown if len(items) <= _SHOWN else f"{shown} and {len(items) - _SHOWN} more"
