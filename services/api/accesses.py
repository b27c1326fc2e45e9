"""Tells the other services what clients ask for: accesses, which objects have viewers now, and where these are.

Accesses are counted in process and written in batches, so that a hit costs no call.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from time import monotonic
from typing import Any

import structlog

from distributor_node.shared.domain.errors import StateStoreUnavailable
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import Followed, ViewCoalescer, Viewer
from distributor_node.shared.observability.logging import OutageLog
from distributor_node.shared.observability.metrics import DROPPED_ACCESSES
from distributor_node.shared.ports.state_store import MAX_VIEWED, MAX_WANTED, Access, StateStore
from distributor_node.shared.runtime.process import process_name
from distributor_node.shared.waiting import background

FLUSH_INTERVAL = 1.0
MAX_PENDING = 10_000
FINAL_FLUSH_TIMEOUT = 1.0
"""Seconds, a part of what the shutdown deadline leaves for closing."""
ACCESS_RENEWAL_INTERVAL = 5.0
"""Seconds between renewals of the last access while a long response is being sent."""

logger = structlog.get_logger()


@dataclass(slots=True)
class _PendingAccess:
    views: int
    last_at: float  # POSIX seconds


class AccessCounter:
    """Collects accesses in memory. `run` writes them to the state store. Counting never waits and never fails.

    While the store is down at most `max_pending` objects are kept, those accessed last.
    """

    def __init__(
        self,
        state: StateStore,
        clock: Callable[[], float] = time.time,
        max_pending: int = MAX_PENDING,
        observe: Callable[[Iterable[ObjectId]], None] | None = None,
    ) -> None:
        """`clock`: POSIX time in seconds. `observe`: is told, with each batch, of which objects it is."""
        self._observe = observe
        self._state = state
        self._clock = clock
        self._max_pending = max_pending
        self._pending: OrderedDict[ObjectId, _PendingAccess] = OrderedDict()
        self._views = ViewCoalescer()
        self._outage = OutageLog(logger, down="access_flush_failed", up="access_flush_recovered")

    def record_request(self, object_id: ObjectId) -> None:
        """Count a response with bytes of this object, and renew its last access."""
        now = self._clock()
        self._add(object_id, int(self._views.begins_view(object_id, now)), now)

    def touch(self, object_id: ObjectId) -> None:
        """Renew the last access of this object without counting a view."""
        self._add(object_id, 0, self._clock())

    def _add(self, object_id: ObjectId, views: int, now: float) -> None:
        pending = self._pending.get(object_id)
        if pending is None:
            self._pending[object_id] = _PendingAccess(views, now)
            if len(self._pending) > self._max_pending:
                self._pending.popitem(last=False)
                DROPPED_ACCESSES.inc()
            return
        pending.views += views
        pending.last_at = max(pending.last_at, now)
        self._pending.move_to_end(object_id)

    async def run(self, interval: float = FLUSH_INTERVAL) -> None:
        """Flush every `interval` seconds, until cancelled."""
        while True:
            await asyncio.sleep(interval)
            await self.flush()

    async def flush(self) -> None:
        """Write pending accesses to the state store. If that fails they are kept for the next flush.

        A cancelled flush keeps them too. The store may have them already, and counting twice is better than not at all.
        """
        if not self._pending:
            return
        batch, self._pending = self._pending, OrderedDict()
        if self._observe is not None:
            self._observe(batch)
        accesses = [Access(object_id, counted.views, counted.last_at) for object_id, counted in batch.items()]
        try:
            await self._state.record_accesses(accesses)
        except StateStoreUnavailable as error:
            self._outage.failed(error)
            self._requeue(accesses)
            return
        except asyncio.CancelledError:
            self._requeue(accesses)
            raise
        self._outage.succeeded(objects=len(accesses))

    async def close(self, timeout: float = FINAL_FLUSH_TIMEOUT) -> None:
        """Flush for the last time, within `timeout` seconds. What is left then is dropped."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self.flush()
        if self._pending:
            DROPPED_ACCESSES.inc(len(self._pending))
            logger.warning("accesses_dropped", objects=len(self._pending))
            self._pending.clear()

    def _requeue(self, accesses: Sequence[Access]) -> None:
        newer, self._pending = self._pending, OrderedDict()
        for access in accesses:
            self._add(access.object_id, access.views, access.last_at)
        for object_id, counted in newer.items():
            self._add(object_id, counted.views, counted.last_at)


