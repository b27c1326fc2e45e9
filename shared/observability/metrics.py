"""Every metric of the node, and their export.

Names begin with `distributor_` and end in their unit. Labels have few values: never an object id, and a source is its
host and port (`source_label`).
"""

from __future__ import annotations

import asyncio
import os
import platform
import time
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import cache
from heapq import nlargest
from itertools import islice
from math import inf
from typing import Any, Literal
from urllib.parse import urlsplit

from prometheus_client import (
    CONTENT_TYPE_PLAIN_0_0_4,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.samples import Exemplar

from distributor_node.shared.domain.space import Completion
from distributor_node.shared.observability.multiprocess import VARIABLE, files_locked

# A `_created` gauge for each series would double the page.
disable_created_metrics()  # type: ignore[no-untyped-call]

MAX_SOURCES = 200
FIRST_BYTE_BOUNDS = _SHORT_BUCKETS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    5,
    10,
    20,
)
_LONG_BUCKETS = (0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900, 3600)


class ReportedGauge:
    """A gauge without labels that is exported only after it is first set: a fetcher shows no storage limit of 0.

    In multiprocess mode, the last process that sets it wins.
    """

    def __init__(self, name: str, documentation: str) -> None:
        self._name, self._documentation = name, documentation
        self._gauge: Gauge | None = None

    def set(self, value: float) -> None:
        """Set the gauge. From the first call on, it is exported."""
        if self._gauge is None:
            self._gauge = Gauge(self._name, self._documentation, multiprocess_mode="mostrecent")
        self._gauge.set(value)


# Peers: other nodes of the fleet (API and fetcher)
PEERS_ALIVE = ReportedGauge("distributor_peers_alive", "Other nodes of the fleet that answer probes.")
PEERS_NOT_ALIVE = ReportedGauge("distributor_peers_not_alive", "Other nodes of the fleet that do not.")
PEER_REQUESTS = Counter(
    "distributor_peer_requests_total",
    "Requests to peers by result: hit, fetched (the peer had to fetch the object), absent, failed.",
    ["result"],
)
PEER_BYTES = Counter(
    "distributor_peer_bytes_total", "Bytes of objects received from peers, by peer.", ["peer"]
)
PEER_LATENCY = Histogram(
    "distributor_peer_latency_seconds",
    "From the request to a peer to the head of its response.",
    buckets=_SHORT_BUCKETS,
)
PEER_ASKED = Counter(
    "distributor_peer_asked_total",
    "Requests of other nodes that were no hits, by sender: peer, stranger (not signed as the fleet signs).",
    ["sender"],
)

PEER_COPIES = Counter(
    "distributor_peer_copies_total",
    "Offers to second homes by result: offered (it copies the object, if it can), there (it has it).",
    ["result"],
)

# Requests (API)
REQUESTS = Counter(
    "distributor_requests_total",
    "HTTP requests by method, status and cache result: hit, pending, miss, none; absent: only what is cached was"
    " wanted, and it is not.",
    ["method", "status", "cache"],
)
REQUESTS_IN_PROGRESS = Gauge(
    "distributor_requests_in_progress", "HTTP requests in progress.", multiprocess_mode="livesum"
)
PROXIED_IN_PROGRESS = Gauge(
    "distributor_proxied_in_progress", "Responses being proxied from a source.", multiprocess_mode="livesum"
)
SENT_BYTES = Counter(
    "distributor_sent_bytes_total",
    "Bytes of objects sent to clients, by source: local, external.",
    ["source"],
)


@cache
def sent_bytes(source: str) -> Counter:
    """SENT_BYTES of one source, looked up once: it is counted for each piece of a body."""
    return SENT_BYTES.labels(source=source)


