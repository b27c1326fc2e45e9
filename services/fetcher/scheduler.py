"""Decides which job gets a download slot next, and reports to the other processes how busy this worker is.

The worker holds more jobs than it runs, because a queue on the broker cannot reorder jobs by what happens after they
were published. A held job is an unacknowledged message, so it is redelivered if the worker dies.

1. A job arrives and waits.
2. Slots are limited in total and per source. A free slot goes to the waiting job with the highest priority of those for
   which a source has a free slot: objects with viewers first, then objects that had viewers, then warming.
3. Jobs that wait while another worker has free slots are returned to the queue.
4. When too many jobs wait, those with the lowest priority go to the delay queue, so that this worker keeps seeing new
   jobs: their source may have a free slot.
5. A download that waits for its viewers has no slot. It takes one again without waiting when a viewer needs it. When
   too many downloads wait like that, the one that has waited for longest is asked to end: its message is held, too.
6. A download that waits keeps room for its whole object. While another object needs that room, and the evictor finds no
   other, those that have waited for longest are asked to end: as many as are needed.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import structlog

from distributor_node.shared.domain.errors import StateStoreUnavailable
from distributor_node.shared.domain.jobs import FetchJob, JobOutcome, Nack, Requeue
from distributor_node.shared.domain.objects import MediaObject, source_name
from distributor_node.shared.observability.logging import OutageLog
from distributor_node.shared.ports.state_store import StateStore, WorkerReport
from distributor_node.shared.waiting import wait_event

HEARTBEAT_INTERVAL = 1.0
HEARTBEAT_TTL = 3.5
"""Seconds from the last heartbeat until the worker counts as dead."""

VIEWED_NOW = 5.0
"""Seconds since the last report of a viewer for which an object counts as being viewed."""

_WAITING_PER_SLOT, _MIN_WAITING = 3, 8
_SPILL_AT = 0.75  # share of the jobs that may wait at which the last ones are delayed
_MAX_SPILLED = 16  # in one interval
_MAX_REPORTED_SOURCES = 100

EVICTION_TIME = 3.0
"""Seconds that the evictor has to make room before paused downloads are asked to end for it."""
DISPLACEMENT_TIME = 3.0
"""Seconds in which a download that was asked to end counts as one that ends. It cannot while a viewer reads from
another stream of it."""
MIN_STAY = 5.0
"""Seconds that a download keeps its room at least: two objects that do not fit together would take turns all the
time, each with another request to its source."""

RankSources = Callable[[MediaObject], Sequence[str]]
"""Returns the URLs of the sources that are worth a download now, best first."""

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class SlotLimits:
    """How many downloads run at once in one worker."""

    total: int
    per_source: int

    @property
    def held(self) -> int:
        """Jobs that a worker takes from the queue at once: those that run, and those that wait for a slot."""
        return self.total + self.waiting

    @property
    def waiting(self) -> int:
        """Jobs that may wait for a slot."""
        return max(self.total * _WAITING_PER_SLOT, _MIN_WAITING)

    @property
    def paused(self) -> int:
        """Downloads that may wait for their viewers, as part of `waiting`."""
        return self.waiting // 2

    @property
    def connections(self) -> int:
        """Connections of downloads at once. Those that wait for their viewers keep theirs."""
        return self.total + self.paused


class Slot:
    """The right of one job to download. It counts for the source in use."""

    def __init__(
        self,
        counts: Counter[str],
        url: str | None,
        on_paused: Callable[[Slot], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_paused`: called when `paused` changes. `clock`: in seconds."""
        self._counts = counts
        self._on_paused = on_paused
        self.url = url
        self._clock = clock
        self.room_since = clock()
        self.displaced_at = float("-inf")  # when it was asked to end for room that others need
        self.paused = False
        self.spare = 0  # while it is paused: bytes that are reserved beyond those on the volume
        self.is_displaced = False  # paused, and asked to end
        self._count(url, 1)

    def move_to(self, url: str) -> None:
        """Another source continues. It may have more downloads than its limit then: nothing waits half way."""
        self._count(self.url, -1)
        self.url = url
        self._count(url, 1)

    def take_room(self) -> None:
        """Room for the object has been reserved, after a wait perhaps."""
        self.room_since = self._clock()

    def pause(self, spare: int = 0) -> None:
        """Leave the slot to others. The source keeps the connection, on which it sends nothing.

        `spare`: bytes of the object that are not on the volume.
        """
        if not self.paused:
            self.spare = spare
            self._count(self.url, -1)
            self._set_paused(True)

    def resume(self) -> None:
        """Take a slot again, be there a free one or not: a viewer needs the bytes."""
        if self.paused:
            self._set_paused(False)
            self._count(self.url, 1)

    def _set_paused(self, paused: bool) -> None:
        self.paused, self.is_displaced, self.displaced_at = paused, False, float("-inf")
        if self._on_paused is not None:
            self._on_paused(self)

    def beside(self) -> Slot:
        """Return a slot for another stream of the same download. It counts for its source, and waits for nothing."""
        return Slot(self._counts, None)

    def release(self) -> None:
        self._count(self.url, -1)
        self.url = None

    def _count(self, url: str | None, change: int) -> None:
        if url is not None and not self.paused:
            name = source_name(url)
            self._counts[name] += change
            if not self._counts[name]:
                del self._counts[name]