class AccessRenewal:
    """Renews the last access of an object while a long response is being sent."""

    def __init__(self, accesses: AccessCounter, object_id: ObjectId) -> None:
        self._accesses, self._object_id, self._renewed_at = accesses, object_id, monotonic()

    def touch_if_due(self) -> None:
        now = monotonic()
        if now - self._renewed_at >= ACCESS_RENEWAL_INTERVAL:
            self._renewed_at = now
            self._accesses.touch(self._object_id)


REPORT_INTERVAL = 2.0
"""Seconds between two reports: less than the time for which one counts as current."""
MAX_POSITIONS = 200
"""Viewers whose positions one process tells."""
Position = Callable[[], int]
"""Returns the first byte that a viewer has not got yet."""

FOLLOWERS_PAUSE = 0.02
"""Seconds between two reports of where viewers of large objects are, at least."""
MAX_FOLLOWERS = 64
"""Places of viewers of one object that a process reports. If there are more, all of the object is fetched."""
_MAX_FOLLOWED = 200  # objects in one report

_WANTED_PAUSE = 0.01  # seconds between two reports of positions: those that come in between go together
_MAX_WANTING = 1_000  # objects in one of them


class Follower:
    """A request for a large object. While it `follows`, its response is sent from the partial file."""

    def __init__(self, object_id: ObjectId, first: int, position: Position) -> None:
        """`first`: of the bytes that it needs."""
        self.object_id = object_id
        self.first = first
        self.position = position
        self.follows = False
        self.told = -1  # the position that was reported last


