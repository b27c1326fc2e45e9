"""The cache in front of a slow catalog: answers kept, one question an object, the last good answer when it is down."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import structlog

from shared.domain.errors import CatalogUnavailable
from shared.domain.objects import Duty, MediaObject, ObjectId
from shared.ports.catalog import Catalog

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class CacheLimits:
    """Times in seconds. `wait`: for one's turn when `max_in_flight` questions are under way. `outage_pause`: after a
    failed question, stale answers are given at once for so long, instead of after another time-out each."""

    positive_ttl: float
    negative_ttl: float
    max_in_flight: int
    wait: float
    max_entries: int = 100_000
    outage_pause: float = 5.0


@dataclass(frozen=True, slots=True)
class _Kept:
    answer: MediaObject | None
    fresh_until: float


class CachedCatalog:
    """Wraps any catalog. Answers older than their time to live are asked anew, yet kept for outages until the bounded
    cache (least recently asked first) drops them. A `does not exist` is kept likewise."""

    def __init__(
        self, inner: Catalog, limits: CacheLimits, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`clock` in seconds; `open` and `close` are passed on to the inner catalog."""
        self._inner = inner
        self._limits = limits
        self._clock = clock
        self._kept: OrderedDict[ObjectId, _Kept] = OrderedDict()
        self._questions: dict[ObjectId, asyncio.Task[MediaObject | None]] = {}
        self._turns = asyncio.Semaphore(limits.max_in_flight)
        self._down_until = float("-inf")

    async def open(self) -> None:
        await self._inner.open()

    async def close(self) -> None:
        """Ends the questions under way (their askers get CatalogUnavailable), then closes the inner catalog."""
        questions = list(self._questions.values())
        for question in questions:
            question.cancel()
        await asyncio.gather(*questions, return_exceptions=True)
        await self._inner.close()

    async def look_up(self, object_id: ObjectId) -> MediaObject | None:
        kept = self._kept.get(object_id)
        if kept is not None:
            self._kept.move_to_end(object_id)
            now = self._clock()
            if now < kept.fresh_until or now < self._down_until:
                return kept.answer
        try:
            return await self._shared_question(object_id)
        except CatalogUnavailable as error:
            kept = self._kept.get(object_id)
            if kept is None:
                raise
            _log.warning("catalog_answer_stale", object_id=object_id, reason=str(error))
            return kept.answer

    def list_objects(self, duty: Duty) -> AsyncIterator[Sequence[MediaObject]]:
        return self._inner.list_objects(duty)

    async def bucket_ids(self) -> Sequence[str]:
        return await self._inner.bucket_ids()

    async def _shared_question(self, object_id: ObjectId) -> MediaObject | None:
        question = self._questions.get(object_id)
        if question is None:
            question = asyncio.create_task(self._ask(object_id), name=f"catalog question {object_id}")
            self._questions[object_id] = question
        # Shielded: the question goes on without the asker who leaves, even the last one. It is bounded by the inner
        # catalog's time-out, its answer is kept for whoever asks next, and `close` ends it.
        try:
            return await asyncio.shield(question)
        except asyncio.CancelledError:
            asker = asyncio.current_task()
            if question.cancelled() and not (asker is not None and asker.cancelling()):
                raise CatalogUnavailable("the catalog is being closed") from None
            raise

    async def _ask(self, object_id: ObjectId) -> MediaObject | None:
        try:
            await self._take_turn()
            try:
                answer = await self._inner.look_up(object_id)
            except CatalogUnavailable:
                self._down_until = self._clock() + self._limits.outage_pause
                raise
            finally:
                self._turns.release()
            self._keep(object_id, answer)
            return answer
        finally:
            del self._questions[object_id]

    async def _take_turn(self) -> None:
        try:
            async with asyncio.timeout(self._limits.wait):
                await self._turns.acquire()
        except TimeoutError as error:
            raise CatalogUnavailable(
                f"{self._limits.max_in_flight} questions to the catalog were under way for {self._limits.wait:g} s"
            ) from error

    def _keep(self, object_id: ObjectId, answer: MediaObject | None) -> None:
        self._down_until = float("-inf")
        lifetime = self._limits.negative_ttl if answer is None else self._limits.positive_ttl
        self._kept[object_id] = _Kept(answer, self._clock() + lifetime)
        self._kept.move_to_end(object_id)
        while len(self._kept) > self._limits.max_entries:
            self._kept.popitem(last=False)
