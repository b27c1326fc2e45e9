"""Builds the adapters from the settings, for every service. The caller opens and closes them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import TypeVar

from distributor_node.shared.adapters.catalogs.cached import CachedCatalog, CacheLimits
from distributor_node.shared.adapters.catalogs.joystream import ChainHead, JoystreamCatalog, SquidLimits
from distributor_node.shared.adapters.catalogs.manifest import ManifestCatalog
from distributor_node.shared.adapters.catalogs.origin import OriginCatalog
from distributor_node.shared.adapters.peers import Peers
from distributor_node.shared.adapters.queue_memory import MemoryJobQueue
from distributor_node.shared.adapters.queue_rabbitmq import RabbitJobQueue
from distributor_node.shared.adapters.sources.client import SourceClient, SourceObservation
from distributor_node.shared.adapters.sources.connections import SourceLimits
from distributor_node.shared.adapters.sources.failover import FailoverReader
from distributor_node.shared.adapters.sources.health import (
    SourceHealthRegistry,
    SourceProber,
    SourceStatsSync,
)
from distributor_node.shared.adapters.sources.network import reload_certificates
from distributor_node.shared.adapters.state_common import StateTimeouts
from distributor_node.shared.adapters.state_memory import MemoryStateStore
from distributor_node.shared.adapters.state_redis import RedisStateStore
from distributor_node.shared.adapters.state_redis.caches import (
    RedisSharedCatalogCache,
    RedisSharedSourceStats,
)
from distributor_node.shared.adapters.volume import Volume
from distributor_node.shared.adapters.volume.known_ids import KnownIds
from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.domain.jobs import RetryPlan
from distributor_node.shared.observability.metrics import (
    SOURCE_BYTES,
    SOURCE_FAILURES,
    SOURCE_LATENCY,
    SOURCE_REQUESTS,
    source_label,
)
from distributor_node.shared.observability.tracing import tracing
from distributor_node.shared.ports.catalog import Catalog, SharedCatalogCache
from distributor_node.shared.ports.job_queue import JobQueue
from distributor_node.shared.ports.source_stats import SharedSourceStats
from distributor_node.shared.ports.state_store import StateStore
from distributor_node.shared.runtime.process import VERSION, process_name
from distributor_node.shared.settings.model import Settings

MEMORY = "memory://"
_MAX_UNSEEN_RATE = 200.0
"""Objects a second, per process, that are looked up though neither the list nor an earlier answer has named them. Each
takes half a millisecond of CPU: more of them would keep others waiting for the event loop."""
_Value = TypeVar("_Value")


def build_tracing(settings: Settings, service: str) -> AbstractAsyncContextManager[None]:
    """The first to be opened and the last to be closed, so that it sends the spans of all others."""
    return tracing(settings.tracing.enabled, service, version=VERSION, instance=process_name())


def build_volume(settings: Settings) -> Volume:
    return Volume(settings.storage.path, accel_redirect=bool(settings.public_api.accel_redirect_prefix))


def build_state_store(settings: Settings) -> StateStore:
    """Build one per process: two stores in memory would not share their state."""
    store = settings.state_store
    timeouts = StateTimeouts(lease_seconds=settings.fetch.lease, operation_timeout=store.operation_timeout)
    url = store.url.get_secret_value()
    if url.startswith(MEMORY):
        return MemoryStateStore(settings.storage.limit, timeouts, time.time)
    return RedisStateStore(url, store.prefix, settings.storage.limit, timeouts)


def build_job_queue(settings: Settings) -> JobQueue:
    """Build one per process, as with the state store."""
    queue = settings.job_queue
    plan = RetryPlan(queue.retry_delays)
    url = queue.url.get_secret_value()
    if url.startswith(MEMORY):
        return MemoryJobQueue(plan)
    return RabbitJobQueue(url, queue.prefix, plan, queue.publish_timeout, int(queue.consumer_timeout * 1000))


def build_catalog(settings: Settings) -> Catalog:
    """Build the catalog of the configured kind. Catalogs that are asked over the network get a cache."""
    catalog = settings.catalog
    if catalog.kind == "manifest":
        return ManifestCatalog(_required(catalog.manifest, "catalog.manifest"))
    limits = CacheLimits(
        positive_ttl=catalog.positive_ttl,
        negative_ttl=catalog.negative_ttl,
        max_in_flight=catalog.max_in_flight,
        wait=catalog.lookup_wait,
        query_timeout=catalog.timeout,
        unaccepted_ttl=catalog.unaccepted_ttl,
    )
    if catalog.kind == "joystream":
        limits = replace(
            limits,
            max_rate=catalog.max_query_rate / settings.public_api.workers,
            max_unseen_rate=_MAX_UNSEEN_RATE,
        )
        return CachedCatalog(
            _build_joystream(settings),
            limits,
            shared_cache=_build_shared_catalog_cache(settings),
            assignment=settings.assignment,
            known_ids=KnownIds(settings.storage.path),
        )
    origin = OriginCatalog(
        _required(catalog.origin, "catalog.origin"),
        catalog.timeout,
        follow_to_other_hosts=settings.origin.follow_to_other_hosts,
        refuse_private=catalog.refuses_private_sources,
    )
    return CachedCatalog(origin, limits)


def reloads_of(catalog: Catalog) -> list[Callable[[], Awaitable[None]]]:
    """Return what a service does at a SIGHUP: read the manifest and the trusted certificates again."""
    manifest = [catalog.read_again] if isinstance(catalog, ManifestCatalog) else []
    return [*manifest, reload_certificates]


def revision_of(catalog: Catalog) -> Callable[[], Awaitable[int]] | None:
    """Return what tells that the whole list of objects was replaced. None: the catalog is asked for each object."""
    return catalog.revision if isinstance(catalog, ManifestCatalog) else None


def _required(value: _Value | None, name: str) -> _Value:
    """Narrow the type: the settings have been validated for their kind."""
    if value is None:
        raise ConfigurationError(f"{name}: missing")
    return value


def _build_joystream(settings: Settings) -> JoystreamCatalog:
    catalog = settings.catalog
    limits = SquidLimits(
        timeout=catalog.timeout,
        list_timeout=catalog.list_timeout,
        list_batch=catalog.list_batch,
        list_pause=catalog.list_pause,
    )
    chain = None if catalog.chain is None else ChainHead(catalog.chain, catalog.timeout)
    return JoystreamCatalog(
        catalog.squid, limits, refuse_private=catalog.refuses_private_sources, chain=chain
    )


def _build_shared_catalog_cache(settings: Settings) -> SharedCatalogCache | None:
    """None in a node of one process."""
    store = settings.state_store
    url = store.url.get_secret_value()
    if url.startswith(MEMORY):
        return None
    # The name depends on the squid and on what decides which sources an answer has, so that answers do not survive a
    # change of these settings.
    identity = f"{settings.catalog.squid} {settings.catalog.refuses_private_sources}"
    name = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return RedisSharedCatalogCache(url, store.prefix, store.operation_timeout, name)


def build_source_client(
    settings: Settings, max_connections: int, *, large_reads: bool = False
) -> SourceClient:
    """Build one for each purpose: downloads, proxying. `large_reads`: see SourceLimits."""
    fetch = settings.fetch
    limits = SourceLimits(
        connect_timeout=fetch.connect_timeout,
        first_byte_timeout=fetch.first_byte_timeout,
        stall_timeout=fetch.stall_timeout,
        minimum_rate=fetch.minimum_rate,
        max_connections=max_connections,
        follow_to_other_hosts=settings.catalog.kind != "origin" or settings.origin.follow_to_other_hosts,
        refuse_private=settings.catalog.refuses_private_sources,
        large_reads=large_reads,
    )
    return SourceClient(limits, count_observation, count_bytes=count_source_bytes)


def build_source_stats_sync(settings: Settings) -> SourceStatsSync:
    """Build one per process, with the registry that all its failover readers use."""
    registry = SourceHealthRegistry(corrupted_memory=settings.sources.corrupted_memory)
    return SourceStatsSync(registry, _build_shared_source_stats(settings), settings.sources.share_interval)


def _build_shared_source_stats(settings: Settings) -> SharedSourceStats | None:
    """None in a node of one process."""
    store = settings.state_store
    url = store.url.get_secret_value()
    return (
        None if url.startswith(MEMORY) else RedisSharedSourceStats(url, store.prefix, store.operation_timeout)
    )


def build_source_prober(settings: Settings, registry: SourceHealthRegistry) -> SourceProber:
    sources, refuse = settings.sources, settings.catalog.refuses_private_sources
    return SourceProber(registry, sources.probe_timeout, sources.probes_at_once, refuse_private=refuse)


def build_peers(settings: Settings, registry: SourceHealthRegistry, max_connections: int) -> Peers | None:
    """Build one per process. None: the node is in no fleet."""
    rules, fetch = settings.peers.rules, settings.fetch
    if rules is None:
        return None
    limits = SourceLimits(
        connect_timeout=rules.first_byte_wait,
        first_data_timeout=rules.first_byte_wait,
        first_byte_timeout=fetch.first_byte_timeout,
        stall_timeout=fetch.stall_timeout,
        minimum_rate=fetch.minimum_rate,
        max_connections=max_connections,
        follow_to_other_hosts=False,
    )
    return Peers(rules, limits, registry.is_penalised, settings.peers.secret_file)


def build_failover_reader(
    client: SourceClient, registry: SourceHealthRegistry, peers: Peers | None = None
) -> FailoverReader:
    return FailoverReader(client, registry, peers=peers)


def count_observation(observation: SourceObservation) -> None:
    """Count one request to a source in the metrics."""
    source = source_label(f"//{observation.source}")
    SOURCE_REQUESTS.labels(source=source).inc()
    if observation.first_byte is not None:
        SOURCE_LATENCY.labels(source=source).observe(observation.first_byte)
    if observation.failure is not None:
        SOURCE_FAILURES.labels(source=source, reason=observation.failure).inc()


def count_source_bytes(source: str, count: int) -> None:
    """Count bytes from a source in the metrics."""
    SOURCE_BYTES.labels(source=source_label(f"//{source}")).inc(count)
