"""Answers shared by the node's processes: one of them asks, the others wait for what it learns."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass

import structlog

from shared.domain.errors import StateStoreUnavailable
from shared.domain.objects import MediaObject, ObjectId
from shared.ports.catalog_memory import CatalogMemory, Consultation, Remembered

_log = structlog.get_logger()
_FIRST_PAUSE = 0.02
_LONGEST_PAUSE = 0.25


@dataclass(frozen=True, slots=True)
class SharedTimes:
    """Seconds. `question`: after which a process that asks counts as dead; `positive_keep`, `negative_keep`: how long
    answers are there for outages, whatever they are believed."""

    question: float
    positive_keep: float = 7 * 24 * 3600.0
    negative_keep: float = 600.0


class SharedAnswers:
    """A catalog memory that may be missing or down: then every process asks for itself."""

    def __init__(self, memory: CatalogMemory | None, times: SharedTimes) -> None:
        self._memory = memory
        self._times = times
        self._asker = uuid.uuid4().hex
        self._reachable = True

    async def open(self) -> None:
        if self._memory is not None:
            await self._memory.open()

    async def close(self) -> None:
        if self._memory is not None:
            await self._memory.close()

    async def recall(self, object_id: ObjectId) -> Remembered | None:
        """What is remembered, without asking anybody."""
        if self._memory is None:
            return None
        try:
            remembered = await self._memory.recall(object_id)
        except StateStoreUnavailable as error:
            self._note(error)
            return None
        self._note(None)
        return remembered

    async def consult(self, object_id: ObjectId) -> Consultation:
        if self._memory is None:
            return Consultation(None, must_ask=True)
        try:
            consultation = await self._memory.consult(object_id, self._asker, self._times.question)
        except StateStoreUnavailable as error:
            self._note(error)
            return Consultation(None, must_ask=True)
        self._note(None)
        return consultation

    async def remember(self, object_id: ObjectId, answer: MediaObject | None, fresh: float) -> None:
        """Tell the others; best effort. `fresh`: seconds the answer is believed."""
        if self._memory is None:
            return
        keep = self._times.negative_keep if answer is None else self._times.positive_keep
        try:
            await self._memory.remember(object_id, answer, fresh, max(fresh, keep))
        except StateStoreUnavailable as error:
            self._note(error)

    async def give_up(self, object_id: ObjectId) -> None:
        """Let another process ask; best effort, since the right runs out by itself."""
        if self._memory is None:
            return
        try:
            await self._memory.give_up(object_id, self._asker)
        except StateStoreUnavailable as error:
            self._note(error)

    def _note(self, error: StateStoreUnavailable | None) -> None:
        """Say once that the memory is lost, and once that it is back."""
        if error is not None and self._reachable:
            _log.warning("catalog_memory_unreachable", reason=str(error))
        elif error is None and not self._reachable:
            _log.info("catalog_memory_reachable")
        self._reachable = error is None


class Inquiry:
    """One process's question about one object: whether it must be asked, and what is known if it fails."""

    def __init__(self, shared: SharedAnswers, object_id: ObjectId) -> None:
        self._shared = shared
        self._object_id = object_id
        self.remembered: Remembered | None = None
        self.asking = False

    async def settle(self) -> Remembered | None:
        """A fresh answer, waiting for the process that asks; None: it is for us to ask. Unbounded: the caller has a
        time limit around all of it."""
        pause = _FIRST_PAUSE
        while True:
            consultation = await self._shared.consult(self._object_id)
            self.remembered = consultation.remembered or self.remembered
            if consultation.must_ask:
                self.asking = True
                return None
            if consultation.remembered is not None and consultation.remembered.fresh_left > 0:
                return consultation.remembered
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