TIME_TO_FIRST_BYTE = Histogram(
    "distributor_time_to_first_byte_seconds",
    "From the head of a GET to the first byte of its body, by cache result.",
    ["cache"],
    buckets=_SHORT_BUCKETS,
)
SEND_BLOCKED = Histogram(
    "distributor_blocked_send_seconds",
    "Time that the first send of a hit kept all connections of its process waiting, where it was more than 20 ms: its "
    "bytes were not in memory, or the process waited for the CPU.",
    buckets=_SHORT_BUCKETS,
)
ABORTED_RESPONSES = Counter(
    "distributor_aborted_responses_total", "Responses aborted before their last byte, by reason.", ["reason"]
)
ADMISSION_REJECTED = Counter(
    "distributor_admission_rejected_total",
    "Misses proxied without a fetch because it was the object's first view (admission.above_size).",
)
DROPPED_ACCESSES = Counter(
    "distributor_dropped_accesses_total",
    "Accesses dropped because they could not be flushed to the state store.",
)

# Traces (API and fetcher), where tracing is on
TRACE_SPANS = Counter(
    "distributor_trace_spans_total",
    "Spans by what became of them: sent, failed (the collector did not take them), over_limit (hits beyond the number "
    "that is recorded in a second).",
    ["result"],
)

# Phases of one GET (API and fetcher)
PHASE = Histogram(
    "distributor_phase_seconds",
    "Time taken by the phases of a miss: catalog, claim, publish, queue_wait, source_first_byte, download.",
    ["phase"],
    buckets=_LONG_BUCKETS,
)
CATALOG_LOOKUPS = Counter(
    "distributor_catalog_lookups_total",
    "Catalog look-ups by result: found, unknown, unavailable, refused, cached, stale.",
    ["result"],
)
CATALOG_REFUSED = Counter(
    "distributor_catalog_refused_total",
    "Look-ups that were refused because too many waited, by reason: queue_full (at once), no_turn (after the wait).",
    ["reason"],
)
CATALOG_QUERIES = Counter(
    "distributor_catalog_queries_total",
    "Queries for one or many objects, by outcome: answered, failed.",
    ["outcome"],
)
CATALOG_QUERY_OBJECTS = Counter(
    "distributor_catalog_query_objects_total", "Objects that these queries have asked for."
)
CATALOG_WAITING = Gauge(
    "distributor_catalog_waiting_objects",
    "Objects whose look-ups wait to be sent to the catalog.",
    multiprocess_mode="livesum",
)
CATALOG_QUEUE_AGE = Gauge(
    "distributor_catalog_queue_age_seconds",
    "How long the oldest of them has waited.",
    multiprocess_mode="livemax",
)
STATE_STORE_ERRORS = Counter(
    "distributor_state_store_errors_total",
    "Calls of Redis that failed, by script or command.",
    ["operation"],
)
JOB_QUEUE_ERRORS = Counter(
    "distributor_job_queue_errors_total",
    "Calls of RabbitMQ that failed: publish, consume, ack, republish.",
    ["operation"],
)

# What the API knows of the fetchers, by their heartbeats
WORKERS_ALIVE = ReportedGauge("distributor_workers_alive", "Fetchers whose heartbeat has not expired.")
WORKER_SLOTS = Gauge(
    "distributor_worker_slots",
    "Download slots of all fetchers by state: busy, free, wanted (jobs that wait for one).",
    ["state"],
    multiprocess_mode="mostrecent",
)
VAIN_WAITS = Counter(
    "distributor_vain_waits_total",
    "Requests that were proxied because a fetch did not begin: waited (in vain), or without waiting, by reason: "
    "no_worker, busy, not_begun, not_consumed.",
    ["reason"],
)

WORKERS_HUNG = Counter(
    "distributor_api_workers_hung_total", "API workers that were killed because their event loop stood still."
)
STALLED_FETCHES_BRIDGED = Counter(
    "distributor_stalled_fetches_bridged_total",
    "Responses continued from a source because the fetch they followed stalled, by end: caught_up, complete.",
    ["end"],
)

# The node's page (API)
DASHBOARD_PAGES = Gauge(
    "distributor_dashboard_pages", "Pages of the node that are open.", multiprocess_mode="livesum"
)
DASHBOARD_SNAPSHOT = Histogram(
    "distributor_dashboard_snapshot_seconds",
    "Time taken by one snapshot for the open pages, the waits for the state store included.",
    buckets=_SHORT_BUCKETS,
)

