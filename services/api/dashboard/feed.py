"""What the node's page shows: one snapshot of the whole deployment.

It is made from the state store, the volume and the reports of all processes.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import structlog

from distributor_node.services.api.assets.decision import UNVERIFIED_TAIL_BYTES
from distributor_node.services.api.context import ApiContext
from distributor_node.services.api.dashboard.history import STEP, CounterSum, History
from distributor_node.services.api.health import LOOKUPS_FAIL, HealthChecks
from distributor_node.services.api.operator.explain import (
    ObjectExplainer,
    removal_reason,
    with_words,
)
from distributor_node.services.api.status import UsageReader
from distributor_node.shared.domain.errors import InvalidInput, StateStoreUnavailable, VolumeError
from distributor_node.shared.domain.extents import Extents
from distributor_node.shared.domain.objects import ObjectId, path_of, source_name
from distributor_node.shared.domain.source_order import rank
from distributor_node.shared.ports.state_store import Fetch, FetchPhase
from distributor_node.shared.runtime.process import VERSION
from distributor_node.shared.runtime.process_reports import (
    WATCHED_INTERVAL,
    RemovedObject,
    ReportedProcess,
    read_reports,
)
from distributor_node.shared.settings.model import FetchSettings
from distributor_node.shared.waiting import cancel_and_wait

MAX_DOWNLOADS, MAX_QUEUED, MAX_SOURCES, MAX_VIEWERS, MAX_PROCESSES = 40, 20, 50, 50, 100
"""What one snapshot lists at most; MAX_VIEWERS for each download."""
MAX_PEERS = 64
MAX_REMOVED_SHOWN, MAX_REMOVED_KNOWN = 12, 5000
CHECK_INTERVAL = 5.0
"""Seconds between two checks of what the node depends on, while a page is open."""
_CHECK_WAIT = 3.0
"""Seconds that a snapshot waits for a check, if the last one is too old. A check takes two seconds at most."""
_DRAINING = (
    "it serves what is cached, proxies the rest and starts no fetch, until `distributor operator drain --off`"
)
_RATE_WINDOW = 5.0
_MAX_SWITCHES = 10

logger = structlog.get_logger()


class Feed:
    """Makes snapshots for a page that is open, and keeps the history for one that will be. All are JSON."""

    def __init__(
        self,
        context: ApiContext,
        usage: UsageReader,
        health: HealthChecks,
        explainer: ObjectExplainer,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`clock`: POSIX seconds."""
        self._context, self._usage, self._health, self._explainer = context, usage, health, explainer
        self._clock = clock
        self._counters, self._history = CounterSum(), History()
        self._processes: Sequence[ReportedProcess] = ()
        self._removed = OrderedDict[str, RemovedObject]()  # by object, the last removed at the end
        self._problems = ProblemTimes()
        self._downloads = DownloadProgress()
        self._paths = dict[ObjectId, str | None]()  # of the fetches whose ids are digests of paths
        self._source_rates, self._peer_rates = GrowthRates(), GrowthRates()
        self._checked_at = float("-inf")  # monotonic seconds
        self._checked: Mapping[str, str | None] = {}
        self._checking: asyncio.Task[None] | None = None

    # History

    async def run(self) -> None:
        """Take a sample of the history at intervals, until cancelled."""
        while True:
            now = self._clock()
            try:
                if await self._read_reports():
                    self._history.add(self._counters.advance(self._processes, now), now)
            except Exception:  # a mistake in a view must not end what is viewed
                logger.exception("dashboard_sample_failed")

            await asyncio.sleep(STEP - (self._clock() - now) % STEP)

    async def _read_reports(self) -> bool:
        """Read what all processes report. Returns whether the state store has replied."""
        try:
            self._processes = await read_reports(self._context.state, self._clock)
        except StateStoreUnavailable:
            return False
        for process in self._processes:
            for removed in process.content.removed:
                self._removed[removed.id] = removed
                self._removed.move_to_end(removed.id)
        while len(self._removed) > MAX_REMOVED_KNOWN:
            self._removed.popitem(last=False)
        return True

    def history(self) -> dict[str, Any]:
        """The last hour, in columns."""
        return self._history.as_json()

    @property
    def history_ends(self) -> float:
        """POSIX seconds of the last sample."""
        return self._history.ends

    # The snapshot

    async def snapshot(self) -> dict[str, Any]:
        """Everything but the history. What cannot be read is missing or as it was, and the components say why.

        `complete`: all processes know that a page is open, and report what only they know.
        """
        now = self._clock()
        store_replies = await self._read_reports()
        fetches = await self._fetches()
        await self._check()
        # Those being fetched first: there may be more than are opened
        by_phase = sorted(fetches or (), key=lambda fetch: fetch.phase is not FetchPhase.FETCHING)
        partial = await asyncio.to_thread(self._partial_files, by_phase)
        settings = self._context.settings
        return {
            "at": round(now, 3),
            "complete": all(
                one.content.interval <= WATCHED_INTERVAL for one in self._processes if not one.is_late
            ),
            "node": {"id": settings.id, "version": VERSION, "environment": settings.environment},
            "notices": self._notices(),
            "totals": self._history.totals(),
            "volume": await self._volume(by_phase, partial),
            **self._downloads_as_json(fetches, partial, now),
            "sources": self._sources(now),
            "fleet": self._fleet(now),
            "components": self._components(store_replies, now),
            "processes": [self._process(process, now) for process in self._processes[:MAX_PROCESSES]],
        }

    async def _fetches(self) -> Sequence[Fetch] | None:
        try:
            return await self._context.state.fetches()
        except StateStoreUnavailable:
            return None

    async def _check(self) -> None:
        """Check what the node depends on, if that is due.

        A snapshot waits for it only if no page was open for a while: what is down replies late, and what was found
        then may be wrong now.
        """
        age = time.monotonic() - self._checked_at
        if self._checking is None and age >= CHECK_INTERVAL:
            self._checking = asyncio.create_task(self._check_dependencies(), name="check-dependencies")
        if self._checking is not None and age >= 2 * CHECK_INTERVAL:
            await asyncio.wait({self._checking}, timeout=_CHECK_WAIT)

    async def _check_dependencies(self) -> None:
        try:
            self._checked = await self._health.dependencies()
        finally:
            self._checked_at, self._checking = time.monotonic(), None

    async def close(self) -> None:
        if self._checking is not None:
            await cancel_and_wait(self._checking)

    def _notices(self) -> list[dict[str, str]]:
        """What an operator has set that is no fault, and that explains what the node does."""
        draining = self._context.operator_state.current.draining
        return [{"name": "draining", "words": f"The node drains: {_DRAINING}."}] if draining else []

    def _partial_files(self, fetches: Sequence[Fetch]) -> dict[ObjectId, tuple[Extents, bool]]:
        """The extents on disk of each, and whether they are verified. Blocking.

        Of all that are being fetched, since the paused ones are counted, and of some others.
        """
        found = {}
        fetching = sum(fetch.phase is FetchPhase.FETCHING for fetch in fetches)
        for fetch in fetches[: max(fetching, 10 * MAX_DOWNLOADS)]:
            object_id = fetch.object_id
            try:
                reader = self._context.volume.open_partial(object_id)
                if reader is not None:
                    state = reader.state()
                    found[object_id] = state.extents or Extents.of((0, state.size)), state.verified
                    reader.close()
                if object_id.is_digest and self._paths.get(object_id) is None:
                    record = self._context.volume.partial_record(object_id)
                    self._paths[object_id] = path_of(object_id, record)
            except VolumeError:
                continue
        for object_id in {*self._paths} - {fetch.object_id for fetch in fetches}:
            self._paths.pop(object_id, None)
        return found

    async def _volume(
        self, fetches: Sequence[Fetch], partial: Mapping[ObjectId, tuple[Extents, bool]]
    ) -> dict[str, Any]:
        usage, watermarks = await self._usage.read(), self._context.settings.storage.watermarks
        leader = next((one for one in self._processes if one.content.leads and not one.is_late), None)
        return {
            "limit": usage.limit,
            "used": usage.used,
            "reserved": usage.reserved,
            "partial": sum(extents.total for extents, _ in partial.values()),
            "parked": _parked(fetches, partial),
            "leaving": usage.leaving,
            "objects": usage.objects,
            "low": watermarks.low,
            "high": watermarks.high,
            "map": None if leader is None or leader.content.map is None else leader.content.map.model_dump(),
            "removed": [
                {"words": removal_reason(removed.reason), **removed.model_dump(exclude_none=True)}
                for removed in list(self._removed.values())[-MAX_REMOVED_SHOWN:]
            ],
        }

    def _downloads_as_json(
        self, fetches: Sequence[Fetch] | None, partial: Mapping[ObjectId, tuple[Extents, bool]], now: float
    ) -> dict[str, Any]:
        viewers = self._viewers()
        fetches = fetches or ()
        begun = [fetch for fetch in fetches if fetch.phase in (FetchPhase.FETCHING, FetchPhase.PARKED)]
        waiting = [fetch for fetch in fetches if fetch.phase in (FetchPhase.CLAIMED, FetchPhase.QUEUED)]
        begun.sort(key=lambda fetch: (fetch.phase is FetchPhase.PARKED, -fetch.age, fetch.object_id))
        waiting.sort(key=lambda fetch: -fetch.age)
        self._downloads.keep({fetch.object_id for fetch in begun})
        fetching = sum(fetch.phase is FetchPhase.FETCHING for fetch in begun)
        downloads = [
            self._download(fetch, *partial.get(fetch.object_id, (Extents(), False)), viewers, now)
            for fetch in begun[
                : max(fetching, MAX_DOWNLOADS)
            ]  # more than are listed: the paused ones are counted
        ]
        paused = sum(one["paused"] for one in downloads)
        return {
            "downloads": downloads[:MAX_DOWNLOADS],
            "queue": {
                "downloads": fetching - paused,
                "paused": paused,
                "waiting": len(waiting),
                "slotsBusy": self._context.fetch_capacity.running or 0,
                "slotsFree": self._context.fetch_capacity.free,
                "next": [
                    {
                        "id": fetch.object_id,
                        "age": round(fetch.age, 1),
                        "viewers": len(viewers.get(fetch.object_id, ())),
                    }
                    for fetch in waiting[:MAX_QUEUED]
                ],
            },
        }

    def _viewers(self) -> dict[str, list[dict[str, Any]]]:
        """By object: a key of each viewer, and the byte it has got to."""
        viewers: dict[str, list[dict[str, Any]]] = {}
        for process in self._processes:
            if process.is_late:
                continue
            for object_id, positions in process.content.viewers.items():
                viewers.setdefault(object_id, []).extend(
                    {"key": f"{process.name}-{serial}", "at": position} for serial, position in positions
                )
        return viewers

    def _download(
        self,
        fetch: Fetch,
        extents: Extents,
        verified: bool,
        viewers: Mapping[str, list[dict[str, Any]]],
        now: float,
    ) -> dict[str, Any]:
        source = None if fetch.source is None else source_name(fetch.source)
        rate, sources = self._downloads.observe(fetch.object_id, extents.total, source, now)
        left = max(0, fetch.size - extents.total)
        watching = viewers.get(fetch.object_id, [])
        return {
            "id": fetch.object_id,
            "path": self._paths.get(fetch.object_id),
            "phase": fetch.phase.value,
            "paused": fetch.phase is FetchPhase.FETCHING
            and rate == 0
            and is_far_ahead(
                fetch.size, extents, [viewer["at"] for viewer in watching], self._context.settings.fetch
            ),
            "size": fetch.size,
            "extents": [[extent.first, extent.end] for extent in extents],
            "heldBack": None if verified or not fetch.size else max(0, fetch.size - UNVERIFIED_TAIL_BYTES),
            "source": source,
            "sources": sources,
            "rate": rate,
            "secondsLeft": round(left / rate, 1) if rate and fetch.size else None,
            "age": round(fetch.age, 1),
            "worker": ":".join(fetch.worker.split(":")[:2]),
            "viewers": watching[:MAX_VIEWERS],
            "moreViewers": max(0, len(watching) - MAX_VIEWERS),
        }

    def _sources(self, now: float) -> list[dict[str, Any]]:
        """The sources by rank, as this process knows them, with what all processes have counted since they started."""
        registry, counted = self._context.failover_reader.health, self._counted_of_sources()
        moment = registry.clock()
        names = {*registry.names(), *counted} - {source_name(peer) for peer in self._known_peers}
        health = {name: registry.health_of(name) for name in names}
        ordered = sorted(health, key=lambda name: (rank(health[name], moment), name))
        self._source_rates.keep(set(counted))
        return [
            {
                "name": name,
                "rank": place,
                "firstBytes": [round(seconds, 5) for seconds in health[name].first_bytes],
                "penaltyLeft": round(max(0.0, health[name].penalty_ends - moment), 1),
                "failuresInARow": health[name].failures,
                "unreachable": health[name].unreachable_at is not None,
                "requests": counted.get(name, {}).get("requests", 0),
                "bytes": counted.get(name, {}).get("bytes", 0),
                "failures": counted.get(name, {}).get("failures", {}),
                "rate": self._source_rates.observe(name, counted.get(name, {}).get("bytes", 0), now),
            }
            for place, name in enumerate(ordered[:MAX_SOURCES], start=1)
        ]

    @property
    def _known_peers(self) -> frozenset[str]:
        peers = self._context.peers
        return frozenset() if peers is None else peers.known

    def _fleet(self, now: float) -> dict[str, Any] | None:
        """The nodes that share the objects, as this process sees them, and what all processes have got from each.

        None: this node is in no fleet.
        """
        peers = self._context.peers
        if peers is None:
            return None
        received: dict[str, float] = {}
        for process in self._processes:
            for name, count in process.content.counted.peers.items():
                received[name] = received.get(name, 0) + count
        shares, nodes = peers.shares, sorted({peers.own, *peers.known})
        self._peer_rates.keep({source_name(name) for name in nodes})
        return {
            "copies": self._context.settings.peers.copies,
            "nodes": [
                {
                    "name": source_name(name),
                    "own": name == peers.own,
                    "alive": name in shares,
                    "weight": peers.weight_of(name),
                    "share": round(shares.get(name, 0.0), 4),
                    "bytes": received.get(source_name(name), 0),
                    "rate": self._peer_rates.observe(
                        source_name(name), received.get(source_name(name), 0), now
                    ),
                }
                for name in nodes[:MAX_PEERS]
            ],
            "moreNodes": max(0, len(nodes) - MAX_PEERS),
        }

    def _counted_of_sources(self) -> dict[str, dict[str, Any]]:
        total: dict[str, dict[str, Any]] = {}
        for process in self._processes:
            for name, counted in process.content.counted.sources.items():
                source = total.setdefault(name, {"requests": 0, "bytes": 0, "failures": {}})
                source["requests"] += counted.requests
                source["bytes"] += counted.bytes
                for reason, failures in counted.failures.items():
                    source["failures"][reason] = source["failures"].get(reason, 0) + failures
        return total

    # Components: what is wrong with each, and since when

    def _components(self, store_replies: bool, now: float) -> list[dict[str, Any]]:
        in_memory = self._context.settings.in_memory
        names = {
            "public port": "Public port",
            "volume": "Volume",
            "state store": "State store (in memory)" if in_memory else "State store (Redis)",
            "job queue": "Job queue (in memory)" if in_memory else "Job queue (RabbitMQ)",
            "catalog": f"Catalog ({self._context.settings.catalog.kind})",
        }
        problems = {**self._checked, "public port": self._health.check_port()}
        if not store_replies:
            problems["state store"] = problems.get("state store") or "state store: unavailable"
        alive = [process for process in self._processes if not process.is_late]
        if any(process.content.lookups_fail for process in alive):
            problems["catalog"] = problems.get("catalog") or LOOKUPS_FAIL
        lines = [(shown, _without_name(problems.get(name), name), "") for name, shown in names.items()]
        lines += [self._evictor(alive, store_replies), self._fetchers(alive, store_replies)]
        return [
            {
                "name": name,
                "ok": problem is None,
                "words": detail or "works" if problem is None else problem,
                "since": self._problems.since(name, problem, now),
            }
            for name, problem, detail in lines
        ]

    def _evictor(self, alive: Sequence[ReportedProcess], store_replies: bool) -> tuple[str, str | None, str]:
        leaders = [process for process in alive if process.content.leads]
        standbys = sum(1 for process in alive if process.content.leads is False)
        if not store_replies:
            return "Evictor", "not known without the state store", ""
        if not leaders:
            return "Evictor", "none leads: nothing is evicted", ""
        return (
            "Evictor",
            None,
            f"{shown_name(leaders[0])} leads" + (f", {standbys} standing by" if standbys else ""),
        )

    def _fetchers(self, alive: Sequence[ReportedProcess], store_replies: bool) -> tuple[str, str | None, str]:
        capacity = self._context.fetch_capacity
        workers = capacity.workers_alive
        if not store_replies or workers is None:
            return "Fetchers", "not known without the state store", ""
        if not workers:
            return "Fetchers", "none alive: misses are proxied, nothing new is cached", ""
        late = [
            process for process in self._processes if process.content.kind == "fetcher" and process.is_late
        ]
        if late:
            lost = ", ".join(shown_name(process) for process in late)
            return "Fetchers", f"{workers} alive; not heard of any more: {lost}", ""
        slots = (capacity.running or 0) + capacity.free
        return "Fetchers", None, f"{workers} alive, {capacity.running or 0} of {slots} slots busy"

    def _process(self, process: ReportedProcess, now: float) -> dict[str, Any]:
        return {
            "name": shown_name(process),
            "kind": process.content.kind,
            "ok": not process.is_late,
            "words": "runs" if not process.is_late else "was killed, hangs, or cannot reach the state store",
            "since": round(process.content.started if not process.is_late else now - process.age, 3),
        }

    # One object

    async def explain(self, object_id: ObjectId) -> dict[str, Any]:
        """Why it is here, or why not, in sentences and in fields. Raises StateStoreUnavailable, and InvalidInput for an
        id that requests for objects are refused for, if nothing is known of it."""
        explained = await self._explainer.explain(object_id)
        if explained["state"] == "absent" and not self._context.catalog.can_have(object_id):
            raise InvalidInput(f"malformed object id: this node's catalog has no such ids, got {object_id!r}")
        known = self._removed.get(object_id)
        removed = None if known is None else known.model_dump(exclude_none=True)
        return {"removed": removed, **await with_words(self._context, explained, known)}


