"""What each process reports of itself, for the node's page: its counters, and what only it knows.

Reports travel through the state store, so that one process can show them all, of every machine. A page that is open
makes them come each second; otherwise they come every few seconds, for the history that the page shows.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Self

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from distributor_node.shared.domain.errors import StateStoreUnavailable
from distributor_node.shared.observability.logging import OutageLog
from distributor_node.shared.observability.metrics import counted_here
from distributor_node.shared.ports.state_store import ReportStore
from distributor_node.shared.runtime.process import process_name
from distributor_node.shared.waiting import wait_event

ProcessKind = Literal["api", "fetcher", "evictor", "standalone"]
Part = Callable[[bool], Awaitable[Mapping[str, Any]]]
"""Returns fields of the report, as JSON. The argument: whether a page is open. Otherwise only what is small and is kept
for a page that is opened later."""

WATCHED_INTERVAL, UNWATCHED_INTERVAL = 1.0, 5.0
"""Seconds between two reports, while a page is open and while none is."""
LATE = 3.0
"""Seconds after the interval at which a report that has not come means that its process does not run."""
_CLOCKS_APART = 1.0  # seconds by which the clocks of two machines may differ
REPORT_TTL = 600.0
"""Seconds that the last report of a process that was killed is kept."""
WATCH_SECONDS = 10.0
"""Seconds for which one announcement that a page is open holds."""
_WITHDRAWAL_TIMEOUT = 1.0

logger = structlog.get_logger()


class ProcessReporter:
    """Reports this process: run `run` as a task, and cancel it to stop. Nothing else waits for it."""

    def __init__(self, store: ReportStore, kind: ProcessKind, parts: Sequence[Part] = ()) -> None:
        """`parts`: what this process knows besides its counters."""
        self._store, self._kind, self._parts = store, kind, parts
        self.name = process_name()
        self._started = time.time()
        self._watched, self._woken = False, asyncio.Event()
        self._outage = OutageLog(logger, down="process_report_failed", up="process_report_recovered")

    def wake(self) -> None:
        """Report now, because a page has been opened in this process."""
        self._watched = True
        self._woken.set()

    async def run(self) -> None:
        """Report at intervals until cancelled, then withdraw the report."""
        try:
            while True:
                await wait_event(self._woken, await self.report())
                self._woken.clear()
        finally:
            with suppress(StateStoreUnavailable, TimeoutError):
                async with asyncio.timeout(_WITHDRAWAL_TIMEOUT):
                    await self._store.withdraw_process(self.name)

    async def report(self) -> float:
        """Report once. Returns the seconds until the next report is due, as this one has promised."""
        interval = WATCHED_INTERVAL if self._watched else UNWATCHED_INTERVAL
        content: dict[str, Any] = {
            "kind": self._kind,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "started": round(self._started, 3),
            "interval": interval,
            "counted": counted_here(),
        }
        try:
            for part in self._parts:
                content |= await part(self._watched)
            text = json.dumps(content, separators=(",", ":"))
            watched = await self._store.report_process(self.name, text, REPORT_TTL)
        except StateStoreUnavailable as error:
            self._outage.failed(error)
            return interval
        except Exception:  # a mistake in a view must not end what is viewed
            logger.exception("process_report_failed")
            return interval
        self._outage.succeeded()
        if watched and not self._watched:
            self._woken.set()  # what the parts know is wanted now
        self._watched = watched
        return interval


# What a report says. All fields have defaults or are in every version's reports; unknown ones are ignored.


class ReportPart(BaseModel):
    """A part of a report, checked when it is read: another version may have written it."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class CountedSource(ReportPart):
    """What one process has counted of one source."""

    requests: float = 0
    bytes: float = 0
    failures: Mapping[str, float] = {}  # by reason


class Counted(ReportPart):
    """What one process has counted since it started; see `counted_here`."""

    requests: Mapping[str, float] = {}
    sent: Mapping[str, float] = {}
    fetched: float = 0
    first_byte: Sequence[float] = ()
    evictions: Mapping[str, float] = {}
    evicted_bytes: float = 0
    sources: Mapping[str, CountedSource] = {}
    peers: Mapping[str, float] = {}  # bytes received by peer


class RemovedObject(ReportPart):
    """An object that the leading evictor has removed. Those evicted to make room have all fields."""

    id: str
    path: str | None = None  # that the id is the digest of, if it is known
    at: float  # POSIX seconds
    bytes: float  # that were freed
    reason: str
    size: int | None = None
    views: int | None = None
    idle_seconds: float | None = None
    partial: bool | None = None  # it was a partial object


class VolumeMap(ReportPart):
    """Objects and bytes by size class and idle time; see `EvictionIndex.size_and_idle_map`."""

    sizes: Sequence[int]
    idle: Sequence[float]
    cells: Sequence[tuple[int, int]]

    @model_validator(mode="after")
    def _check_cells(self) -> Self:
        expected = (len(self.sizes) + 1) * (len(self.idle) + 1)
        if len(self.cells) != expected:
            raise ValueError(f"cells: expected {expected}, got {len(self.cells)}")
        return self


class ReportContent(ReportPart):
    """One report."""

    kind: ProcessKind
    host: str
    process: int  # its id on that host
    started: float  # POSIX seconds
    interval: float  # seconds in which the next report is due
    counted: Counted = Counted()
    viewers: Mapping[
        str, Sequence[tuple[int, int]]
    ] = {}  # by object: number of the viewer, byte it has got to
    lookups_fail: bool = False  # of the catalog
    leads: bool | None = None  # None: no evictor
    removed: Sequence[RemovedObject] = ()  # the newest last
    map: VolumeMap | None = None


@dataclass(frozen=True, slots=True)
class ReportedProcess:
    """A process by its last report."""

    name: str
    age: float  # seconds since the report
    content: ReportContent

    @property
    def is_late(self) -> bool:
        """Whether its next report should have come: it was killed, or hangs, or cannot reach the state store."""
        return self.age > self.content.interval + LATE


async def read_reports(
    store: ReportStore, clock: Callable[[], float] = time.time
) -> Sequence[ReportedProcess]:
    """Return the reports of all processes. Those of another version that cannot be read are left out.

    A process that was killed is left out as well once another one of its kind has started after it. `clock`: POSIX
    seconds.
    """
    processes = []
    for report in await store.process_reports():
        with suppress(ValidationError):
            content = ReportContent.model_validate_json(report.content)
            processes.append(ReportedProcess(report.process, report.age, content))
    return _without_replaced(processes, clock())


def _without_replaced(processes: Sequence[ReportedProcess], now: float) -> Sequence[ReportedProcess]:
    """Leave out each late process for which another one of its kind has started since."""
    replaced: set[str] = set()
    successors = sorted((one for one in processes if not one.is_late), key=lambda one: one.content.started)
    for late in sorted((one for one in processes if one.is_late), key=lambda one: one.age):
        last_alive = now - late.age - _CLOCKS_APART
        for successor in successors:
            if successor.content.kind == late.content.kind and successor.content.started > last_alive:
                replaced.add(late.name)
                successors.remove(successor)
                break
    return [process for process in processes if process.name not in replaced]
