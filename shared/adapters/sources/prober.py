"""Probes of storage nodes (GET `/version`): how fast they respond, before anything is fetched from them."""

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
            if status >= 500:
                self._failed(base, f"responded {status}")
                return
            self._registry.record_probe(base, self._registry.clock() - asked_at)
            SOURCE_PROBES.labels(result="answered").inc()

    def _failed(self, base: str, reason: str) -> None:
        self._registry.record_probe(base, None)
        SOURCE_PROBES.labels(result="failed").inc()
        logger.info("source_probe_failed", source=source_name(base), reason=reason)
