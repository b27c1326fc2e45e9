"""Settings into adapters, the same way in every service. Nothing is opened here."""

from __future__ import annotations

import hashlib
import time

from shared.adapters.catalogs.cached import CachedCatalog, CacheLimits
from shared.adapters.catalogs.joystream import ChainHead, JoystreamCatalog, SquidLimits
from shared.adapters.catalogs.manifest import ManifestCatalog
from shared.adapters.catalogs.origin import OriginCatalog
from shared.adapters.queue_memory import MemoryJobQueue
from shared.adapters.queue_rabbitmq import RabbitJobQueue
from shared.adapters.sources.client import SourceClient
from shared.adapters.sources.health import HealthBook
from shared.adapters.sources.limits import SourceLimits
from shared.adapters.sources.observation import SourceObservation
from shared.adapters.sources.prober import SourceProber
from shared.adapters.sources.relay import Relay
from shared.adapters.sources.sharing import SourceSharing
from shared.adapters.state_memory import MemoryStateStore
from shared.adapters.state_redis import RedisStateStore
from shared.adapters.state_redis.catalog_memory import RedisCatalogMemory
from shared.adapters.state_redis.source_memory import RedisSourceMemory
from shared.adapters.state_times import StateTimes
from shared.adapters.volume import Volume
from shared.domain.errors import ConfigurationError
from shared.domain.jobs import RetryPlan
from shared.observability.metrics import (
    SOURCE_BYTES,
    SOURCE_FAILURES,
    SOURCE_LATENCY,
    SOURCE_REQUESTS,
    source_label,
)
from shared.ports.catalog import Catalog
from shared.ports.catalog_memory import CatalogMemory
from shared.ports.job_queue import JobQueue
from shared.ports.source_memory import SourceMemory
from shared.ports.state_store import StateStore
from shared.settings.model import Settings

MEMORY = "memory://"


def build_volume(settings: Settings) -> Volume:
    return Volume(settings.storage.path, handed_over=bool(settings.public_api.accel_redirect_prefix))


def build_state_store(settings: Settings) -> StateStore:
    """All tasks of a process share one: in memory, two would know nothing of each other."""
    store = settings.state_store
    times = StateTimes(lease_seconds=settings.fetch.lease, operation_timeout=store.operation_timeout)
    url = store.url.get_secret_value()
    if url.startswith(MEMORY):
        return MemoryStateStore(settings.storage.limit, times, time.time)
    return RedisStateStore(url, store.prefix, settings.storage.limit, times)


def build_job_queue(settings: Settings) -> JobQueue:
    """As with the state store: one in each process."""
    queue = settings.job_queue
    plan = RetryPlan(queue.retry_delays)
    url = queue.url.get_secret_value()
    if url.startswith(MEMORY):
        return MemoryJobQueue(plan)
    return RabbitJobQueue(url, queue.prefix, plan, queue.publish_timeout, int(queue.consumer_timeout * 1000))


def build_catalog(settings: Settings) -> Catalog:
    """A manifest is in memory and seen at once when it changes; what is asked over the network is cached."""
    catalog = settings.catalog
    if catalog.kind == "manifest":
        if catalog.manifest is None:
            raise ConfigurationError("catalog.manifest is missing")
        return ManifestCatalog(catalog.manifest)
    limits = CacheLimits(
        positive_ttl=catalog.positive_ttl,
        negative_ttl=catalog.negative_ttl,
        max_in_flight=catalog.max_in_flight,
        wait=catalog.timeout,
    )
    if catalog.kind == "joystream":
        return CachedCatalog(build_joystream(settings), limits, memory=_build_catalog_memory(settings))
    if catalog.origin is None:
        raise ConfigurationError("catalog.origin is missing")
    return CachedCatalog(OriginCatalog(catalog.origin, catalog.timeout), limits)


def build_joystream(settings: Settings) -> JoystreamCatalog:
    """Without a cache: for the list of storage nodes and the squid's own state. To be opened and closed by its user."""
    catalog = settings.catalog
    limits = SquidLimits(
        timeout=catalog.timeout,
        list_timeout=catalog.list_timeout,
        list_batch=catalog.list_batch,
        list_pause=catalog.list_pause,
    )
    return JoystreamCatalog(catalog.squid, limits, refuse_private=catalog.refuse_private_sources)


def build_chain_head(settings: Settings) -> ChainHead | None:
    """None: no chain is configured."""
    chain = settings.catalog.chain
    return None if chain is None else ChainHead(chain, settings.catalog.timeout)


def _build_catalog_memory(settings: Settings) -> CatalogMemory | None:
    """None in one process, whose cache has nobody to share with."""
    store = settings.state_store
    url = store.url.get_secret_value()
    if url.startswith(MEMORY):
        return None
    # Named after the squid, and after what decides which sources an answer holds: no answer outlives a change of those.
    identity = f"{settings.catalog.squid} {settings.catalog.refuse_private_sources}"
    name = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return RedisCatalogMemory(url, store.prefix, store.operation_timeout, name)


def build_source_client(settings: Settings, max_connections: int) -> SourceClient:
    """One for each purpose: downloads, proxying."""
    fetch = settings.fetch
    limits = SourceLimits(
        connect_timeout=fetch.connect_timeout,
        first_byte_timeout=fetch.first_byte_timeout,
        stall_timeout=fetch.stall_timeout,
        minimum_rate=fetch.minimum_rate,
        max_connections=max_connections,
        refuse_private=settings.catalog.refuse_private_sources,
    )
    return SourceClient(limits, count_observation)


def build_source_sharing(settings: Settings) -> SourceSharing:
    """One in each process, with the book that all its relays go by. To be opened and closed by its user."""
    book = HealthBook(corrupted_memory=settings.sources.corrupted_memory)
    return SourceSharing(book, _build_source_memory(settings), settings.sources.share_interval)


def _build_source_memory(settings: Settings) -> SourceMemory | None:
    """None in one process, whose book has nobody to share with."""
    store = settings.state_store
    url = store.url.get_secret_value()
    return None if url.startswith(MEMORY) else RedisSourceMemory(url, store.prefix, store.operation_timeout)


def build_source_prober(settings: Settings, book: HealthBook) -> SourceProber:
    """To be opened and closed by its user."""
    sources, refuse = settings.sources, settings.catalog.refuse_private_sources
    return SourceProber(book, sources.probe_timeout, sources.probes_at_once, refuse_private=refuse)


def build_relay(client: SourceClient, book: HealthBook) -> Relay:
    """Reads through `client`, which is opened and closed by whoever built it."""
    return Relay(client, book)


def count_observation(observation: SourceObservation) -> None:
    """One request to a source, in the metrics."""
    source = source_label(f"//{observation.source}")
    SOURCE_REQUESTS.labels(source=source).inc()
    if observation.first_byte is not None:
        SOURCE_LATENCY.labels(source=source).observe(observation.first_byte)
    if observation.received:
        SOURCE_BYTES.labels(source=source).inc(observation.received)
    if observation.failure is not None:
        SOURCE_FAILURES.labels(source=source, reason=observation.failure).inc()