class ProblemTimes:
    """Since when each component has its problem."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def since(self, name: str, problem: str | None, now: float) -> float | None:
        """Return POSIX seconds; None: there is no problem."""
        if problem is None:
            self._since.pop(name, None)
            return None
        return self._since.setdefault(name, round(now, 3))


class GrowthRates:
    """How fast named counts grow, in units a second over the last seconds."""

    def __init__(self) -> None:
        self._seen: dict[str, deque[tuple[float, float]]] = {}

    def observe(self, name: str, count: float, now: float) -> float | None:
        """Note the count and return its rate. None: it was not observed for long enough, or it has shrunk."""
        seen = self._seen.setdefault(name, deque())
        if seen and (count < seen[-1][1] or now <= seen[-1][0]):
            seen.clear()
        seen.append((now, count))
        while len(seen) > 2 and now - seen[1][0] >= _RATE_WINDOW:
            seen.popleft()
        seconds = now - seen[0][0]
        return round((count - seen[0][1]) / seconds) if seconds > 0.5 else None

    def keep(self, names: set[str]) -> None:
        """Forget all others."""
        self._seen = {name: seen for name, seen in self._seen.items() if name in names}


class DownloadProgress:
    """Rates and sources of the downloads, as far as snapshots have seen them."""

    def __init__(self) -> None:
        self._rates = GrowthRates()
        self._sources: dict[str, list[str]] = {}

    def observe(
        self, object_id: ObjectId, on_disk: int, source: str | None, now: float
    ) -> tuple[float | None, list[str]]:
        """Return bytes a second, and the sources used so far, the current one last."""
        sources = self._sources.setdefault(object_id, [])
        if source is not None and (not sources or sources[-1] != source):
            sources.append(source)
            del sources[:-_MAX_SWITCHES]
        return self._rates.observe(object_id, on_disk, now), list(sources)

    def keep(self, object_ids: set[ObjectId]) -> None:
        """Forget all others."""
        self._rates.keep(set(object_ids))
        self._sources = {name: sources for name, sources in self._sources.items() if name in object_ids}


def is_far_ahead(size: int, extents: Extents, positions: Iterable[int], fetch: FetchSettings) -> bool:
    """Whether the download of a large object is as far ahead of its viewers as it may be, so that it waits for them.

    `positions`: where they are.
    """
    if fetch.window is None or size <= fetch.window_above or extents.total >= size:
        return False
    window = fetch.window
    return all(extents.end_at(position) >= min(size, position + window) for position in positions)


def shown_name(process: ReportedProcess) -> str:
    """Host and process id."""
    return f"{process.content.host}:{process.content.process}"


def _without_name(problem: str | None, name: str) -> str | None:
    """Readiness names the component in each of its problems; here it stands in front."""
    return None if problem is None else problem.removeprefix(f"{name}: ")


def _parked(fetches: Sequence[Fetch], partial: Mapping[ObjectId, tuple[Extents, bool]]) -> Mapping[str, int]:
    """Partial objects that no worker fetches: how many, bytes that they hold, bytes reserved for them."""
    parked = [fetch for fetch in fetches if fetch.phase is FetchPhase.PARKED]
    opened = [partial[fetch.object_id][0] for fetch in parked if fetch.object_id in partial]
    return {
        "objects": len(parked),
        "held": sum(extents.total for extents in opened),
        "reserved": sum(fetch.reserved for fetch in parked),
    }