# Redis itself, by its INFO command (API)
STATE_STORE_MEMORY = ReportedGauge(
    "distributor_state_store_server_memory_bytes", "Memory that Redis uses for its data."
)
STATE_STORE_MEMORY_LIMIT = ReportedGauge(
    "distributor_state_store_server_memory_limit_bytes", "Memory that Redis may use (maxmemory); 0: no limit."
)
STATE_STORE_CLIENTS = ReportedGauge("distributor_state_store_server_clients", "Connections to Redis.")
STATE_STORE_COMMANDS = ReportedGauge(
    "distributor_state_store_server_commands", "Commands that Redis has processed since it started."
)
STATE_STORE_SAVING = ReportedGauge(
    "distributor_state_store_server_saving", "1 if Redis's last write to disk succeeded."
)
STATE_STORE_EVICTS = ReportedGauge(
    "distributor_state_store_server_evicts_info",
    "1 if Redis may drop keys when its memory is full: maxmemory-policy must be noeviction, and is not.",
)

# Space (API and evictor)
STORAGE_USED = ReportedGauge(
    "distributor_storage_used_bytes", "Bytes that complete objects take on the volume."
)
STORAGE_RESERVED = ReportedGauge(
    "distributor_storage_reserved_bytes", "Bytes reserved for fetches, active or suspended."
)
STORAGE_LIMIT = ReportedGauge("distributor_storage_limit_bytes", "The storage limit.")
STORAGE_HIGH_WATERMARK = ReportedGauge(
    "distributor_storage_high_watermark_bytes", "Used and reserved bytes above which the evictor makes room."
)
STORAGE_OBJECTS = ReportedGauge("distributor_storage_objects", "Complete objects on the volume.")
PARTIAL_OBJECTS = ReportedGauge("distributor_partial_objects", "Partial objects that no worker fetches.")
PARTIAL_HELD = ReportedGauge(
    "distributor_partial_held_bytes",
    "Bytes that the files of partial objects take. 0 from an evictor that does not lead.",
)
PARTIAL_RESERVED = ReportedGauge(
    "distributor_partial_reserved_bytes",
    "Bytes reserved for partial objects: what they hold, and for some seconds after a fetch has ended all that it "
    "had reserved.",
)
DEVICE_FREE_INODES = ReportedGauge(
    "distributor_device_free_inodes", "Files that can still be made on the device of the volume."
)
DEVICE_INODES = ReportedGauge(
    "distributor_device_inodes", "Files that the device of the volume can hold, used and free."
)
QUEUE_JOBS = Gauge(
    "distributor_queue_jobs",
    "Jobs on the queue by state: ready, delayed, dead.",
    ["state"],
    multiprocess_mode="mostrecent",
)

# Fetches (fetcher; those of sources also from the API's proxy)
FETCHES = Counter(
    "distributor_fetches_total",
    "Jobs that ended, by outcome: fetched, already_cached, retry, requeue, dead_letter, nack, … Dropped, since the "
    "catalog says so: does_not_exist, not_served, not_uploaded, unknown_size.",
    ["outcome"],
)
REVALIDATIONS = Counter(
    "distributor_revalidations_total",
    "Stale objects that an origin was asked about, by end: refreshed, removed, outdated, failed.",
    ["result"],
)
DOWNLOADS_IN_PROGRESS = Gauge(
    "distributor_downloads_in_progress", "Objects being downloaded.", multiprocess_mode="livesum"
)
DOWNLOADS_PAUSED = Gauge(
    "distributor_paused_downloads_in_progress",
    "Downloads of large objects that wait for their viewers to come nearer.",
    multiprocess_mode="livesum",
)
WINDOWED_FETCHES = Counter(
    "distributor_windowed_fetches_total",
    "Fetches of large objects that were completed, by why more was read than a little ahead of viewers: ordered, "
    "second_view, watched, viewers_unknown, spare_time; in_window: it was not.",
    ["reason"],
)
SIDE_STREAMS_IN_PROGRESS = Gauge(
    "distributor_side_streams_in_progress",
    "Gaps in front of viewers that are being filled, beside downloads in order.",
    multiprocess_mode="livesum",
)
SIDE_STREAMS = Counter(
    "distributor_side_streams_total",
    "Side streams that have ended, by end: done, failed, stopped.",
    ["end"],
)
SOURCE_REQUESTS = Counter(
    "distributor_source_requests_total",
    "Requests to sources that have ended, successful or not, by source.",
    ["source"],
)
SOURCE_LATENCY = Histogram(
    "distributor_source_latency_seconds",
    "From the request to a source to the head of its response, by source.",
    ["source"],
    buckets=_SHORT_BUCKETS,
)
SOURCE_FAILURES = Counter(
    "distributor_source_failures_total",
    "Failures of sources by source and reason: unreachable, too_slow, http_error, invalid_response.",
    ["source", "reason"],
)
SOURCE_BYTES = Counter(
    "distributor_source_bytes_total", "Bytes received from sources, by source.", ["source"]
)
WRITTEN_BYTES = Counter(
    "distributor_written_bytes_total", "Bytes of objects written to the volume, including incomplete ones."
)
SOURCE_PROBES = Counter(
    "distributor_source_probes_total", "Probes of storage nodes by result: answered, failed.", ["result"]
)
SOURCE_RANK = Gauge("distributor_source_rank", "Rank of a source; rank 1 is tried first.", ["source"])
SOURCE_FIRST_BYTE = Gauge(
    "distributor_source_first_byte_seconds",
    "Mean time to the first byte of a source's last ten responses.",
    ["source"],
)
SOURCE_COOLDOWN = Gauge(
    "distributor_source_cooldown_seconds",
    "Seconds for which a failing source is still ranked behind the others.",
    ["source"],
)

