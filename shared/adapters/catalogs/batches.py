"""Look-ups on their way to the catalog: a bounded, fair queue, and queries that each ask for many objects.

A query that was sent runs until the catalog answers or the query's own time limit, whatever becomes of the clients.
Only a query that fails says something about the catalog. The queue says nothing about it, however long it is.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from math import inf

import structlog

from distributor_node.shared.domain.errors import CatalogUnavailable, LookupRefused, ObjectUnavailable
from distributor_node.shared.domain.objects import MediaObject, ObjectId
from distributor_node.shared.observability.metrics import (
    CATALOG_QUERIES,
    CATALOG_QUERY_OBJECTS,
    CATALOG_QUEUE_AGE,
    CATALOG_WAITING,
)
from distributor_node.shared.ports.catalog import LookupAnswers, RemoteCatalog
from distributor_node.shared.waiting import cancel_and_wait


@dataclass(slots=True)
class QueuedLookup:
    """One object that waits for its place in a query."""

    object_id: ObjectId
    seen_before: bool  # this node has known the object
    queued_at: float  # seconds, on the caller's clock
    clients: dict[str, None] = field(default_factory=dict)  # those that wait for it, as an ordered set


_Clients = OrderedDict[str, dict[ObjectId, None]]


class LookupQueue:
    """Each object waits once, in the name of every client that asks for it."""

    def __init__(self) -> None:
        self._waiting: dict[ObjectId, QueuedLookup] = {}  # oldest first
        # Of objects seen before, and of others: the clients in the order of their last look-up, with their objects.
        self._seen: _Clients = OrderedDict()
        self._unseen: _Clients = OrderedDict()
        self.unseen = 0  # objects that were not seen before
        self._longest_first = True  # in the last `take`

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, object_id: ObjectId) -> bool:
        return object_id in self._waiting

    @property
    def has_seen(self) -> bool:
        """Whether an object that was seen before waits."""
        return bool(self._seen)

    def oldest_at(self) -> float | None:
        """When the look-up that has waited longest was queued. None: the queue is empty."""
        for lookup in self._waiting.values():
            return lookup.queued_at
        return None

    def add(self, object_id: ObjectId, client: str, now: float, *, seen_before: bool) -> None:
        """Queue a look-up. If the object waits already, it waits for this client too."""
        lookup = self._waiting.get(object_id)
        if lookup is None:
            lookup = self._waiting[object_id] = QueuedLookup(object_id, seen_before, now)
            self.unseen += not seen_before
        lookup.clients[client] = None
        clients = self._clients_of(lookup)
        clients.setdefault(client, {})[object_id] = None
        clients.move_to_end(client)

    def remove(self, object_id: ObjectId) -> bool:
        """Take a look-up out. False: it does not wait."""
        lookup = self._waiting.pop(object_id, None)
        if lookup is None:
            return False
        self.unseen -= not lookup.seen_before
        clients = self._clients_of(lookup)
        for client in lookup.clients:
            objects = clients[client]
            del objects[object_id]
            if not objects:
                del clients[client]
        return True

    def take(self, count: int, *, seen_only: bool = False) -> list[QueuedLookup]:
        """Take the next look-ups out, at most `count`; with `seen_only`, none of objects that were not seen before.

        Of each client the newest one, then of each the next. Where not all clients have their turn, the ones that came
        last and the ones that have waited longest have it: see `_from_both_ends`. These two take turns to be the first,
        for catalogs that are asked for one object at a time.
        """
        taken: list[QueuedLookup] = []
        self._longest_first = not self._longest_first
        for clients in (self._seen,) if seen_only else (self._seen, self._unseen):
            while clients and len(taken) < count:
                for client in _from_both_ends(clients, longest_first=self._longest_first):
                    if len(taken) == count:
                        break
                    # An object that was just taken for another client may have been this client's last one.
                    if client in clients:
                        lookup = self._waiting[next(reversed(clients[client]))]
                        self.remove(lookup.object_id)
                        taken.append(lookup)
        return taken

    def drop(self) -> ObjectId | None:
        """Take out the look-up that is refused when there are too many. None: the queue is empty.

        It is the oldest one of the client with the most, and of an object that was not seen before, if there is any. Of
        clients with as many, the one that has waited longest is refused. Were it the newest, what waits would be too
        much for half of each query, which is what the oldest get: the answer came as their wait ended, or too late.
        """
        clients = self._unseen or self._seen
        if not clients:
            return None
        objects = clients[max(clients, key=lambda client: len(clients[client]))]
        unshared = (object_id for object_id in objects if len(self._waiting[object_id].clients) == 1)
        dropped = next(unshared, None) or next(iter(objects))
        self.remove(dropped)
        return dropped

    def _clients_of(self, lookup: QueuedLookup) -> _Clients:
        return self._seen if lookup.seen_before else self._unseen


def _from_both_ends(clients: _Clients, *, longest_first: bool) -> Iterator[str]:
    """The newest client, the one that has waited longest, the second newest, and so on; or the second one first.

    In an overload the newest ones are answered in time. But clients that ask again as soon as they are answered are
    always the newest ones: fifty of them would fill every query, and those before them would never have a turn.
    """
    newest, oldest = reversed(list(clients)), iter(list(clients))
    ends = (oldest, newest) if longest_first else (newest, oldest)
    pairs = (client for pair in zip(*ends, strict=True) for client in pair)
    return islice(pairs, len(clients))


_GATHER = 0.005  # seconds that a look-up waits for others to be sent with
_GATHER_PER_QUERY = (
    0.05  # seconds more for each query under way: the busier the catalog, the larger the batches
)
_MAX_GATHER = 0.25
_FIRST_LATENCY = 0.1  # seconds; assumed until queries have been measured
_LATENCY_WEIGHT = 0.3  # of the last query in the moving average
_DELIVERED_AT_ONCE = 8  # answers
_BURST_SECONDS = 0.25  # so many seconds' worth of queries may be sent at once

logger = structlog.get_logger()

_Result = asyncio.Future[MediaObject | None]


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Times in seconds."""

    max_in_flight: int  # queries under way at once
    max_rate: float  # queries a second
    timeout: float  # of one query
    wait: float  # of a client: what cannot be sent within this time is refused at once
    max_unseen_rate: float = inf  # objects a second that were not seen before


