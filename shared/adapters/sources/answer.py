"""A source's answer after its headers have been checked."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class SourceResponse:
    """Bytes `first` to `first + length - 1` of the object; `chunks` gives exactly these, once, or raises SourceError.

    `status` is 200 for the whole object and 206 for a range, whatever the source's own status was. `length` is None if
    nobody said how long it is; `total`, the size of the whole object, likewise. `media_type` is the source's word.
    """

    status: Literal[200, 206]
    first: int
    length: int | None
    total: int | None
    media_type: str | None
    chunks: AsyncIterator[bytes]