# Eviction, reconciliation, scrub (evictor)
EVICTIONS = Counter("distributor_evictions_total", "Objects removed from the volume, by reason.", ["reason"])
EVICTED_BYTES = Counter(
    "distributor_evicted_bytes_total", "Bytes removed from the volume, by reason.", ["reason"]
)
EVICTION_BLOCKED = Counter(
    "distributor_eviction_blocked_total",
    "Eviction passes that needed more space than could be evicted.",
)
LAST_EVICTION_MAX_IDLE = ReportedGauge(
    "distributor_last_eviction_max_idle_seconds", "Longest idle time among the objects of the last eviction."
)
EVICTED_OBJECT_IDLE = Histogram(
    "distributor_evicted_object_idle_seconds",
    "Time since the last access of the objects that were evicted to make room.",
    buckets=(60, 120, 300, 900, 3600, 4 * 3600, 86400, 3 * 86400, 7 * 86400, 30 * 86400),
)
EVICTED_OBJECT_SIZE = Histogram(
    "distributor_evicted_object_size_bytes",
    "Size of the objects that were evicted to make room.",
    buckets=tuple(4.0**power for power in range(6, 17)),
)
REFETCHED_AFTER_EVICTION = Counter(
    "distributor_refetched_after_eviction_total",
    "Objects fetched again within an hour after they were evicted to make room.",
)
RECONCILED = Counter(
    "distributor_reconciled_total",
    "Differences that reconciliation has found and repaired, by result: adopted, dropped_record, removed_partial, …",
    ["result"],
)
RECONCILE_TIME = Histogram(
    "distributor_reconcile_seconds", "Time taken by one reconciliation.", buckets=_LONG_BUCKETS
)
SCRUBBED_OBJECTS = Counter(
    "distributor_scrubbed_objects_total", "Objects re-hashed on disk, by result: ok, corrupt.", ["result"]
)
SCRUBBED_BYTES = Counter("distributor_scrubbed_bytes_total", "Bytes re-hashed on disk.")
UNKNOWN_FILES = ReportedGauge(
    "distributor_unknown_files",
    "Files and links on the volume that do not belong to the node. It leaves them alone.",
)
FOREIGN_OPENED = Counter(
    "distributor_foreign_files_opened_total",
    "Names of objects, records and partial files that were no regular files when they were opened: a link, a FIFO, "
    "a directory. Each counts as missing.",
)
FILES_CHANGED = Counter(
    "distributor_changed_files_total",
    "Times that an object's file was not as it was verified. It is a miss until it has been hashed again.",
)
VOLUME_READ_ERRORS = Counter(
    "distributor_volume_read_errors_total",
    "Reads of the volume that the disk failed. The object was proxied.",
)
LEADER = ReportedGauge("distributor_evictor_leader", "1 in the leading evictor, 0 in a standby.")