class LookupBatcher:
    """Collects look-ups and sends them. At most one look-up of an object waits at a time; others may be under way."""

    def __init__(
        self, catalog: RemoteCatalog, limits: BatchLimits, on_outcome: Callable[[bool], None]
    ) -> None:
        """`on_outcome`: called after each query with whether the catalog has answered it."""
        self._on_outcome = on_outcome
        self._catalog = catalog
        self._limits = limits
        self._queue = LookupQueue()
        self._results: dict[ObjectId, _Result] = {}  # of the look-ups that wait
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._rate = RateLimit(limits.max_rate)
        self._unseen_at = 0.0  # when the next objects that were not seen before may be asked for
        self._latency = _FIRST_LATENCY
        self._closed = False

    async def look_up(
        self, object_id: ObjectId, clients: Iterable[str], *, seen_before: bool
    ) -> MediaObject | None:
        """Wait for a query that asks for the object, in the name of at least one client.

        Raises LookupRefused if the look-up is crowded out of the queue or withdrawn, and CatalogUnavailable.
        """
        if self._closed:
            raise CatalogUnavailable("the catalog is being closed")
        loop = asyncio.get_running_loop()
        result: _Result = loop.create_future()
        self._results[object_id] = result
        for client in clients:
            self._queue.add(object_id, client, loop.time(), seen_before=seen_before)
        self._drop(self._capacity(), len(self._queue))
        self._drop(self._capacity(self._limits.max_unseen_rate), self._queue.unseen)
        self._schedule()
        return await result

    def is_queued(self, object_id: ObjectId) -> bool:
        """Whether a look-up of this object waits to be sent."""
        return object_id in self._queue

    def add_client(self, object_id: ObjectId, client: str) -> None:
        """If the object waits to be sent, let it wait in the name of this client too."""
        if object_id in self._queue:
            self._queue.add(object_id, client, 0.0, seen_before=False)

    def withdraw(self, object_id: ObjectId) -> None:
        """Give up a look-up that was not sent yet, because no one waits for it any more."""
        if self._queue.remove(object_id):
            self._results.pop(object_id).set_exception(LookupRefused("no one waits for it", "withdrawn"))
            self._schedule()

    async def close(self) -> None:
        """Cancel the queries under way. All look-ups end with CatalogUnavailable."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        await cancel_and_wait(*self._tasks)
        self._queue = LookupQueue()
        for result in self._results.values():
            if not result.done():
                result.set_exception(CatalogUnavailable("the catalog is being closed"))
        self._results.clear()

    def _drop(self, capacity: int, waiting: int) -> None:
        """Refuse look-ups until no more than `capacity` of `waiting` are left."""
        for _ in range(waiting - capacity):
            dropped = self._queue.drop()
            if dropped is not None:
                message = f"more than {capacity} look-ups wait for the catalog"
                self._results.pop(dropped).set_exception(LookupRefused(message, "queue_full"))

    def _capacity(self, max_objects: float = inf) -> int:
        """How many look-ups may wait: those that can be sent within `wait` at the rate of late, and one round.

        `max_objects`: of these may be sent in a second.
        """
        limits, batch_size = self._limits, self._catalog.batch_size
        objects = batch_size * min(limits.max_rate, limits.max_in_flight / self._latency)
        return limits.max_in_flight + max(batch_size, int(min(objects, max_objects) * limits.wait))

    def _schedule(self) -> None:
        """Send the next query now, or set the timer for when it may be sent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        loop = asyncio.get_running_loop()
        while not self._closed and len(self._queue) and len(self._tasks) < self._limits.max_in_flight:
            now = loop.time()
            has_seen = self._queue.has_seen
            due = max(self._gathered_at(), self._rate.next_at(reserved=has_seen))
            due = due if has_seen else max(due, self._unseen_at)
            if due > now:
                self._timer = loop.call_at(due, self._schedule)
                break
            self._rate.spend(now)
            batch = self._queue.take(self._catalog.batch_size, seen_only=now < self._unseen_at)
            unseen = sum(not lookup.seen_before for lookup in batch)
            self._unseen_at = max(now, self._unseen_at) + unseen / self._limits.max_unseen_rate
            results = {lookup.object_id: self._results.pop(lookup.object_id) for lookup in batch}
            task = asyncio.create_task(self._query(results), name="catalog-query")
            self._tasks.add(task)
            task.add_done_callback(self._query_done)
        self._report(loop.time())

    def _gathered_at(self) -> float:
        """When the look-ups that wait have waited long enough for others."""
        oldest_at = self._queue.oldest_at()
        if oldest_at is None or len(self._queue) >= self._catalog.batch_size:
            return 0.0
        return oldest_at + min(_MAX_GATHER, _GATHER + _GATHER_PER_QUERY * len(self._tasks))

    def _query_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._schedule()

    async def _query(self, results: Mapping[ObjectId, _Result]) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        CATALOG_QUERY_OBJECTS.inc(len(results))
        failure: CatalogUnavailable = CatalogUnavailable("the catalog is being closed")
        answers: LookupAnswers | None = None
        try:
            async with asyncio.timeout(self._limits.timeout):
                answers = await self._catalog.look_up_batch(tuple(results))
            failure = ObjectUnavailable("the catalog could not describe the object")
        except TimeoutError:
            failure = CatalogUnavailable(f"the catalog did not answer within {self._limits.timeout:g} s")
        except CatalogUnavailable as error:
            failure = error
        except Exception as error:
            logger.exception("catalog_query_failed")
            failure = CatalogUnavailable(f"the query failed: {error!r}")
        finally:
            taken = loop.time() - started
            self._latency += _LATENCY_WEIGHT * (taken - self._latency)
            CATALOG_QUERIES.labels(outcome="failed" if answers is None else "answered").inc()
            # An object of which the server says nothing usable is no outage.
            if not self._closed and (answers is not None or not isinstance(failure, ObjectUnavailable)):
                self._on_outcome(answers is not None)
            await self._deliver(results, answers or {}, failure)

    async def _deliver(
        self, results: Mapping[ObjectId, _Result], answers: LookupAnswers, failure: CatalogUnavailable
    ) -> None:
        """Give the answers to those that wait: objects seen before first, then a few in each turn of the event loop.

        Otherwise fifty responses are one piece of work, behind which every new request waits.
        """
        try:
            for number, (object_id, result) in enumerate(results.items(), 1):
                if result.done():
                    continue
                if object_id in answers:
                    result.set_result(answers[object_id])
                else:
                    result.set_exception(failure)
                if number % _DELIVERED_AT_ONCE == 0:
                    await asyncio.sleep(0)
        finally:
            for result in results.values():
                if not result.done():
                    result.set_exception(failure)

    def _report(self, now: float) -> None:
        oldest_at = self._queue.oldest_at()
        CATALOG_WAITING.set(len(self._queue))
        CATALOG_QUEUE_AGE.set(0.0 if oldest_at is None else now - oldest_at)


class RateLimit:
    """A token bucket: at most `rate` a second, of which a quarter at once.

    One token is reserved for queries with objects that were seen before, so that these do not wait for the next token
    while others use all of them.
    """

    def __init__(self, rate: float) -> None:
        # A burst and a second of the steady rate together are no more than `rate`.
        self._burst = max(1.0, rate * _BURST_SECONDS)
        self._interval = 1.0 / max(rate - self._burst, rate / 2)
        self._reserve = min(1.0, self._burst - 1.0)
        self._spent_until = 0.0

    def next_at(self, *, reserved: bool) -> float:
        """The earliest time of the next query, on the clock of `spend`. `reserved`: it may take the reserved token."""
        free = self._burst - 1.0 - (0.0 if reserved else self._reserve)
        return self._spent_until - free * self._interval

    def spend(self, now: float) -> None:
        """Note that a query is sent at `now`."""
        self._spent_until = max(now, self._spent_until) + self._interval