class Viewers:
    """Objects that are requested while they are not cached. `run` is its task. No request waits for the state store."""

    def __init__(self, state: StateStore, window: int | None = None) -> None:
        """`window`: bytes that the fetch of a large object may be ahead of its viewers."""
        self._state = state
        self._process = process_name()
        self._step = 0 if window is None else window // 4  # bytes between two reports of a viewer
        self._followers: dict[ObjectId, dict[Follower, None]] = {}
        self._followed: dict[ObjectId, bool] = {}  # since the last report; whether a request has begun
        self._to_tell: dict[ObjectId, None] = {}
        self._has_to_tell = asyncio.Event()
        self._viewing: Counter[ObjectId] = Counter()
        self._positions: dict[int, tuple[ObjectId, Position]] = {}
        self._serial = count(1)
        self._left: dict[ObjectId, None] = {}  # since the last report
        self._wanted: dict[ObjectId, dict[int, None]] = {}  # not reported yet
        self._has_wanted = asyncio.Event()
        self._outage = OutageLog(logger, down="viewers_not_reported", up="viewers_reported")

    @contextmanager
    def viewing(self, object_id: ObjectId, position: Position) -> Iterator[None]:
        """A client reads the object, or waits for it, during the block."""
        self._viewing[object_id] += 1
        serial = next(self._serial)
        if len(self._positions) < MAX_POSITIONS:
            self._positions[serial] = object_id, position
        try:
            yield
        finally:
            self._positions.pop(serial, None)
            self._viewing[object_id] -= 1
            if not self._viewing[object_id]:
                del self._viewing[object_id]
            if len(self._left) < MAX_VIEWED:
                self._left[object_id] = None

    @contextmanager
    def requesting(
        self, object_id: ObjectId, first: int, position: Position, *, begins_view: bool = True
    ) -> Iterator[Follower]:
        """A client requests a large object during the block, of which it needs the bytes from `first` on.

        `begins_view`: it may be a new viewer, not one that reads on or jumps.
        """
        follower = Follower(object_id, first, position)
        self._followers.setdefault(object_id, {})[follower] = None
        self._followed[object_id] = begins_view or self._followed.get(object_id, False)
        self._tell(object_id)
        try:
            yield follower
        finally:
            followers = self._followers[object_id]
            del followers[follower]
            if not followers:
                del self._followers[object_id]
            self._followed.setdefault(object_id, False)

    def follow(self, follower: Follower, follows: bool = True) -> None:
        """The response is sent from the partial file from now on, or no longer."""
        if follower.follows is not follows:
            follower.follows = follows
            self._tell(follower.object_id)

    def come_near(self, follower: Follower) -> None:
        """The client has got so far that the fetch has to go on soon. Reported at once, if it is news."""
        if follower.position() - follower.told >= self._step:
            self._tell(follower.object_id)

    def _tell(self, object_id: ObjectId) -> None:
        self._to_tell[object_id] = None
        self._has_to_tell.set()

    def _report_of(self, object_id: ObjectId) -> Followed | None:
        """Return where the viewers of the object are. None: at too many places."""
        places: dict[tuple[int, int], Viewer] = {}
        for follower in self._followers.get(object_id, ()):
            if follower.follows:
                position = follower.position()
                follower.told = position
                # Viewers that are close together count as the one that is ahead.
                place = follower.first, position // max(1, self._step)
                if place not in places or places[place].position < position:
                    places[place] = Viewer(follower.first, position)
        # Race: 1. a viewer comes near, 2. it leaves, 3. this report tells of both. If the report at intervals told
        # after that of an object with viewers at unknown places, its fetch would read on without a limit.
        self._left.pop(object_id, None)
        if len(places) > MAX_FOLLOWERS:
            return None
        return Followed(object_id, tuple(places.values()), requested=self._followed.pop(object_id, False))

    async def positions(self, watched: bool) -> Mapping[str, Any]:
        """Return who reads where, for the node's page: by object, a number of the viewer and the byte it has got to."""
        if not watched:
            return {}
        viewers: dict[str, list[tuple[int, int]]] = {}
        for serial, (object_id, position) in self._positions.items():
            viewers.setdefault(object_id, []).append((serial, position()))
        return {"viewers": viewers}

    def want(self, object_id: ObjectId, position: int) -> None:
        """A client waits for the byte at `position`, which its fetch may bring first. Reported at once."""
        if object_id in self._wanted or len(self._wanted) < _MAX_WANTING:
            self._wanted.setdefault(object_id, {})[position] = None
            self._has_wanted.set()

    async def run(self) -> None:
        """Report at intervals, until cancelled."""
        async with (
            background(self._report_wanted(), "wanted-positions"),
            background(self._report_near(), "followers"),
        ):
            while True:
                await asyncio.sleep(REPORT_INTERVAL)
                await self.report()

    async def _report_wanted(self) -> None:
        while True:
            await self._has_wanted.wait()
            self._has_wanted.clear()
            wanted, self._wanted = self._wanted, {}
            for object_id, positions in wanted.items():
                try:
                    await self._state.record_wanted(object_id, list(positions)[-MAX_WANTED:])
                except StateStoreUnavailable as error:
                    # Clients that go on waiting say so again, or are served from a source.
                    logger.debug("positions_not_reported", reason=str(error))
                    break
            await asyncio.sleep(_WANTED_PAUSE)

    async def _report_near(self) -> None:
        while True:
            await self._has_to_tell.wait()
            self._has_to_tell.clear()
            objects, self._to_tell = self._to_tell, {}
            try:
                await self._report_followers(list(objects))
            except StateStoreUnavailable as error:
                logger.debug("followers_not_reported", reason=str(error))  # the next report tells
            await asyncio.sleep(FOLLOWERS_PAUSE)

    async def _report_followers(self, object_ids: Sequence[ObjectId]) -> None:
        for first in range(0, len(object_ids), _MAX_FOLLOWED):
            reports = {one: self._report_of(one) for one in object_ids[first : first + _MAX_FOLLOWED]}
            known = [report for report in reports.values() if report is not None]
            try:
                await self._state.record_followers(self._process, known)
                await self._state.record_viewers([one for one, report in reports.items() if report is None])
            except BaseException:
                self._followed |= {report.object_id: True for report in known if report.requested}
                raise

    async def report(self) -> None:
        """Report once. What could not be reported is dropped: the next report is as good."""
        left, self._left = self._left, {}
        followed = list(dict.fromkeys([*self._followed, *self._followers]))
        viewed = dict.fromkeys(one for one in (*left, *self._viewing) if one not in set(followed))
        objects = list(viewed)[-MAX_VIEWED:]
        try:
            await self._state.record_viewers(objects)
            await self._report_followers(followed)
        except StateStoreUnavailable as error:
            self._outage.failed(str(error))
        else:
            self._outage.succeeded()