BUILD = Gauge(
    "distributor_build_info",
    "Always 1. The labels say what is running.",
    ["version", "python", "service"],
    multiprocess_mode="max",
)

# Series that exist from the start, at 0. If a series began at 1, Prometheus would miss its first increment.
_PRECREATED: dict[str, dict[Counter, tuple[str, ...]]] = {
    "api": {
        CATALOG_LOOKUPS: ("found", "unknown", "unavailable", "refused", "cached", "stale"),
        CATALOG_REFUSED: ("queue_full", "no_turn"),
        CATALOG_QUERIES: ("answered", "failed"),
        ABORTED_RESPONSES: ("client_disconnected", "client_stalled", "client_too_slow", "source_failed"),
        VAIN_WAITS: ("waited", "no_worker", "busy", "not_begun", "not_consumed"),
        STALLED_FETCHES_BRIDGED: ("caught_up", "complete"),
        REVALIDATIONS: ("refreshed", "removed", "outdated", "failed"),
    },
    "fetcher": {
        FETCHES: ("does_not_exist", "not_served", "not_uploaded", "paused"),
        WINDOWED_FETCHES: (*Completion, "in_window"),
        SIDE_STREAMS: ("done", "failed", "stopped"),
    },
    "evictor": {
        EVICTIONS: ("space",),
        RECONCILED: ("adopted", "dropped_record"),
        SCRUBBED_OBJECTS: ("ok", "corrupt"),
    },
}

_sources_seen: set[str] = set()


def source_label(url: str) -> str:
    """Return host and port of a source's URL. After MAX_SOURCES different ones, return `other`."""
    parts = urlsplit(url)
    label = parts.netloc.rpartition("@")[2].lower() or "unknown"
    if label not in _sources_seen:
        if len(_sources_seen) >= MAX_SOURCES:
            return "other"
        _sources_seen.add(label)
    return label


def publish_source_ranks(ordered: Iterable[tuple[str, float | None, float]]) -> None:
    """Export the ranking of the sources, best first, in the process that knows it. It replaces the previous one.

    Of each source: `host:port`, mean seconds to the first byte (None: unknown), seconds of cooldown left.
    """
    for gauge in (SOURCE_RANK, SOURCE_FIRST_BYTE, SOURCE_COOLDOWN):
        gauge.clear()
    for rank, (name, first_byte, cooldown) in enumerate(islice(ordered, MAX_SOURCES), start=1):
        SOURCE_RANK.labels(source=name).set(rank)
        SOURCE_COOLDOWN.labels(source=name).set(cooldown)
        if first_byte is not None:
            SOURCE_FIRST_BYTE.labels(source=name).set(first_byte)


def method_label(method: str) -> str:
    """Return the method, or `other` for unknown ones, which clients can invent."""
    return method if method in {"GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"} else "other"


def describe_build(version: str, service: Literal["api", "fetcher", "evictor", "standalone"]) -> None:
    """Export what is running, and create the most important series of its counters."""
    for one in _PRECREATED if service == "standalone" else (service,):
        for counter, values in _PRECREATED.get(one, {}).items():
            for value in values:
                counter.labels(value)
    BUILD.labels(version=version, python=platform.python_version(), service=service).set(1)


Render = Callable[[], Awaitable[tuple[bytes, str]]]
"""Returns the metrics and their media type, without holding up the event loop."""


async def render_in_thread() -> tuple[bytes, str]:
    """`render_metrics`, without holding up the event loop."""
    return await asyncio.to_thread(render_metrics)


def render_metrics() -> tuple[bytes, str]:
    """Return all metrics as text, and its media type. In multiprocess mode, those of all processes together."""
    if VARIABLE not in os.environ:
        return generate_latest(REGISTRY), CONTENT_TYPE_PLAIN_0_0_4
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    with files_locked():
        return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4


async def render_openmetrics() -> tuple[bytes, str]:
    """Return the metrics of this process with their exemplars, as OpenMetrics 1.0, and its media type.

    Not in multiprocess mode: the files of prometheus-client keep no exemplars.
    """
    return await asyncio.to_thread(openmetrics.generate_latest, REGISTRY), openmetrics.CONTENT_TYPE_LATEST


