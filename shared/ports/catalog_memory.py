"""The catalog memory: answers of a slow catalog, shared by all processes of the node, and who is asking for what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from shared.domain.objects import MediaObject, ObjectId


@dataclass(frozen=True, slots=True)
class Remembered:
    """An answer of the catalog (None: the object does not exist). `fresh_left`: seconds it is still believed; 0 or
    less: it is kept for outages only."""

    answer: MediaObject | None
    fresh_left: float


@dataclass(frozen=True, slots=True)
class Consultation:
    """What is remembered, and whether the consulting process is the one that must ask the catalog now."""

    remembered: Remembered | None
    must_ask: bool


class CatalogMemory(Protocol):
    """One instance per process; `open` before use, `close` at the end. Every verb may raise StateStoreUnavailable,
    within a bounded time. Ages are measured on the memory's own clock; callers hand over durations."""

    async def open(self) -> None:
        """Connect in the background; never fails because the memory is down."""

    async def close(self) -> None: ...

    async def recall(self, object_id: ObjectId) -> Remembered | None:
        """Look only."""

    async def consult(self, object_id: ObjectId, asker: str, seconds: float) -> Consultation:
        """What is remembered; unless that is fresh, also take the right to ask, for `seconds`, if nobody has it. One
        step: whoever gets the right finds no fresh answer that came just before."""

    async def remember(
        self, object_id: ObjectId, answer: MediaObject | None, fresh: float, keep: float
    ) -> None:
        """Keep an answer: believed for `fresh` seconds, there for `keep`. Ends whoever's right to ask."""

    async def give_up(self, object_id: ObjectId, asker: str) -> None:
        """The catalog gave no answer: let another one ask, if the right is still this asker's."""
