"""The cache in front of a slow catalog: answers kept, one question an object, the last good answer when it is down."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from shared.adapters.catalogs.shared_answers import Inquiry, SharedAnswers, SharedTimes
from shared.domain.errors import CatalogUnavailable
from shared.domain.objects import Duty, MediaObject, ObjectId
from shared.observability.metrics import CATALOG_LOOKUPS
from shared.ports.catalog import Catalog
from shared.ports.catalog_memory import CatalogMemory

_Answer = TypeVar("_Answer")

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class CacheLimits:
    """Times in seconds. `wait`: for an answer in all, the wait for one's turn while `max_in_flight` questions are under
    way included. `negative_ttl`: also for objects that cannot be had yet, not being accepted or without a source.
    `outage_pause`: after a failed question, stale answers are given at once for so long, instead of after another
    time-out each. `stale_wait`: how long a slow catalog is waited for where an object is known from before."""

    positive_ttl: float
    negative_ttl: float
    max_in_flight: int
    wait: float
    max_entries: int = 100_000
    outage_pause: float = 5.0
    stale_wait: float = 0.5
    buckets_ttl: float = 30.0


@dataclass(frozen=True, slots=True)
class _Kept:
    answer: MediaObject | None
    fresh_until: float


class CachedCatalog:
    """Wraps any catalog. Answers older than their time to live are asked anew, yet kept for outages until the bounded
    cache (least recently asked first) drops them. A `does not exist` is kept likewise. With a memory, the processes
    that share it ask once for all, and one that has just started knows what the others have learnt."""

    def __init__(
        self,
        inner: Catalog,
        limits: CacheLimits,
        clock: Callable[[], float] = time.monotonic,
        memory: CatalogMemory | None = None,
    ) -> None:
        """`clock` in seconds; `open` and `close` are passed on to the inner catalog and the memory."""
        self._inner = inner
        self._limits = limits
        self._clock = clock
        self._shared = SharedAnswers(memory, SharedTimes(question=limits.wait + 0.5))
        self._buckets: tuple[Sequence[str] | CatalogUnavailable, float] | None = None
        self._buckets_question: asyncio.Task[Sequence[str]] | None = None
        self._kept: OrderedDict[ObjectId, _Kept] = OrderedDict()
        self._questions: dict[ObjectId, asyncio.Task[MediaObject | None]] = {}
        self._turns = asyncio.Semaphore(limits.max_in_flight)
        self._down_until = float("-inf")

    async def open(self) -> None:
        await self._shared.open()
        await self._inner.open()

    async def close(self) -> None:
        """Ends the questions under way (their askers get CatalogUnavailable), then closes the inner catalog."""
        questions: list[asyncio.Task[Any]] = list(self._questions.values())
        if self._buckets_question is not None:
            questions.append(self._buckets_question)
        for question in questions:
            question.cancel()
        await asyncio.gather(*questions, return_exceptions=True)
        await self._inner.close()
        await self._shared.close()

    async def look_up(self, object_id: ObjectId) -> MediaObject | None:
        kept = self._kept.get(object_id)
        if kept is not None:
            self._kept.move_to_end(object_id)
            now = self._clock()
            if now < kept.fresh_until or now < self._down_until:
                CATALOG_LOOKUPS.labels(result="cached" if now < kept.fresh_until else "stale").inc()
                return kept.answer
        known = kept is not None and _can_be_had(kept.answer)
        try:
            # The question goes on when an asker who knows the object leaves it; its answer is for the next one.
            async with asyncio.timeout(self._limits.stale_wait if known else None):
                return await self._shared_question(object_id)
        except (CatalogUnavailable, TimeoutError) as error:
            kept = self._kept.get(object_id)
            if kept is None:
                CATALOG_LOOKUPS.labels(result="unavailable").inc()
                raise
            CATALOG_LOOKUPS.labels(result="stale").inc()
            _log.warning("catalog_answer_stale", object_id=object_id, reason=str(error) or "slow")
            return kept.answer

    def list_objects(self, duty: Duty) -> AsyncIterator[Sequence[MediaObject]]:
        return self._inner.list_objects(duty)

    async def bucket_ids(self) -> Sequence[str]:
        """Anybody may ask for this, by /readyz and /buckets: one question at a time, its answer or failure kept."""
        if self._buckets is not None and self._clock() < self._buckets[1]:
            if isinstance(self._buckets[0], CatalogUnavailable):
                raise CatalogUnavailable(str(self._buckets[0]))
            return self._buckets[0]
        if self._buckets_question is None:
            self._buckets_question = asyncio.create_task(
                self._ask_buckets(), name="catalog question of buckets"
            )
        return await _answer_of(self._buckets_question)

    async def _ask_buckets(self) -> Sequence[str]:
        try:
            async with asyncio.timeout(self._limits.wait):
                buckets = await self._inner.bucket_ids()
        except TimeoutError as error:
            raise self._without_buckets(f"no list of buckets in {self._limits.wait:g} s") from error
        except CatalogUnavailable as error:
            raise self._without_buckets(str(error)) from error
        else:
            self._buckets = (buckets, self._clock() + self._limits.buckets_ttl)
            return buckets
        finally:
            self._buckets_question = None

    def _without_buckets(self, reason: str) -> CatalogUnavailable:
        failure = CatalogUnavailable(reason)
        self._buckets = (failure, self._clock() + self._limits.outage_pause)
        return failure

    async def source_bases(self) -> Sequence[str]:
        return await self._inner.source_bases()

    async def _shared_question(self, object_id: ObjectId) -> MediaObject | None:
        question = self._questions.get(object_id)
        if question is None:
            question = asyncio.create_task(self._ask(object_id), name=f"catalog question {object_id}")
            self._questions[object_id] = question
        return await _answer_of(question)

    async def _ask(self, object_id: ObjectId) -> MediaObject | None:
        inquiry = Inquiry(self._shared, object_id)
        try:
            async with asyncio.timeout(self._limits.wait):
                return await self._find_out(object_id, inquiry)
        except TimeoutError as error:
            self._keep_stale(object_id, inquiry)
            raise CatalogUnavailable(f"the catalog gave no answer in {self._limits.wait:g} s") from error
        except CatalogUnavailable:
            self._keep_stale(object_id, inquiry)
            raise
        finally:
            del self._questions[object_id]
            if inquiry.asking:
                await self._shared.give_up(object_id)

    async def _find_out(self, object_id: ObjectId, inquiry: Inquiry) -> MediaObject | None:
        """From the shared memory, or else from the inner catalog."""
        if self._clock() < self._down_until:
            inquiry.remembered = await self._shared.recall(object_id)
            if inquiry.remembered is not None:
                raise CatalogUnavailable("the catalog was down a moment ago")
        remembered = await inquiry.settle()
        if remembered is not None:
            CATALOG_LOOKUPS.labels(result="cached").inc()
            self._keep(object_id, remembered.answer, remembered.fresh_left)
            return remembered.answer
        async with self._turns:
            try:
                answer = await self._inner.look_up(object_id)
            except (CatalogUnavailable, asyncio.CancelledError):
                # Cancelled: the time was up, or the catalog is being closed, when nobody asks any more.
                self._down_until = self._clock() + self._limits.outage_pause
                raise
        CATALOG_LOOKUPS.labels(result="unknown" if answer is None else "found").inc()
        self._down_until = float("-inf")
        lifetime = self._limits.positive_ttl if _can_be_had(answer) else self._limits.negative_ttl
        self._keep(object_id, answer, lifetime)
        await self._shared.remember(object_id, answer, lifetime)
        inquiry.asking = False
        return answer

    def _keep_stale(self, object_id: ObjectId, inquiry: Inquiry) -> None:
        """What the other processes knew is better than nothing, for this outage."""
        if inquiry.remembered is not None and object_id not in self._kept:
            self._keep(object_id, inquiry.remembered.answer, inquiry.remembered.fresh_left)

    def _keep(self, object_id: ObjectId, answer: MediaObject | None, lifetime: float) -> None:
        self._kept[object_id] = _Kept(answer, self._clock() + lifetime)
        self._kept.move_to_end(object_id)
        while len(self._kept) > self._limits.max_entries:
            self._kept.popitem(last=False)


async def _answer_of(question: asyncio.Task[_Answer]) -> _Answer:
    """Shielded: a question goes on without the asker who leaves, even the last one. It is bounded in time, its answer
    is kept for whoever asks next, and `close` ends it."""
    try:
        return await asyncio.shield(question)
    except asyncio.CancelledError:
        asker = asyncio.current_task()
        if question.cancelled() and not (asker is not None and asker.cancelling()):
            raise CatalogUnavailable("the catalog is being closed") from None
        raise


def _can_be_had(answer: MediaObject | None) -> bool:
    return answer is not None and answer.accepted and bool(answer.sources)
