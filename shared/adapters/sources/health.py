"""The health of sources: what all processes have seen, plus what this process has seen since the last exchange.

And the prober, which asks sources that are not used.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import structlog

from distributor_node.shared.adapters.sources.connections import Connections, SourceLimits
from distributor_node.shared.domain.errors import SourceError, StateStoreUnavailable, TooManyOpenFiles
from distributor_node.shared.domain.objects import ObjectId, source_name
from distributor_node.shared.domain.source_order import (
    ASSUMED_RATE,
    RATE_MEMORY,
    SourceHealth,
    SourceStatsDelta,
    order,
)
from distributor_node.shared.observability.logging import OutageLog
from distributor_node.shared.observability.metrics import SOURCE_PROBES
from distributor_node.shared.ports.source_stats import CorruptedCopy, SharedSources, SharedSourceStats
from distributor_node.shared.waiting import cancel_and_wait

_MAX_SOURCES = 1_000
_MAX_CORRUPTED = 2_000
_NO_HISTORY = SourceHealth()
_FIRST_RETRY = 5.0
"""Seconds until a corrupted copy that is the only one is asked for again. Doubles with each further failure."""
_Copy = tuple[str, str]  # object id and source name

logger = structlog.get_logger()


_SAME_MARK = 1.0
"""Seconds by which the end of a mark may differ between two exchanges."""


@dataclass(frozen=True, slots=True)
class _CorruptedMark:
    """What is known of one corrupted copy. Times on the registry's clock."""

    ends: float  # when it is forgotten
    retry_at: float  # when it is asked for again, if no source has another copy
    times: int  # how often it was found to be corrupt


