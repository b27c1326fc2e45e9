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
from typing import Any, Literal

import structlog

from distributor_node.shared.domain.errors import StateStoreUnavailable
from distributor_node.shared.observability.logging import OutageLog
from distributor_node.shared.observability.metrics import counted_here
from distributor_node.shared.ports.state_store import ReportStore
from distributor_node.shared.runtime.process import process_name
from distributor_node.shared.waiting import wait_event

ProcessKind = Literal["api", "fetcher", "evictor", "standalone"]
Part = Callable[[], Awaitable[Mapping[str, Any]]]
"""Returns fields of the report, as JSON; called only while a page is open."""

WATCHED_INTERVAL, UNWATCHED_INTERVAL = 1.0, 5.0
"""Seconds between two reports, while a page is open and while none is."""
LATE = 3.0
"""Seconds after the interval at which a report that has not come means that its process does not run."""
REPORT_TTL = 600.0
"""Seconds that the last report of a process that was killed is kept."""
WATCH_SECONDS = 5.0
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
            if self._watched:
                for part in self._parts:
                    content |= await part()
            text = json.dumps(content, separators=(",", ":"))
            watched = await self._store.report_process(self.name, text, REPORT_TTL)
        except StateStoreUnavailable as error:
            self._outage.failed(error)
            return interval
        self._outage.succeeded()
        if watched and not self._watched:
            self._woken.set()  # what the parts know is wanted now
        self._watched = watched
        return interval


@dataclass(frozen=True, slots=True)
class ReportedProcess:
    """A process by its last report."""

    name: str
    kind: ProcessKind
    host: str
    process: int  # its id on that host
    started: float  # POSIX seconds
    interval: float  # seconds in which its next report is due
    age: float  # seconds since the report
    content: Mapping[str, Any]

    @property
    def is_late(self) -> bool:
        """Whether its next report should have come: it was killed, or hangs, or cannot reach the state store."""
        return self.age > self.interval + LATE


async def read_reports(
    store: ReportStore, clock: Callable[[], float] = time.time
) -> Sequence[ReportedProcess]:
    """Return the reports of all processes. Those of another version that cannot be read are left out.

    A process that was killed is left out as well once another one of its kind has started after it. `clock`: POSIX
    seconds.
    """
    processes = [
        process
        for report in await store.process_reports()
        if (process := _read(report.process, report.content, report.age)) is not None
    ]
    return _without_replaced(processes, clock())


def _read(name: str, text: str, age: float) -> ReportedProcess | None:
    try:
        content = json.loads(text)
        return ReportedProcess(
            name,
            content["kind"],
            str(content["host"]),
            int(content["process"]),
            float(content["started"]),
            float(content["interval"]),
            age,
            content,
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _without_replaced(processes: Sequence[ReportedProcess], now: float) -> Sequence[ReportedProcess]:
    """Leave out each late process for which another one of its kind has started since."""
    replaced: set[str] = set()
    successors = sorted((one for one in processes if not one.is_late), key=lambda one: one.started)
    for late in sorted((one for one in processes if one.is_late), key=lambda one: one.age):
        for successor in successors:
            if successor.kind == late.kind and successor.started > now - late.age - late.interval - LATE:
                replaced.add(late.name)
                successors.remove(successor)
                break
    return [process for process in processes if process.name not in replaced]