def has_exemplars() -> bool:
    """Whether observations keep exemplars. They do not in multiprocess mode."""
    return VARIABLE not in os.environ


# What one process has counted, for the node's page: plain numbers, which add up over processes.

_RESULTS = ("hit", "pending", "miss")
MAX_REPORTED_SOURCES = 50


def counted_here() -> dict[str, Any]:
    """Return counters of this process alone, as JSON: also of one worker among several.

    requests      GETs of assets by cache result, and `error` for answers of 500 and above, but for `absent` ones
    sent          bytes by source: local, external
    fetched       bytes received from sources
    first_byte    observations in each bucket of FIRST_BYTE_BOUNDS, not cumulative
    evictions     objects by reason; evicted_bytes: of all reasons
    sources       by source: requests, bytes, failures by reason; the busiest MAX_REPORTED_SOURCES
    peers         bytes received by peer
    """
    requests = dict.fromkeys((*_RESULTS, "error"), 0.0)
    for labels, value in _samples(REQUESTS):
        if labels["status"] >= "500" and labels["cache"] != "absent":
            requests["error"] += value
        elif labels["method"] == "GET" and labels["cache"] in _RESULTS:
            requests[labels["cache"]] += value
    sources: dict[str, dict[str, Any]] = {}
    for counter, name in ((SOURCE_REQUESTS, "requests"), (SOURCE_BYTES, "bytes")):
        for labels, value in _samples(counter):
            sources.setdefault(labels["source"], {"failures": {}})[name] = value
    for labels, value in _samples(SOURCE_FAILURES):
        sources.setdefault(labels["source"], {"failures": {}})["failures"][labels["reason"]] = value
    busiest = nlargest(MAX_REPORTED_SOURCES, sources, key=lambda name: sources[name].get("requests", 0))
    return {
        "requests": requests,
        "sent": {labels["source"]: value for labels, value in _samples(SENT_BYTES)},
        "fetched": sum(value for _, value in _samples(SOURCE_BYTES)),
        "first_byte": _observations(TIME_TO_FIRST_BYTE),
        "evictions": {labels["reason"]: value for labels, value in _samples(EVICTIONS)},
        "evicted_bytes": sum(value for _, value in _samples(EVICTED_BYTES)),
        "sources": {name: sources[name] for name in busiest},
        "peers": {labels["peer"]: value for labels, value in _samples(PEER_BYTES)},
    }


def _samples(counter: Counter) -> Iterable[tuple[dict[str, str], float]]:
    for family in counter.collect():
        for sample in family.samples:
            if sample.name.endswith("_total"):
                yield sample.labels, sample.value


def _observations(histogram: Histogram) -> list[float]:
    """Observations in each bucket, of all label values together."""
    counts = [0.0] * (len(FIRST_BYTE_BOUNDS) + 1)
    for family in histogram.collect():
        for sample in family.samples:
            if sample.name.endswith("_bucket"):
                bound = float(sample.labels["le"])
                place = bisect_left(FIRST_BYTE_BOUNDS, bound) if bound < inf else len(FIRST_BYTE_BOUNDS)
                counts[place] += sample.value
    return [count - (counts[place - 1] if place else 0.0) for place, count in enumerate(counts)]


# Histogram observations that were counted elsewhere, added in one call.


def bounds_of(histogram: Histogram) -> Sequence[float]:
    """Return the upper bounds of a histogram's buckets. The last one is infinite."""
    bounds: Sequence[float] = histogram._upper_bounds
    return bounds


def add_observations(histogram: Histogram, counts: Sequence[int], total: float) -> None:
    """Add observations: their number in each bucket (not cumulative), and their sum.

    prometheus-client has only a call for each observation, which is too slow for the hit path.
    """
    histogram._sum.inc(total)
    for bucket, count in zip(histogram._buckets, counts, strict=True):
        if count:
            bucket.inc(count)


def set_exemplar(histogram: Histogram, value: float, labels: Mapping[str, str]) -> None:
    """Set the exemplar of the bucket of `value`, which was counted elsewhere."""
    bucket = histogram._buckets[bisect_left(bounds_of(histogram), value)]
    bucket.set_exemplar(Exemplar(dict(labels), value, time.time()))