@dataclass(slots=True, eq=False)
class _WaitingJob:
    job: FetchJob
    number: int  # counts arrivals
    arrived_at: float
    viewed_at: float  # when it was last known to have a viewer; -inf: never
    granted: asyncio.Future[Slot | JobOutcome] = field(repr=False)

    def rank(self, now: float) -> tuple[int, float, int]:
        """Return the sort key: the smallest is next."""
        if now - self.viewed_at <= VIEWED_NOW:
            return 0, 0.0, self.number
        if self.viewed_at == float("-inf"):
            return 2, 0.0, self.number
        return 1, -self.viewed_at, self.number


class JobScheduler:
    """The slots of one worker. `run` is its task."""

    def __init__(
        self,
        state: StateStore,
        worker: str,
        limits: SlotLimits,
        rank_sources: RankSources,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock`: in seconds."""
        self._state = state
        self._worker = worker
        self._limits = limits
        self._rank_sources = rank_sources
        self._clock = clock
        self._waiting: list[_WaitingJob] = []
        self._paused: dict[Slot, None] = {}  # the one that has waited for longest first
        self._short_since: float | None = None  # since when objects have waited for room that is not made
        self._running = self._arrivals = 0
        self._per_source: Counter[str] = Counter()
        self._changed = asyncio.Event()
        self._outage = OutageLog(logger, down="heartbeat_failed", up="heartbeat_recovered")

    # Jobs

    @asynccontextmanager
    async def slot(self, job: FetchJob) -> AsyncIterator[Slot | JobOutcome]:
        """Wait for a slot, and hold it for the block. A JobOutcome: the job is to run elsewhere or later."""
        now = self._clock()
        age = max(0.0, time.time() - job.published_at)
        viewed_at = float("-inf") if job.low_priority else now - age
        self._arrivals += 1
        waiting = _WaitingJob(job, self._arrivals, now, viewed_at, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._assign()
        slot: Slot | JobOutcome | None = None
        try:
            slot = await waiting.granted
            yield slot
        finally:
            if slot is None and waiting.granted.done() and not waiting.granted.cancelled():
                slot = waiting.granted.result()
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            if isinstance(slot, Slot):
                slot.resume()
                slot.release()
                self._running -= 1
                self._assign()

    def _on_paused(self, slot: Slot) -> None:
        if not slot.paused:
            self._paused.pop(slot, None)
            self._running += 1
            return
        self._paused[slot] = None
        self._running -= 1
        if len(self._paused) > self._limits.paused:
            next(one for one in self._paused if not one.is_displaced).is_displaced = True
        self._assign()

    def has_spare_slot(self, slot: Slot | None) -> bool:
        """Whether a download may read what no viewer needs: no job waits for its slot."""
        if self._waiting:
            return False
        if slot is None or not slot.paused:
            return self._running <= self._limits.total
        free = slot.url is None or self._per_source[source_name(slot.url)] < self._limits.per_source
        return free and self._running < self._limits.total

    def _assign(self) -> None:
        """Give free slots to waiting jobs."""
        if self._running < self._limits.total:
            now = self._clock()
            for waiting in sorted(self._waiting, key=lambda one: one.rank(now)):
                if self._running >= self._limits.total:
                    break
                found, url = self._free_source(waiting.job.media_object)
                if found:
                    self._running += 1
                    self._settle(waiting, Slot(self._per_source, url, self._on_paused, self._clock))
        if self._running >= self._limits.total:
            self._changed.set()

    def _free_source(self, media_object: MediaObject) -> tuple[bool, str | None]:
        """Whether the job can run, and with which source first. Without any source it runs, and fails at once."""
        ranked = self._rank_sources(media_object)
        if not ranked:
            return True, None
        for url in ranked:
            if self._per_source[source_name(url)] < self._limits.per_source:
                return True, url
        return False, None

    def _settle(self, waiting: _WaitingJob, result: Slot | JobOutcome) -> None:
        self._waiting.remove(waiting)
        if waiting.granted.done():  # cancelled
            if isinstance(result, Slot):
                result.release()
                self._running -= 1
        else:
            waiting.granted.set_result(result)

    # Heartbeats and what they tell of the others

    async def run(self) -> None:
        """Report, learn who has viewers, and pass on jobs, at intervals until cancelled."""
        try:
            while True:
                await self.tick()
                self._changed.clear()
                await wait_event(self._changed, HEARTBEAT_INTERVAL)
                if self._changed.is_set():
                    # Reported soon, but not once for each job.
                    await asyncio.sleep(HEARTBEAT_INTERVAL / 4)
        finally:
            await self._withdraw()

    async def tick(self) -> None:
        """Do it once."""
        try:
            await self._state.report_worker(self.report(), HEARTBEAT_TTL)
            if self._waiting:
                await self._update_viewers()
                self._assign()
                self._return_to_queue(await self._state.workers())
            await self._yield_room()
        except StateStoreUnavailable as error:
            self._outage.failed(str(error))
        else:
            self._outage.succeeded()
        self._spill()

    async def _yield_room(self) -> None:
        """Ask paused downloads to end if others need their room."""
        wanted = sum(await self._state.space_requests()) if self._paused else 0
        missing = 0
        if wanted:
            usage = await self._state.usage()
            missing = wanted - usage.free if usage.reconciled else 0
        now = self._clock()
        if missing <= 0:
            self._short_since = None
            return
        if self._short_since is None:
            self._short_since = now
        # One worker after the other: as a rule, what the first one gives is enough.
        names = [report.worker for report in await self._state.workers()]
        turn = 1 + (names.index(self._worker) if self._worker in names else 0)
        if now - self._short_since < turn * EVICTION_TIME:
            return
        missing -= sum(slot.spare for slot in self._paused if now - slot.displaced_at < DISPLACEMENT_TIME)
        candidates = self._displaceable(now)
        if sum(slot.spare for slot in candidates) < missing:
            return  # it would not be enough
        for slot in candidates:
            if missing > 0:
                missing -= slot.spare
                slot.is_displaced, slot.displaced_at = True, now
                source = None if slot.url is None else source_name(slot.url)
                logger.info("paused_download_displaced", source=source, bytes=slot.spare)

    def _displaceable(self, now: float) -> Sequence[Slot]:
        """Paused downloads that may be asked to end for the room that they keep, longest paused first."""
        return [
            slot
            for slot in self._paused
            if slot.spare and not slot.is_displaced and now - slot.room_since >= MIN_STAY
        ]

    def report(self) -> WorkerReport:
        """Return the heartbeat."""
        now = self._clock()
        full = [name for name, count in self._per_source.items() if count >= self._limits.per_source]
        return WorkerReport(
            self._worker,
            self._limits.total,
            self._running,
            len(self._waiting),
            max((now - one.arrived_at for one in self._waiting), default=0.0),
            tuple(full[:_MAX_REPORTED_SOURCES]),
            sum(slot.spare for slot in self._displaceable(now)),
        )

    async def _withdraw(self) -> None:
        try:
            await self._state.withdraw_worker(self._worker)
        except StateStoreUnavailable as error:
            logger.debug("worker_not_withdrawn", reason=str(error))  # its heartbeat expires

    async def _update_viewers(self) -> None:
        waiting = list(self._waiting)
        ages = await self._state.last_viewed([one.job.object_id for one in waiting])
        now = self._clock()
        for one, age in zip(waiting, ages, strict=True):
            if age is not None:
                one.viewed_at = max(one.viewed_at, now - age)

    def _return_to_queue(self, reports: Sequence[WorkerReport]) -> None:
        """Return waiting jobs for which another worker has a free slot. The broker delivers them to that one."""
        now = self._clock()
        for report in reports:
            free = report.slots - report.running - report.waiting
            if report.worker == self._worker or free <= 0:
                continue
            for waiting in sorted(self._waiting, key=lambda one: one.rank(now)):
                names = {source_name(url) for url in self._rank_sources(waiting.job.media_object)}
                if free > 0 and not (names and names <= set(report.full_sources)):
                    free -= 1
                    self._settle(waiting, Nack())

    def _spill(self) -> None:
        """Delay the jobs with the lowest priority while too many wait beside the downloads that are paused."""
        may_wait = self._limits.waiting - len(self._paused)
        surplus = len(self._waiting) - int(may_wait * _SPILL_AT)
        now = self._clock()
        last = sorted(self._waiting, key=lambda one: one.rank(now), reverse=True)
        for waiting in last[: max(0, min(surplus, _MAX_SPILLED))]:
            self._settle(waiting, Requeue("no free slot"))
