"""How much of a squid's time and talk is taken."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class SquidLimits:
    """`timeout`: seconds for one look-up; `list_timeout`: for one batch of a list; `list_batch`: bags in one question;
    `list_pause`: seconds between two; sizes in bytes."""

    timeout: float = 2.5
    list_timeout: float = 60.0
    list_batch: int = 100
    list_pause: float = 1.0
    max_answer: int = 1 * MIB
    max_list_answer: int = 16 * MIB