class SourceHealthRegistry:
    """Health by source name (`host:port`).

    While the deltas are not exchanged (one process, or the state store is down), it is what this process has seen.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, corrupted_memory: float = 600.0) -> None:
        """`clock`: monotonic seconds. `corrupted_memory`: seconds that a source is not asked for an object after it has
        sent corrupt bytes of it."""
        self.clock = clock
        self._corrupted_memory = corrupted_memory
        self._shared: Mapping[str, SourceHealth] = {}
        self._sent_deltas: Mapping[str, SourceStatsDelta] = {}
        self._deltas: OrderedDict[str, SourceStatsDelta] = OrderedDict()
        self._rates: OrderedDict[str, tuple[float, float]] = OrderedDict()  # and when it is forgotten
        # Corrupted copies, and when to forget them: those found by this process, and those of all processes.
        self._corrupted: OrderedDict[_Copy, _CorruptedMark] = OrderedDict()
        self._corrupted_shared: Mapping[_Copy, _CorruptedMark] = {}
        self._corrupted_sent: list[_Copy] = []
        self._corrupted_delta: list[_Copy] = []

    def best_first(self, sources: Sequence[str], object_id: ObjectId | None = None) -> tuple[str, ...]:
        """Return the URLs in the order to try them, without sources that have a corrupted copy of the object.

        If all have one, those are tried again whose backoff is over.
        """
        usable = [url for url in sources if object_id is None or not self._is_corrupted(object_id, url)]
        if object_id is not None and not usable:
            usable = [url for url in sources if self._may_retry(object_id, url)]
        names = {source_name(url) for url in usable}
        ordered = order(usable, {name: self.health_of(name) for name in names}, self.clock())
        # A source that another one outpaces comes behind those that answer, before those that fail.
        return tuple(
            sorted(ordered, key=lambda url: (self.is_penalised(url), self._is_outpaced(url, usable)))
        )

    def record_rate(self, url: str, rate: float) -> None:
        """Record a sample of a running download, in bytes a second."""
        name, earlier = source_name(url), self.rate_of(url)
        mean = rate if earlier is None else (earlier + rate) / 2
        self._rates[name] = (mean, self.clock() + RATE_MEMORY)
        self._rates.move_to_end(name)
        if len(self._rates) > _MAX_SOURCES:
            self._rates.popitem(last=False)
        self._add(url, SourceStatsDelta(rate=mean))

    def rate_of(self, url: str) -> float | None:
        """Return the recent rate of a source for one download in bytes a second. None: unknown."""
        rate, ends = self._rates.get(source_name(url), (0.0, 0.0))
        return rate if ends > self.clock() else None

    def best_rate(self, urls: Iterable[str]) -> tuple[float, str | None]:
        """Return the highest rate to expect of these sources, and which one has it. Failing ones count as stopped."""
        best: tuple[float, str | None] = (0.0, None)
        for url in urls:
            known = self.rate_of(url)
            rate = ASSUMED_RATE if known is None else known
            if rate > best[0] and not self.is_penalised(url):
                best = (rate, url)
        return best

    def _is_outpaced(self, url: str, urls: Iterable[str]) -> bool:
        rate = self.rate_of(url)
        return rate is not None and rate * 2 < self.best_rate(urls)[0]

    def health_of(self, name: str) -> SourceHealth:
        """Return the health of the source `host:port`."""
        health = self._shared.get(name, _NO_HISTORY)
        for later in (self._sent_deltas, self._deltas):
            if name in later:
                health = later[name].apply_to(health)
        return health

    def is_penalised(self, url: str) -> bool:
        """Whether the source failed lately, so that it ranks behind the others."""
        return self.health_of(source_name(url)).penalty_ends > self.clock()

    def names(self) -> frozenset[str]:
        """Return all sources with any history."""
        return frozenset((*self._shared, *self._sent_deltas, *self._deltas))

    def record_first_byte(self, url: str, seconds: float) -> None:
        """Record that the source responded, with its first byte `seconds` after the request."""
        self._add(url, SourceStatsDelta(SourceHealth(first_bytes=(seconds,))))

    def record_success(self, url: str) -> None:
        """Record that a download was complete."""
        health = self.health_of(source_name(url))
        if health.failures or health.unreachable_at is not None:
            self._add(url, SourceStatsDelta(succeeded=True, reached=True))

    def record_failure(self, url: str) -> None:
        """Record a failure that is likely to affect other objects too."""
        self._add(url, SourceStatsDelta(SourceHealth(failures=1, last_failure_at=self.clock())))

    def record_probe(self, url: str, seconds: float | None) -> None:
        """Record a probe: answered after `seconds`, or (None) not answered. Failed downloads keep counting."""
        if seconds is None:
            self._add(url, SourceStatsDelta(SourceHealth(unreachable_at=self.clock())))
        else:
            self._add(url, SourceStatsDelta(SourceHealth(first_bytes=(seconds,)), reached=True))

    def record_corrupted(self, object_id: ObjectId, url: str) -> None:
        """Record that this source, and no other, sent the corrupt bytes: it is not asked for the object for a while."""
        copy = (object_id, source_name(url))
        earlier = self._corrupted.get(copy)
        self._corrupted[copy] = self._mark(earlier, self.clock() + self._corrupted_memory)
        self._corrupted.move_to_end(copy)
        if len(self._corrupted) > _MAX_CORRUPTED:
            self._corrupted.popitem(last=False)
        if len(self._corrupted_delta) < _MAX_CORRUPTED:
            self._corrupted_delta.append(copy)

    def take_delta(self) -> tuple[Mapping[str, SourceStatsDelta], Sequence[CorruptedCopy]]:
        """Return what is to be sent to the store. Call `merge` or `restore` afterwards."""
        self._sent_deltas, self._deltas = self._deltas, OrderedDict()
        self._corrupted_sent, self._corrupted_delta = self._corrupted_delta, []
        now = self.clock()
        left = {
            copy: self._corrupted[copy].ends - now if copy in self._corrupted else 0.0
            for copy in self._corrupted_sent
        }
        return self._sent_deltas, [
            CorruptedCopy(ObjectId(object_id), name, seconds)
            for (object_id, name), seconds in left.items()
            if seconds > 0
        ]

    def merge(self, shared: SharedSources) -> None:
        """Take over the shared health, which includes the deltas that were sent."""
        now = self.clock()
        self._shared, self._sent_deltas = shared.health, {}
        earlier = self._corrupted_shared
        self._corrupted_shared = {
            copy: self._mark(earlier.get(copy), ends)
            for copy, ends in (
                ((shared_copy.object_id, shared_copy.source), now + shared_copy.seconds_left)
                for shared_copy in shared.corrupted
            )
        }
        self._corrupted_sent = []
        for name, shared_rate in shared.rates.items():
            ends = now + shared_rate.seconds_left
            if ends > self._rates.get(name, (0.0, 0.0))[1]:
                self._rates[name] = (shared_rate.rate, ends)

    def restore(self) -> None:
        """Put the deltas back that could not be sent, for the next exchange."""
        newer, self._deltas = self._deltas, OrderedDict(self._sent_deltas)
        self._sent_deltas = {}
        self._corrupted_delta = (self._corrupted_sent + self._corrupted_delta)[:_MAX_CORRUPTED]
        self._corrupted_sent = []
        for name, delta in newer.items():
            self._put(name, delta)

    def has_corrupted(self, object_id: ObjectId, url: str) -> bool:
        """Whether the source sent corrupt bytes of this object lately."""
        return self._is_corrupted(object_id, url)

    def _is_corrupted(self, object_id: ObjectId, url: str) -> bool:
        return any(mark.ends > self.clock() for mark in self._marks(object_id, url))

    def _may_retry(self, object_id: ObjectId, url: str) -> bool:
        return all(mark.retry_at <= self.clock() for mark in self._marks(object_id, url))

    def _marks(self, object_id: ObjectId, url: str) -> Sequence[_CorruptedMark]:
        copy = (object_id, source_name(url))
        known = self._corrupted.get(copy), self._corrupted_shared.get(copy)
        return [mark for mark in known if mark is not None]

    def _mark(self, earlier: _CorruptedMark | None, ends: float) -> _CorruptedMark:
        """Return the mark that ends then. One that ends later than before stands for another failure."""
        if earlier is not None and ends <= earlier.ends + _SAME_MARK:
            return earlier
        times = 1 if earlier is None or earlier.ends <= self.clock() else earlier.times + 1
        backoff = min(_FIRST_RETRY * 2.0 ** (times - 1), self._corrupted_memory)
        return _CorruptedMark(ends, ends - self._corrupted_memory + backoff, times)

    def _add(self, url: str, delta: SourceStatsDelta) -> None:
        self._put(source_name(url), delta)

    def _put(self, name: str, delta: SourceStatsDelta) -> None:
        earlier = self._deltas.get(name)
        self._deltas[name] = delta if earlier is None else earlier.followed_by(delta)
        self._deltas.move_to_end(name)
        if len(self._deltas) > _MAX_SOURCES:
            self._deltas.popitem(last=False)


class SourceStatsSync:
    """Exchanges this process's deltas with the other processes, through the shared stats, at regular intervals.

    `registry`: used by everything in this process that reads from sources.
    """

    def __init__(
        self, registry: SourceHealthRegistry, shared_stats: SharedSourceStats | None, interval: float
    ) -> None:
        """`shared_stats`: None in a node of one process. `interval`: seconds between two exchanges."""
        self.registry = registry
        self._shared_stats = shared_stats
        self._interval = interval
        self._lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._outage = OutageLog(logger, down="source_stats_sync_failed", up="source_stats_sync_recovered")

    async def open(self) -> None:
        """Exchange once, if the store is reachable, and then regularly in the background."""
        if self._shared_stats is not None:
            await self._shared_stats.open()
            await self.sync()
            self._task = asyncio.create_task(self._run(), name="sync-source-stats")

    async def close(self) -> None:
        """Stop, and exchange once more."""
        if self._shared_stats is None:
            return
        if self._task is not None:
            await cancel_and_wait(self._task)
            await self.sync()
        await self._shared_stats.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def sync(self) -> None:
        """Exchange now. If the store is unavailable, the deltas are kept for the next exchange."""
        if self._shared_stats is None:
            return
        async with self._lock:
            deltas, corrupted = self.registry.take_delta()
            try:
                shared = await self._shared_stats.sync(deltas, corrupted, self.registry.clock())
            except StateStoreUnavailable as error:
                self.registry.restore()
                self._outage.failed(error)
            except BaseException:
                self.registry.restore()
                raise
            else:
                self.registry.merge(shared)
                self._outage.succeeded()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            await self.sync()


_HEADERS = {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "distributor-node"}


class SourceProber:
    """Probes sources and records the results. Call `open` before use and `close` at the end.

    Every response below 500 counts as an answer: a source that is not a storage node may not have `/version`.
    """

    def __init__(
        self,
        registry: SourceHealthRegistry,
        timeout: float,
        concurrency: int,
        *,
        refuse_private: bool = False,
    ) -> None:
        """`timeout`: seconds to connect, and again to respond. `concurrency`: probes at once.

        `refuse_private`: a source at an address that is not public counts as unreachable.
        """
        self._registry = registry
        self._slots = asyncio.Semaphore(concurrency)
        limits = SourceLimits(
            connect_timeout=timeout,
            first_byte_timeout=timeout,
            max_connections=concurrency,
            refuse_private=refuse_private,
        )
        self._connections = Connections(limits)

    async def open(self) -> None:
        await self._connections.open()

    async def close(self) -> None:
        await self._connections.close()

    async def probe_all(self, bases: Iterable[str]) -> None:
        """Probe each base URL (ending in `/`) once, and return when all have responded or timed out."""
        async with asyncio.TaskGroup() as probes:
            for base in bases:
                probes.create_task(self._probe(base), name="probe-source")

    async def _probe(self, base: str) -> None:
        async with self._slots:
            asked_at = self._registry.clock()
            try:
                async with self._connections.request(f"{base}version", _HEADERS) as response:
                    status = response.status_code
            except SourceError as error:
                self._failed(base, error.reason)
                return
            except TooManyOpenFiles as error:  # says nothing of the source
                logger.warning("source_not_probed", source=source_name(base), reason=str(error))
                return
            if status >= 500:
                self._failed(base, f"responded {status}")
                return
            self._registry.record_probe(base, self._registry.clock() - asked_at)
            SOURCE_PROBES.labels(result="answered").inc()

    def _failed(self, base: str, reason: str) -> None:
        self._registry.record_probe(base, None)
        SOURCE_PROBES.labels(result="failed").inc()
        logger.info("source_probe_failed", source=source_name(base), reason=reason)
