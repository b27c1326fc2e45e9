"""What groups of settings are made of: their base class, and types for them.

Sizes with units: 500G, 1.5 TiB, 1024, or off; numbers of things; settings that follow the traffic: auto, 30x.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, WithJsonSchema, field_validator

from distributor_node.shared.domain.eviction.gdsf import AUTO_COST, MissCost

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgtp]?)(i?b?)\s*\Z", re.IGNORECASE)
_MAX_SIZE = 4096 * 1024**5
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}


class SettingsGroup(BaseModel):
    """A group of settings. Unknown names are rejected, so that a misspelt setting is not ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @field_validator("*")
    @classmethod
    def _check_path(cls, value: Any) -> Any:
        """Refuse a path that no system call takes: it would be an error where the path is used, without the name."""
        if isinstance(value, Path) and "\0" in str(value):
            raise ValueError("expected a path without NUL characters")
        return value


def parse_size(value: object) -> int:
    """Return the bytes. Units are powers of 1024: `500G` is 500 GiB. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"expected a size such as 500G, 64M or a number of bytes, got {value!r}")
    if isinstance(value, int):
        return _bounded(value)
    match = _SIZE.match(value)
    if match is None:
        raise ValueError(f"expected a number and a unit, such as 500G, 64M or 1024, got {value!r}")
    number, unit, _ = match.groups()
    return _bounded(float(number) * 1024 ** _POWERS[unit.lower()])


def _bounded(size: float) -> int:
    if not 0 <= size <= _MAX_SIZE:
        raise ValueError("expected a size from 0 to 4096P")
    return int(size)


def format_size(size: int) -> str:
    """Return the shortest exact text, such as 500G, which `parse_size` reads back."""
    for unit, power in reversed(_POWERS.items()):
        if power and size and size % 1024**power == 0:
            return f"{size // 1024**power}{unit.upper()}"
    return str(size)


def plural(number: float, noun: str) -> str:
    """Return `1 object`, `2 objects`. `noun`: in the singular."""
    return f"{number:.0f} {noun}{'' if number == 1 else 's'}"


def size_in_words(count: float) -> str:
    """Return `7.8 KiB`: bytes as the node's page writes them, in a unit that fits. Less than 0 has its sign."""
    if count < 0:
        return f"-{size_in_words(-count)}"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


_SCHEMA: dict[str, list[dict[str, Any]]] = {
    "anyOf": [
        {"type": "integer", "minimum": 0, "maximum": _MAX_SIZE},
        {"type": "string", "pattern": r"^\s*[0-9]+(\.[0-9]+)?\s*[kKmMgGtTpP]?([iI]?[bB]?)\s*$"},
    ]
}

Size = Annotated[
    int,
    BeforeValidator(parse_size),
    PlainSerializer(format_size, return_type=str),
    WithJsonSchema(_SCHEMA, mode="validation"),
]


def _is_off(value: object) -> bool:
    """Whether this is `off`, which YAML reads as false."""
    return value is None or value is False or (isinstance(value, str) and value.strip().lower() == "off")


def _schema_with(words: str, minimum: int = 0) -> dict[str, Any]:
    """The JSON schema of a size of at least `minimum`, or of `off` and what else matches this pattern."""
    number, text = _SCHEMA["anyOf"]
    word = {"type": "string", "pattern": rf"^\s*{words}\s*$"}
    return {"anyOf": [{**number, "minimum": minimum}, text, word, {"const": False}, {"type": "null"}]}


def parse_admission_size(value: object) -> int | Literal["auto"] | None:
    """`auto`, `off` (None; YAML reads it as false), or a size. Raises ValueError."""
    if _is_off(value):
        return None
    if isinstance(value, str) and value.strip().lower() == "auto":
        return "auto"
    try:
        return parse_size(value)
    except ValueError:
        expected = "expected auto, off or a size of at most 4096P, such as 500G, 64M or 1024"
        raise ValueError(f"{expected}, got {value!r}") from None


def format_admission_size(size: int | Literal["auto"] | None) -> str:
    """What `parse_admission_size` reads back."""
    return "off" if size is None else size if size == "auto" else format_size(size)


AdmissionSize = Annotated[
    int | Literal["auto"] | None,
    BeforeValidator(parse_admission_size),
    PlainSerializer(format_admission_size, return_type=str),
    WithJsonSchema(_schema_with(r"([aA][uU][tT][oO]|[oO][fF][fF])"), mode="validation"),
]


MIN_WINDOW = 64 * 1024
"""Bytes. A viewer of a smaller window would wait for each of its pieces, and the fetch would pause and go on all the
time."""


def parse_window(value: object) -> int | None:
    """`off` (None; YAML reads it as false), or a size of at least MIN_WINDOW. Raises ValueError."""
    if _is_off(value):
        return None
    try:
        size = parse_size(value)
    except ValueError:
        size = 0
    if size < MIN_WINDOW:
        raise ValueError(
            f"expected off or a size from {format_size(MIN_WINDOW)} to 4096P, such as 8M, got {value!r}"
        )
    return size


WindowSize = Annotated[
    int | None,
    BeforeValidator(parse_window),
    PlainSerializer(format_admission_size, return_type=str),
    WithJsonSchema(_schema_with("[oO][fF][fF]", MIN_WINDOW), mode="validation"),
]


_FACTOR = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*x\s*\Z", re.IGNORECASE)
_MAX_FACTOR = 1_000_000.0


def parse_miss_cost(value: object) -> MissCost:
    """`auto`, a multiple of the mean bytes of a view such as `30x`, or a size. Raises ValueError."""
    if isinstance(value, MissCost):
        return value
    if isinstance(value, str):
        if value.strip().lower() == "auto":
            return AUTO_COST
        match = _FACTOR.match(value)
        if match is not None:
            if float(match[1]) > _MAX_FACTOR:
                raise ValueError(f"expected a factor from 0x to {_MAX_FACTOR:.0f}x, got {value!r}")
            return MissCost(factor=float(match[1]))
    try:
        return MissCost(fixed=parse_size(value))
    except ValueError as error:
        raise ValueError(f"expected auto, a factor such as 30x, or a size: {error}") from error


def format_miss_cost(cost: MissCost) -> str:
    """What `parse_miss_cost` reads back."""
    if cost.fixed is not None:
        return format_size(cost.fixed)
    return "auto" if cost == AUTO_COST else f"{cost.factor!r}x".replace(".0x", "x")


MissCostSetting = Annotated[
    MissCost,
    BeforeValidator(parse_miss_cost),
    PlainSerializer(format_miss_cost, return_type=str),
    WithJsonSchema(
        {
            "anyOf": [
                *_SCHEMA["anyOf"],
                {"type": "string", "pattern": r"^\s*([aA][uU][tT][oO]|[0-9]+(\.[0-9]+)?\s*[xX])\s*$"},
            ]
        },
        mode="validation",
    ),
]
