"""Whether it is worth waiting for a fetch to begin. If no fetch can begin in time, requests are proxied at once.

What is known of the fetchers comes from their heartbeats, which are read in the background: no request waits for the
state store because of this. What heartbeats cannot tell (a queue that is not consumed, a store that is down) is learnt
from waits that were in vain, with a circuit breaker. Events of single fetches end the waits for them.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum

import structlog

from distributor_node.shared.adapters.volume import ChangeWatch, Volume
from distributor_node.shared.domain.errors import StateStoreUnavailable
from distributor_node.shared.domain.objects import ObjectId, source_name
from distributor_node.shared.observability.logging import OutageLog
from distributor_node.shared.observability.metrics import VAIN_WAITS, WORKER_SLOTS, WORKERS_ALIVE
from distributor_node.shared.ports.state_store import Announcement, StateStore, Topic, WorkerReport

POLL_INTERVAL = 0.5
"""Seconds between two looks at the heartbeats."""

START_GRACE = 5.0
"""Seconds after this process began within which a fetcher may be about to begin too: its absence says nothing yet."""

BUSY_WAIT = 0.5
"""Seconds that jobs have waited for a slot from which on a queue counts as standing. A shorter queue moves."""

TRIAL_INTERVAL = 10.0
"""Seconds between two requests that wait although the last ones did in vain, to learn whether fetches begin again."""

_MAX_VAIN_IN_A_ROW = 3
"""Objects whose fetch did not begin in time, one after the other, after which heartbeats are not believed."""

_MAX_NOT_BEGUN = 10_000

logger = structlog.get_logger()


class VainReason(StrEnum):
    """Why a fetch is not expected to begin in time."""

    NO_WORKER = "no_worker"  # no fetcher is alive
    BUSY = "busy"  # no slot is free, in total or of the object's sources
    NOT_BEGUN = "not_begun"  # the job of this object was waited for in vain, and has not begun since
    NOT_CONSUMED = "not_consumed"  # no job of any object has begun since one was waited for in vain


class FetchCapacity:
    """What this process knows of the fetchers. `run` is its task. All other methods use memory only."""

    def __init__(self, state: StateStore, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: in seconds."""
        self._state = state
        self._clock = clock
        self._absence_counts_at = clock() + START_GRACE
        self._reports: Sequence[WorkerReport] | None = None
        self._reported_at = float("-inf")  # the newest heartbeat of a worker with a free slot
        self._not_begun: OrderedDict[ObjectId, None] = OrderedDict()
        self._vain_in_a_row = 0
        self._vain_since = float("-inf")  # when the last wait in vain began
        self._next_trial_at = float("-inf")
        self._outage = OutageLog(logger, down="worker_reports_unavailable", up="worker_reports_available")
        self._no_worker = OutageLog(logger, down="no_worker_alive", up="worker_alive")

    async def run(self) -> None:
        """Read the heartbeats at intervals, until cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(POLL_INTERVAL)

    async def refresh(self) -> None:
        """Read the heartbeats once. While the store is unavailable, nothing is known of the fetchers."""
        try:
            reports = await self._state.workers()
        except StateStoreUnavailable as error:
            self._reports = None
            self._outage.failed(reason=str(error))
            return
        self._outage.succeeded()
        self._reports = reports
        if reports:
            self._absence_counts_at = float("-inf")
        fresh = [self._clock() - report.age for report in reports if _has_free_slot(report, ())]
        self._reported_at = max([self._reported_at, *fresh])
        self._report_changes(reports)

    def _report_changes(self, reports: Sequence[WorkerReport]) -> None:
        WORKERS_ALIVE.set(len(reports))
        for state, jobs in (("busy", self.running or 0), ("free", self.free), ("wanted", self.waiting or 0)):
            WORKER_SLOTS.labels(state=state).set(jobs)
        if reports:
            self._no_worker.succeeded(workers=len(reports))
        elif self._clock() >= self._absence_counts_at:
            self._no_worker.failed("no fetcher has reported lately")

    # What is known

    @property
    def workers_alive(self) -> int | None:
        """Number of fetchers that are alive. None: the state store is unavailable."""
        return None if self._reports is None else len(self._reports)

    @property
    def waiting(self) -> int | None:
        """Jobs that fetchers hold and that wait for a slot. None: the state store is unavailable."""
        return None if self._reports is None else sum(report.waiting for report in self._reports)

    @property
    def running(self) -> int | None:
        """Jobs that have a slot. None: the state store is unavailable."""
        return None if self._reports is None else sum(report.running for report in self._reports)

    @property
    def free(self) -> int:
        """Free slots."""
        return sum(max(0, report.slots - report.running) for report in self._reports or ())

    @property
    def not_consumed(self) -> bool:
        """Whether requests do not wait because jobs did not begin in time, although slots seemed to be free."""
        return self._is_suspect

    def vain_reason(
        self, object_id: ObjectId, sources: Sequence[str] = (), *, waits: bool = False
    ) -> VainReason | None:
        """Return why waiting for a job of this object to begin is vain; None: it is not.

        `sources`: URLs, empty if they are unknown. `waits`: the request was allowed to wait before, and only the
        heartbeats can change that.
        """
        if self._reports is not None:
            if not self._reports:
                if self._clock() >= self._absence_counts_at:
                    return VainReason.NO_WORKER
            elif all(_is_busy(report, sources) for report in self._reports):
                return VainReason.BUSY
        if waits:
            return None
        if object_id in self._not_begun:
            return VainReason.NOT_BEGUN
        return VainReason.NOT_CONSUMED if self._is_suspect and not self._take_trial() else None

    @property
    def _is_suspect(self) -> bool:
        """One wait in vain is enough, unless a worker with a free slot was alive during it."""
        vouched = self._reported_at > self._vain_since
        return self._vain_in_a_row >= (_MAX_VAIN_IN_A_ROW if vouched else 1)

    def _take_trial(self) -> bool:
        now = self._clock()
        if now < self._next_trial_at:
            return False
        self._next_trial_at = now + TRIAL_INTERVAL
        return True

    # What was seen

    def record_begun(self, object_id: ObjectId) -> None:
        """A worker fetches the object, or has fetched it."""
        self._not_begun.pop(object_id, None)
        self._vain_in_a_row = 0

    def record_vain(self, object_id: ObjectId, began_at: float) -> None:
        """A request has waited for a job of this object since `began_at` (monotonic), and it did not begin in time."""
        VAIN_WAITS.labels(reason="waited").inc()
        if object_id not in self._not_begun:
            self._vain_in_a_row += 1
        self._vain_since = max(self._vain_since, began_at)
        self._next_trial_at = self._clock() + TRIAL_INTERVAL
        self._not_begun[object_id] = None
        if len(self._not_begun) > _MAX_NOT_BEGUN:
            self._not_begun.popitem(last=False)


def _has_free_slot(report: WorkerReport, sources: Iterable[str]) -> bool:
    names = {source_name(url) for url in sources}
    return report.running < report.slots and not (names and names <= set(report.full_sources))


def _is_busy(report: WorkerReport, sources: Iterable[str]) -> bool:
    return not _has_free_slot(report, sources) and report.longest_wait >= BUSY_WAIT


_RECONNECT_DELAY = 1.0


class FetchEvents:
    """One subscription per process. Events may be lost, so waiters must also poll.

    Where the kernel tells of it, a file that has its first bytes or was verified wakes its waiters before the
    announcement arrives, which takes two processes more. A verified file is locked for readers by then: it is marked
    after that.
    """

    def __init__(
        self,
        state: StateStore,
        on_settings: Callable[[], None] | None = None,
        volume: Volume | None = None,
    ) -> None:
        """`on_settings` is called when the operator state may have changed. `volume`: its partial files are watched."""
        self._state = state
        self._on_settings = on_settings
        self._volume = volume
        self._watch: ChangeWatch | None = None
        self._replacements = -1  # of the volume, when its watch began; -1: it has not
        self._waiting: dict[ObjectId, set[asyncio.Future[bool]]] = {}

    async def wait(self, object_id: ObjectId, timeout: float) -> bool:
        """Wait for a change of this object's fetch. Returns False after `timeout` seconds without one."""
        if self._volume is not None and -1 < self._replacements != self._volume.replacements:
            self._start_watch()
        # One future and one timer: a response waits like this for each megabyte of its object.
        loop = asyncio.get_running_loop()
        changed: asyncio.Future[bool] = loop.create_future()
        timer = loop.call_later(timeout, _end_wait, changed, False)
        self._waiting.setdefault(object_id, set()).add(changed)
        try:
            return await changed
        finally:
            timer.cancel()
            others = self._waiting[object_id]
            others.discard(changed)
            if not others:
                del self._waiting[object_id]

    @property
    def waiting(self) -> int:
        """The number of objects that requests wait for."""
        return len(self._waiting)

    async def run(self) -> None:
        """Listen until cancelled. While the store is down only the kernel's events arrive, and waiters for others time
        out."""
        self._start_watch()
        try:
            while True:
                try:
                    async with self._state.listen() as announcements:
                        async for announcement in announcements:
                            self._wake(announcement)
                except StateStoreUnavailable as error:
                    logger.warning("fetch_event_subscription_lost", reason=str(error))
                await asyncio.sleep(_RECONNECT_DELAY)
        finally:
            self._stop_watch()
            self._replacements = -1

    def _start_watch(self) -> None:
        """Watch the partial files of the volume that is mounted now."""
        self._stop_watch()
        if self._volume is None:
            return
        self._replacements = self._volume.replacements
        self._watch = self._volume.watch_partials()
        if self._watch is not None:
            asyncio.get_running_loop().add_reader(self._watch.descriptor, self._on_partials)

    def _stop_watch(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            asyncio.get_running_loop().remove_reader(watch.descriptor)
            watch.close()

    def _on_partials(self) -> None:
        changed = set() if self._watch is None else self._watch.read_partials()
        if changed is None:
            self._start_watch()
            self._wake_all()
            return
        for object_id in changed:
            self._wake_object(ObjectId(object_id))

    def _wake(self, announcement: Announcement) -> None:
        if announcement.topic is Topic.FETCH_CHANGED:
            self._wake_object(ObjectId(announcement.object_id))
        elif announcement.topic is Topic.SETTINGS_CHANGED:
            if self._on_settings is not None:
                self._on_settings()
            # Also announced after every reconnect: announcements may have been missed.
            self._wake_all()

    def _wake_object(self, object_id: ObjectId) -> None:
        for changed in self._waiting.get(object_id, ()):
            _end_wait(changed, True)

    def _wake_all(self) -> None:
        for object_id in self._waiting:
            self._wake_object(object_id)


def _end_wait(changed: asyncio.Future[bool], came: bool) -> None:
    if not changed.done():
        changed.set_result(came)
