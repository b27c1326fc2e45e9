"""Cheap questions to storage nodes (`/version`), to know how quick they are before anything is fetched from them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import structlog

from distributor_node.shared.adapters.sources.connections import Connections, SourceLimits
from distributor_node.shared.adapters.sources.health import SourceHealthRegistry
from distributor_node.shared.domain.errors import SourceError
from distributor_node.shared.domain.objects import source_name
from distributor_node.shared.observability.metrics import SOURCE_PROBES

_HEADERS = {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "distributor-node"}

logger = structlog.get_logger()


class SourceProber:
    """`open` before use, `close` at the end. Any answer that is no server error counts, with the time to its head:
    a source that is no storage node may know no `/version`."""

    def __init__(
        self,
        registry: SourceHealthRegistry,
        timeout: float,
        concurrency: int,
        *,
        refuse_private: bool = False,
    ) -> None:
        """`timeout`: seconds to connect, and again to answer; `concurrency`: probes under way; `refuse_private`:
        sources at addresses that are not public count as unreachable."""
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
        """Each base URL (with `/` at its end) once; returns when all have answered or had their time."""
        async with asyncio.TaskGroup() as probes:
            for base in bases:
                probes.create_task(self._probe(base), name="probe-source")

    async def _probe(self, base: str) -> None:
        async with self._slots:
            asked_at = self._registry.clock()
            try:
                async with self._connections.request(f"{base}version", _HEADERS) as answer:
                    status = answer.status_code
            except SourceError as error:
                self._failed(base, error.reason)
                return
            if status >= 500:
                self._failed(base, f"answered {status}")
                return
            self._registry.record_probe(base, self._registry.clock() - asked_at)
            SOURCE_PROBES.labels(result="answered").inc()

    def _failed(self, base: str, reason: str) -> None:
        self._registry.record_probe(base, None)
        SOURCE_PROBES.labels(result="failed").inc()
        logger.info("source_probe_failed", source=source_name(base), reason=reason)
