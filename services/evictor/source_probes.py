"""Probes of the storage nodes, once for the whole deployment, and gauges of the order in which they are asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import structlog

from distributor_node.shared.adapters.sources.health import SourceProber, SourceStatsSync
from distributor_node.shared.domain.errors import CatalogUnavailable
from distributor_node.shared.domain.objects import source_name
from distributor_node.shared.domain.source_order import rank
from distributor_node.shared.observability.metrics import publish_source_ranks
from distributor_node.shared.ports.catalog import Catalog

_MAX_PROBED = 500
_LIST_INTERVAL = 600.0  # seconds; the network's list of storage nodes changes within days
_PUBLISH_INTERVAL = 2.0  # seconds
_MAX_LOGGED = 20

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class MonitorTimes:
    """Intervals in seconds."""

    probe_interval: float  # between two probes of one source
    list_interval: float = _LIST_INTERVAL  # between two readings of the catalog's list of sources


class SourceMonitor:
    """Probes sources while this evictor leads. `open` before use, `close` at the end."""

    def __init__(
        self, catalog: Catalog, stats_sync: SourceStatsSync, prober: SourceProber, times: MonitorTimes
    ) -> None:
        """The caller opens and closes `catalog` and `stats_sync`."""
        self._catalog, self._stats_sync, self._prober, self._times = catalog, stats_sync, prober, times
        self._bases: Sequence[str] = ()
        self._list_at = self._probe_at = float("-inf")
        self._published: tuple[str, ...] = ()

    async def open(self) -> None:
        await self._prober.open()

    async def close(self) -> None:
        await self._prober.close()
        self.clear_gauges()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def clear_gauges(self) -> None:
        """Remove our gauges: another evictor leads and publishes them."""
        self._published = ()
        publish_source_ranks(())

    async def step(self) -> float:
        """Probe if it is time to, and publish the order as all processes see it. Returns the seconds until the next
        step."""
        now = self._stats_sync.registry.clock()
        if now >= self._probe_at:
            self._probe_at = now + self._times.probe_interval
            await self._refresh_list(now)
            await self._prober.probe_all(self._bases)
        await self._stats_sync.sync()
        self._publish_gauges()
        return min(_PUBLISH_INTERVAL, self._times.probe_interval)

    async def _refresh_list(self, now: float) -> None:
        """Read the list if it is old; keep the last one while the catalog is unavailable."""
        if now < self._list_at:
            return
        try:
            bases = await self._catalog.source_bases()
        except CatalogUnavailable as error:
            logger.warning("source_listing_failed", reason=str(error), kept=len(self._bases))
            return
        self._bases = bases[:_MAX_PROBED]
        self._list_at = now + self._times.list_interval

    def _publish_gauges(self) -> None:
        registry, now = self._stats_sync.registry, self._stats_sync.registry.clock()
        listed = [source_name(base) for base in self._bases]
        names = dict.fromkeys((*listed, *sorted(registry.names())))
        health = {name: registry.health_of(name) for name in names}
        ordered = tuple(sorted(names, key=lambda name: rank(health[name], now)))
        publish_source_ranks(
            (name, health[name].mean_first_byte, max(0.0, health[name].penalty_ends - now))
            for name in ordered
        )
        if ordered != self._published:
            self._published = ordered
            logger.info("source_order_changed", sources=ordered[:_MAX_LOGGED], count=len(ordered))
