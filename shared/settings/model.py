"""Every setting, with its type, default and meaning, and the rules between settings.

The groups stand in the order of `Settings`, which is at the end. The docstrings of the fields are the text of
docs/configuration.md (`make reference`).
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping
from ipaddress import ip_network
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, PrivateAttr, SecretStr, field_validator, model_validator

from distributor_node.shared.domain.errors import ConfigurationError, InvalidInput
from distributor_node.shared.domain.eviction import AUTO_COST, PolicyName
from distributor_node.shared.domain.http_caching import CachingRules
from distributor_node.shared.domain.jobs import CLAIM_SECONDS
from distributor_node.shared.domain.objects import Assignment, parse_bucket_id
from distributor_node.shared.domain.space import Watermarks, footprint, watermarks_for
from distributor_node.shared.domain.urls import names_host
from distributor_node.shared.settings.peers import PeerSettings
from distributor_node.shared.settings.sizes import (
    AdmissionSize,
    MissCostSetting,
    SettingsGroup,
    Size,
    WindowSize,
    format_size,
)

Seconds = Annotated[float, Field(gt=0, le=7 * 24 * 3600)]
Port = Annotated[int, Field(ge=0, le=65535)]
MIN_USABLE_SIZE = 64 * 1024  # bytes

# Not structlog: settings are read before logs are configured, and a plain logger then writes to stderr
logger = logging.getLogger(__name__)


FORMER_NAMES = {"evictor": {"duty_interval": "assignment_interval"}}
"""By group: former name to current name."""


def rename_settings(values: Any, group: str) -> Any:
    """The values of a group, from file and environment together, under their current names.

    A former name works and is logged. ValueError if both are set.
    """
    if not isinstance(values, Mapping):
        return values
    current = dict(values)
    for former, name in FORMER_NAMES[group].items():
        if former not in current:
            continue
        if name in current:
            raise ValueError(f"{former} is the former name of {name}: expected one of them, got both")
        current[name] = current.pop(former)
        logger.warning(
            "setting %s.%s has been renamed to %s.%s; the former name still works", group, former, group, name
        )
    return current


class PublicApi(SettingsGroup):
    """The HTTP server for clients."""

    host: str = "0.0.0.0"
    """Address to listen on."""
    port: Port = 3334
    """Port to listen on; 0 takes any free one."""
    workers: int = Field(default=1, ge=1, le=64)
    """Processes that share the port. One per core is enough."""
    hang_timeout: Seconds = 10.0
    """Seconds without a heartbeat of a worker's event loop after which the supervisor kills and replaces it."""
    first_byte_wait: Seconds = 2.5
    """Seconds from its arrival until a miss that waits for the first byte of its fetch is proxied to a source, and so
    begins within 3. It waits for at least 1, whatever time its look-up took."""
    proxied_first_byte_wait: Seconds = 10.0
    """Seconds for a proxied response to begin, all sources together; then 504. Players give up after 20.

    Also for a range of a source that ignores ranges, from the request's arrival until the fetch has reached it; then
    503 with Retry-After."""
    send_stall_limit: Seconds = 120.0
    """Seconds after which a client that reads nothing (a paused player) is disconnected."""
    minimum_client_rate: Size = Field(default=4 * 1024)
    """Bytes per second below which a client counts as slow. When places for proxied responses or space in the cache are
    scarce, the slowest are ended first; otherwise they are left alone, up to `send_stall_limit`. 0: none is slow."""
    keep_alive_timeout: Seconds = 75.0
    """Seconds an idle connection is kept open."""
    request_timeout: Seconds = 20.0
    """Seconds for a client to send the head of its request."""
    trusted_proxies: tuple[str, ...] = ()
    """Addresses or networks, such as 10.0.0.0/8, of the reverse proxies in front. From them, X-Forwarded-For names the
    client. A busy catalog is shared fairly among clients."""
    follow_growing_files: bool = True
    """Serve objects from their partial file while they are fetched. Turn this off if the volume is NFS shared by
    several hosts: pending requests are then proxied."""
    far_range_wait: Seconds = 0.5
    """Seconds that a range waits for its first byte if that is far ahead of a fetch, or expected later at its rate. The
    fetch is asked to bring it first; then it is proxied, as the last 64 KiB and objects without a hash are at once."""
    far_range_distance: Size = Field(default=4 * 1024**2)
    """A range is far ahead if it begins more than so many bytes after what is on disk."""
    stalled_fetch_wait: Seconds = 2.0
    """Seconds without a new byte of a fetch after which responses that follow it continue from a source, until the
    fetch has caught up."""
    max_proxied: int = Field(default=200, ge=1)
    """Responses proxied at once by one process. Further requests get 503 with Retry-After."""
    accel_redirect_prefix: str = Field(default="", pattern=r"^(/[A-Za-z0-9_-]+)*$")
    """Path of nginx's internal location for the volume's objects, such as /_objects. Hits are then sent by nginx
    (X-Accel-Redirect). Empty: the API sends every byte itself."""
    fast_lane: bool = True
    """Serve simple requests for cached objects without the web framework: the same responses, several times faster."""
    memory_cache: Size = Field(default=64 * 1024**2)
    """Bytes of memory in each worker for small objects (up to 16 KiB) that are requested often; 0: none."""

    @field_validator("trusted_proxies")
    @classmethod
    def _check_proxies(cls, proxies: tuple[str, ...]) -> tuple[str, ...]:
        for proxy in proxies:
            try:
                ip_network(proxy, strict=False)
            except ValueError as error:
                raise ValueError(
                    f"expected addresses or networks, such as 10.0.0.0/8, got {proxy!r}"
                ) from error
        return proxies


MIN_SECRET_LENGTH = 16  # characters


class OperatorApi(SettingsGroup):
    """The HTTP server for operators. It is off unless a secret is set."""

    host: str = "127.0.0.1"
    """Address to listen on. Requests are authenticated, but not encrypted."""
    port: Port = 3335
    """Port to listen on; 0 takes any free one."""
    secret: SecretStr | None = Field(default=None, min_length=MIN_SECRET_LENGTH)
    """The key with which operators sign their requests: 32 bytes or more. From 16 characters on it is accepted, with a
    warning."""


class StateStoreSettings(SettingsGroup):
    """The state store: Redis, or memory:// in standalone mode."""

    url: SecretStr = SecretStr("memory://")
    """`redis://[user:password@]host:port/db`, `rediss://…`, `unix://…`, or `memory://`."""
    prefix: str = Field(default="distributor:", max_length=64)
    """Prefix of every key. Nodes that share a Redis need different prefixes."""
    operation_timeout: Seconds = 1.0
    """Seconds after which a call fails."""


class JobQueueSettings(SettingsGroup):
    """The job queue: RabbitMQ, or memory:// in standalone mode."""

    url: SecretStr = SecretStr("memory://")
    """`amqp://[user:password@]host:port/vhost`, `amqps://…`, or `memory://`."""
    prefix: str = Field(default="distributor", max_length=64)
    """Prefix of every queue's name."""
    publish_timeout: Seconds = 2.0
    """Seconds to wait for the broker to confirm a job."""
    retry_delays: tuple[Seconds, ...] = (5.0, 30.0, 120.0, 600.0)
    """Seconds before the second, third, … attempt. There is one attempt more than delays."""
    consumer_timeout: Seconds = 24 * 3600.0
    """Seconds a job may take before the broker considers its worker dead."""


class CatalogSettings(SettingsGroup):
    """The catalog: which objects exist, and where they are stored."""

    kind: Literal["manifest", "origin", "joystream"] = "manifest"
    """`manifest`: a YAML or JSON file. `origin`: an HTTP server. `joystream`: the network's Storage-Squid."""
    manifest: Path | None = None
    """The manifest file, for `manifest`."""
    origin: str | None = None
    """URL of an object with `{id}` in place of its id, for `origin`."""
    squid: str = "http://localhost:4352/graphql"
    """The Storage-Squid's GraphQL endpoint, for `joystream`."""
    chain: str | None = None
    """A node of the chain, `ws(s)://` or `http(s)://`, for chainHead in /status; for `joystream`."""
    refuse_private_sources: Literal["auto"] | bool = "auto"
    """Do not connect to sources at addresses that are not public, whatever their names. `auto`: true for `joystream`,
    where any storage provider can put an endpoint into the catalog, false for others. Where your own storage nodes of a
    Joystream network have such addresses, as in a test network, set false."""
    list_batch: int = Field(default=100, ge=1, le=10_000)
    """Bags in one query when all objects are listed, for `joystream`."""
    list_pause: float = Field(default=1.0, ge=0, le=3600)
    """Seconds between two such queries, which are expensive for the squid."""
    list_timeout: Seconds = 60.0
    """Seconds to wait for the response to one of them."""
    timeout: Seconds = 5.0
    """Seconds that one query may take. Its answer is kept even if the clients have left."""
    lookup_wait: Seconds = 1.2
    """Seconds that a request waits for its look-up, in the queue and for the answer; half of it more while the catalog
    answers others. After that, it gets 503. Players try the next URL after 2."""
    max_in_flight: int = Field(default=16, ge=1)
    """Queries under way at once, per process."""
    max_query_rate: float = Field(default=20.0, ge=1, le=10_000)
    """Queries a second that look up objects, of all workers of one API together; for `joystream`. One query asks for up
    to 50 objects."""
    positive_ttl: Seconds = 3600.0
    """Time to live of an object's description, in seconds."""
    negative_ttl: Seconds = 5.0
    """Time to live of "does not exist", in seconds. It doubles, up to 60, while the object keeps being asked for."""
    unaccepted_ttl: Seconds = 3.0
    """Time to live of "not accepted yet", in seconds."""

    @property
    def refuses_private_sources(self) -> bool:
        """`refuse_private_sources` with `auto` resolved."""
        chosen = self.refuse_private_sources
        return self.kind == "joystream" if chosen == "auto" else chosen

    def problems(self) -> list[str]:
        """What is wrong with the settings that the chosen kind needs, in words."""
        match self.kind:
            case "manifest":
                return [] if self.manifest else ["catalog.manifest: expected the manifest file, got nothing"]
            case "origin":
                template = self.origin or ""
                valid = names_host(template, "http", "https") and "{id}" in template
                return [] if valid else ["catalog.origin: expected an http(s) URL with {id} in it"]
            case "joystream":
                return self._problems_of_joystream()

    def _problems_of_joystream(self) -> list[str]:
        problems = []
        if not names_host(self.squid, "http", "https"):
            problems.append("catalog.squid: expected an http:// or https:// URL with a host")
        if self.chain is not None and not names_host(self.chain, "ws", "wss", "http", "https"):
            problems.append("catalog.chain: expected a ws://, wss://, http:// or https:// URL with a host")
        return problems


class OriginSettings(SettingsGroup):
    """How an HTTP origin is asked, where `catalog.kind` is `origin`."""

    query: Literal["include", "ignore"] = "include"
    """Whether the query of a request is a part of the object's id, with its parameters in their order, or dropped. The
    parameter `download` is the node's own and never passed on."""
    follow_to_other_hosts: bool = True
    """Follow redirects of the origin to other hosts. Redirects of storage nodes are always followed."""
    default_ttl: float = Field(default=60.0, ge=0, le=31_536_000)
    """Seconds for which an object is fresh if the origin states no lifetime and no date of modification. With such a
    date, it is a tenth of the object's age."""
    max_ttl: float = Field(default=604_800.0, ge=0, le=31_536_000)
    """Seconds for which an object is fresh at most, whatever the origin says. After that it is asked about again."""
    stale_while_revalidate: float = Field(default=10.0, ge=0, le=31_536_000)
    """Seconds for which a stale object is still served while the origin is asked, unless the origin states this or
    forbids it. Not longer than the object was fresh."""
    stale_if_error: float = Field(default=86_400.0, ge=0, le=31_536_000)
    """Seconds for which a stale object is still served if the origin cannot be asked, unless the origin states this or
    forbids it."""
    honour_client_no_cache: bool = False
    """Ask the origin for each request with `Cache-Control: no-cache`. Off by default: any client could cause load."""


class SourceSettings(SettingsGroup):
    """How storage nodes are ranked."""

    probe_interval: Seconds = 60.0
    """Seconds between two probes (`/version`) of each active storage node, by the leading evictor."""
    probes_at_once: int = Field(default=10, ge=1, le=100)
    """Probes under way at once."""
    probe_timeout: Seconds = 3.0
    """Seconds for a storage node to accept a probe's connection, and again to respond."""
    share_interval: Seconds = 2.0
    """Seconds between two exchanges of the processes' statistics of the sources."""
    corrupted_memory: Seconds = 600.0
    """Seconds that a source is not asked for an object after it has sent corrupt bytes of it."""


class FetchSettings(SettingsGroup):
    """How fetchers download objects."""

    concurrency: int = Field(default=32, ge=1, le=256)
    """Objects that one fetcher process downloads at once."""
    concurrency_per_source: int = Field(default=8, ge=1, le=256)
    """Of these, objects that it downloads from one source at once. Further jobs wait, or use other sources."""
    side_streams: int = Field(default=32, ge=0, le=256)
    """Gaps in front of viewers that a fetcher process fills at once beside its downloads. 0: far ranges are proxied."""
    window_above: Size = Field(default=16 * 1024**2)
    """Objects larger than this, with a content hash, are read as far as their viewers watch, and `window` ahead."""
    window: WindowSize = Field(default=8 * 1024**2)
    """How far ahead of the furthest viewer such an object is read, at least 64K. `off`: all of it is, as of any other
    object. See docs/eviction.md."""
    viewer_timeout: Seconds = 30.0
    """Seconds without viewers after which such a download ends. Its bytes stay, and the next request continues it."""
    connect_timeout: Seconds = 3.0
    """Seconds to connect to a source."""
    first_byte_timeout: Seconds = 5.0
    """Seconds for a source to begin its response."""
    stall_timeout: Seconds = 10.0
    """Seconds below the minimum rate after which the next source is tried."""
    minimum_rate: Size = Field(default=8 * 1024)
    """Bytes a second, measured over the stall timeout, below which a source counts as stalled."""
    space_wait: Seconds = 10.0
    """Seconds to wait for the evictor to make room before the job is delayed."""
    lease: Seconds = 15.0
    """Seconds without a renewal after which a fetcher's lease expires."""
    lease_renewal: Seconds = 4.0
    """Seconds between two renewals of a lease."""
    failure_memory: Seconds = 60.0
    """Seconds that an object is not fetched again after all attempts have failed."""


class StorageSettings(SettingsGroup):
    """The volume and its limit."""

    path: Path = Path("data")
    """Directory of the volume, which all services share."""
    limit: Size = Field(default=20 * 1024**3, gt=0)
    """Most bytes on the volume, including partial downloads and reservations."""
    max_cached_item: Size | None = None
    """Objects larger than this are proxied, never cached. Default: what fits below the limit."""
    high_watermark: float | None = Field(default=None, gt=0, le=1)
    """Share of the limit above which eviction starts. Default: leaves room for the largest cached item or 512 MiB,
    whichever is more, but at least 2 % and at most 10 % of the limit."""
    low_watermark: float | None = Field(default=None, gt=0, le=1)
    """Share of the limit down to which it evicts. Default: half of that room below the high watermark."""
    import_assets: Path | None = None
    """Directory of an existing node's objects, one file per object id, which are imported at the start instead of
    downloaded. It may be storage.path itself. See docs/migration.md."""
    import_cache_state: Path | None = None
    """That node's `cache.json`, or its directory: when and how often its objects were requested."""

    @property
    def watermarks(self) -> Watermarks:
        return watermarks_for(self.limit, self.max_cached_item, self.high_watermark, self.low_watermark)

    @property
    def largest_cached_size(self) -> int:
        """Size in bytes of the largest object that is fetched. Negative: none is."""
        fits = self.limit - footprint(0)
        return fits if self.max_cached_item is None else min(fits, self.max_cached_item)


class EvictorSettings(SettingsGroup):
    """Eviction and reconciliation."""

    policy: PolicyName = "gdsf"
    """How victims are chosen: `gdsf` by views and size, `lru-sp` as the network's existing node does, `lru` by the
    last access alone. It may be changed at a restart. See docs/eviction.md."""
    cost_per_miss: MissCostSetting = AUTO_COST
    """For `gdsf`: cost of a miss besides its bytes: a multiple of the mean bytes of a view, such as `30x`, or bytes,
    such as `64M`. A higher value keeps small objects, a lower one large. `auto`: as low a multiple (1.5 to 50) as
    keeps the object hit ratio within 0.3 points of that of classic GDSF, which runs beside it in miniature."""
    min_idle: float = Field(default=120.0, ge=1, le=24 * 3600)
    """Seconds since the last access (or the fetch) of an object before it may be evicted to make room."""
    leadership: Seconds = 10.0
    """Seconds without a renewal after which a standby replaces the leader."""
    leadership_renewal: Seconds = 3.0
    """Seconds between two renewals of the leader."""
    interval: Seconds = 1.0
    """Seconds between two checks of the usage, if no fetcher asks for space."""
    reconcile_interval: Seconds = 3600.0
    """Seconds between comparisons of volume and index."""
    assignment_interval: Seconds = 6 * 3600.0
    """Seconds between two readings of the catalog's whole list, to find objects that are not assigned to the node any
    more. Formerly `duty_interval`, which still works."""
    partial_keep: Seconds = 7 * 24 * 3600.0
    """Seconds that a partial file is kept at most after its last view, so that its download can be resumed. It takes
    only the bytes that it holds, and goes earlier when space is needed and it is worth least."""
    scrub_rate: Size = Field(default=4 * 1024**2)
    """Bytes a second that the scrub reads. 0: off."""

    @model_validator(mode="before")
    @classmethod
    def _accept_former_names(cls, values: Any) -> Any:
        return rename_settings(values, "evictor")


class AdmissionSettings(SettingsGroup):
    """Which objects are cached. These rules apply only while the cache is under pressure."""

    above_size: AdmissionSize = "auto"
    """Larger objects are fetched on their second view; the first one is proxied. `auto`: larger than twice the mean
    bytes of a view, and than 1 MiB. `off`: none."""
    window: Seconds = 7 * 24 * 3600.0
    """Seconds within which the second view must follow the first."""


METRICS_PORTS = {"api": 9463, "standalone": 9463, "fetcher": 9464, "evictor": 9465}
"""Default ports of the services, which may run on one host."""


class MetricsSettings(SettingsGroup):
    """Where each service serves /metrics, /healthz and /readyz."""

    host: str = "0.0.0.0"
    """Address to listen on."""
    port: Port | None = None
    """Port to listen on; 0 takes any free one. Default: 9463 for the API and a standalone node, 9464 for a fetcher,
    9465 for an evictor."""
    multiprocess_dir: Path | None = None
    """Directory for the counters of several API workers. Default: a new temporary directory."""

    def port_of(self, service: str) -> int:
        """The port of `service`: api, standalone, fetcher or evictor."""
        return METRICS_PORTS[service] if self.port is None else self.port


class DashboardSettings(SettingsGroup):
    """The node's page: what it does at the moment, to look at in a browser. It changes nothing."""

    enabled: bool = True
    """Serve the page, and take part in what it shows."""
    host: str = "127.0.0.1"
    """Address to listen on. The page is not encrypted, and without a password not authenticated."""
    port: Port = 3336
    """Port to listen on; 0 takes any free one. If another process holds it, the node runs without its page until the
    port is free."""
    user: str = Field(default="operator", min_length=1, max_length=64, pattern=r"^[^:\x00-\x1f\x7f]+$")
    """The name to sign in with, if there is a password."""
    password: SecretStr | None = Field(default=None, min_length=8)
    """Ask for this password (HTTP basic authentication). Without one, the page answers only to names of this machine
    and to addresses, so that no site in the browser can read it by a name of its own."""


class LogSettings(SettingsGroup):
    """Logs, on standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest severity that is logged."""
    format: Literal["json", "console"] = "json"
    """`json` for log collectors, `console` for reading in a terminal."""
    hits: bool = False
    """Log an event for each hit. If off, hits are counted in the metrics alone. Misses, errors and aborted responses
    are always logged."""
    access: Literal["json", "combined", "off"] = "json"
    """How responses are logged. `json`: as events among all others. `combined`: each one, hits too, as a line of an
    access log as Apache and nginx write it. `off`: not at all."""
    access_file: Path | None = None
    """The file of the `combined` log. It is created, appended to, and opened again after it was moved away. Default:
    standard output."""
    client_address: bool = False
    """Put the client's address into the event of each response (`client`). Behind a reverse proxy it needs
    `public_api.trusted_proxies`. Off by default, because addresses are personal data."""


class TracingSettings(SettingsGroup):
    """Traces for an OpenTelemetry collector, of requests and the fetches that they cause. Needs the extra `tracing`.

    The rest is set by the variables that OpenTelemetry defines, such as OTEL_EXPORTER_OTLP_ENDPOINT and
    OTEL_TRACES_SAMPLER."""

    enabled: bool = False
    """Record spans and send them."""


class Settings(SettingsGroup):
    """All settings, as they are given; `load_settings` reads them from file and environment."""

    _file: Path | None = PrivateAttr(default=None)

    id: str = Field(default_factory=socket.gethostname, min_length=1, max_length=128)
    """The node's name in /status. Default: the host's name."""
    buckets: frozenset[str] | None = None
    """Buckets to serve. With neither buckets nor worker_id, the node serves everything in the catalog."""
    worker_id: int | None = Field(default=None, ge=0, le=2**63 - 1)
    """Serve all buckets that this worker operates, unless `buckets` is set."""
    environment: str = "production"
    """nodeEnv in /status."""
    shutdown_deadline: Seconds = 30.0
    """Seconds for responses and downloads under way to end at a shutdown."""
    public_api: PublicApi = PublicApi()
    operator_api: OperatorApi = OperatorApi()
    state_store: StateStoreSettings = StateStoreSettings()
    job_queue: JobQueueSettings = JobQueueSettings()
    catalog: CatalogSettings = CatalogSettings()
    origin: OriginSettings = OriginSettings()
    sources: SourceSettings = SourceSettings()
    peers: PeerSettings = PeerSettings()
    fetch: FetchSettings = FetchSettings()
    storage: StorageSettings = StorageSettings()
    evictor: EvictorSettings = EvictorSettings()
    admission: AdmissionSettings = AdmissionSettings()
    metrics: MetricsSettings = MetricsSettings()
    dashboard: DashboardSettings = DashboardSettings()
    log: LogSettings = LogSettings()
    tracing: TracingSettings = TracingSettings()

    @property
    def file(self) -> Path | None:
        """The file that these settings were read from."""
        return self._file

    def remember_file(self, file: Path | None) -> None:
        """Note the file that these settings were read from, so that it can be read again."""
        self._file = None if file is None else file.absolute()

    @field_validator("buckets")
    @classmethod
    def _check_buckets(cls, buckets: frozenset[str] | None) -> frozenset[str] | None:
        try:
            return None if buckets is None else frozenset(parse_bucket_id(bucket) for bucket in buckets)
        except InvalidInput as error:
            raise ValueError(str(error)) from error

    def problems_of_sizes(self) -> list[str]:
        """Sizes that are valid but of no use, in words: most likely their unit was forgotten."""
        storage, memory = self.storage, self.public_api.memory_cache
        sizes = {"storage.limit": storage.limit, "storage.max_cached_item": storage.max_cached_item}
        problems = [
            f"{name}: expected at least {format_size(MIN_USABLE_SIZE)}, got {size} bytes; is the unit missing,"
            f" as in {size}G?"
            for name, size in sizes.items()
            if size is not None and size < MIN_USABLE_SIZE
        ]
        if 0 < memory < MIN_USABLE_SIZE:
            problems.append(
                f"public_api.memory_cache: expected 0 or at least {format_size(MIN_USABLE_SIZE)}, got {memory} bytes;"
                f" is the unit missing, as in {memory}M?"
            )
        return problems

    @property
    def caching_rules(self) -> CachingRules | None:
        """The rules of a shared HTTP cache. None: the catalog is not an HTTP origin, and objects do not change."""
        if self.catalog.kind != "origin":
            return None
        origin = self.origin
        return CachingRules(
            default_ttl=int(origin.default_ttl),
            max_ttl=int(origin.max_ttl),
            stale_while_revalidate=int(origin.stale_while_revalidate),
            stale_if_error=int(origin.stale_if_error),
        )

    @property
    def in_memory(self) -> bool:
        """Whether state store and job queue are in memory, as in standalone mode."""
        return self.state_store.url.get_secret_value().startswith("memory://")

    def check_for(self, service: str) -> None:
        """Raise ConfigurationError if `service` (api, standalone, fetcher, evictor) cannot run with these settings."""
        if service != "standalone" and self.in_memory:
            raise ConfigurationError(
                f"state_store.url, job_queue.url: expected those of Redis and RabbitMQ for `distributor {service}`,"
                " got memory://; `distributor standalone` works without servers"
            )
        if service == "standalone" and not self.in_memory:
            raise ConfigurationError("state_store.url, job_queue.url: expected memory:// in standalone mode")
        if service == "standalone" and self.public_api.workers > 1:
            raise ConfigurationError(
                f"public_api.workers: expected 1 in standalone mode, got {self.public_api.workers};"
                " use the separate services for more"
            )
        problems = self._problems_of_ports(service) if service in ("api", "standalone") else ()
        if problems:
            raise ConfigurationError("\n".join(problems))

    def _problems_of_ports(self, service: str) -> list[str]:
        """Ports that the API or a standalone node would listen on twice. The other services have one port each."""
        operator, peers, page, metrics = self.operator_api, self.peers, self.dashboard, self.metrics
        listening = {
            "public_api.port": (self.public_api.host, self.public_api.port),
            "operator_api.port": (operator.host, operator.port if operator.secret is not None else 0),
            "peers.port": (peers.host, (peers.port or 0) if peers.enabled else 0),
            "dashboard.port": (page.host, page.port if page.enabled else 0),
            "metrics.port": (metrics.host, metrics.port_of(service)),
        }
        return [
            f"{first}, {second}: expected two ports, got {port} for both"
            for (first, (host, port)), (second, (other_host, other_port)) in combinations(
                listening.items(), 2
            )
            if port == other_port != 0 and _hosts_overlap(host, other_host)
        ]

    @property
    def assignment(self) -> Assignment:
        return Assignment(bucket_ids=self.buckets, worker_id=self.worker_id)

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        problems = [
            *self._problems_of_leases(),
            *self._problems_of_storage(),
            *self.catalog.problems(),
            *self._problems_of_urls(),
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _problems_of_leases(self) -> list[str]:
        fetch, evictor = self.fetch, self.evictor
        problems = []
        if fetch.lease_renewal * 2 > fetch.lease:
            problems.append(
                f"fetch.lease ({fetch.lease:g} s) must be at least twice fetch.lease_renewal"
                f" ({fetch.lease_renewal:g} s): one lost renewal must not cost the lease"
            )
        if evictor.leadership_renewal * 2 > evictor.leadership:
            problems.append(
                f"evictor.leadership ({evictor.leadership:g} s) must be at least twice evictor.leadership_renewal"
                f" ({evictor.leadership_renewal:g} s)"
            )
        renewed = {"fetch.lease": fetch.lease, "evictor.leadership": evictor.leadership}
        return problems + check_timeouts(
            self.state_store.operation_timeout, self.job_queue.publish_timeout, renewed
        )

    def _problems_of_storage(self) -> list[str]:
        storage, problems = self.storage, []
        if storage.watermarks.low > storage.watermarks.high:
            problems.append(
                "storage.low_watermark must not be above storage.high_watermark: eviction would never end"
            )
        if storage.max_cached_item is not None and storage.max_cached_item > storage.limit:
            problems.append(
                f"storage.max_cached_item ({format_size(storage.max_cached_item)}) must not be above storage.limit"
                f" ({format_size(storage.limit)})"
            )
        return problems

    def _problems_of_urls(self) -> list[str]:
        state, queue = self.state_store.url.get_secret_value(), self.job_queue.url.get_secret_value()
        problems = [
            *_problems_of_server_url("state_store.url", state, "redis", "rediss", "unix", "memory"),
            *_problems_of_server_url("job_queue.url", queue, "amqp", "amqps", "memory"),
        ]
        if state.startswith("memory://") != queue.startswith("memory://"):
            problems.append(
                "state_store.url and job_queue.url: both must be memory:// (standalone mode), or neither"
            )
        return problems


def _hosts_overlap(one: str, other: str) -> bool:
    """Whether a port of one address to listen on is a port of the other too."""
    wildcards = ("", "0.0.0.0", "::")
    return one == other or one in wildcards or other in wildcards


def _problems_of_server_url(name: str, url: str, *schemes: str) -> list[str]:
    """What is wrong with the URL of a server, without showing it: it may have a password in it."""
    if not url.startswith(tuple(f"{scheme}://" for scheme in schemes)):
        return [f"{name}: expected a URL that begins with {', '.join(f'{scheme}://' for scheme in schemes)}"]
    try:
        parts = urlsplit(url)
        misplaced = "@" in parts.path + parts.query or bool(parts.fragment) or parts.port == 0
        has_host = bool(parts.hostname) or parts.scheme in ("unix", "memory")
    except ValueError:
        misplaced, has_host = True, True
    if misplaced:
        example = f"{schemes[0]}://user:password@host:port/…"
        return [f"{name}: expected {example}, with / ? # @ [ ] of the password as %2F %3F %23 %40 %5B %5D"]
    return [] if has_host else [f"{name}: expected a host, as in {schemes[0]}://host:port/…"]


def check_timeouts(operation: float, publish: float, renewed: Mapping[str, float]) -> list[str]:
    """What is wrong with time limits that depend on each other, in words. All in seconds.

    `operation`: one call of the state store. `publish`: publishing one job. `renewed`: by the name of its setting, the
    lifetime of each lease that such calls renew. A call that may take longer than the lease cannot renew it.
    """
    problems = [
        f"state_store.operation_timeout ({operation:g} s) must be less than {name} ({seconds:g} s)"
        for name, seconds in renewed.items()
        if operation >= seconds
    ]
    if publish >= CLAIM_SECONDS:
        problems.append(
            f"job_queue.publish_timeout ({publish:g} s) must be less than {CLAIM_SECONDS:g} s, after which another"
            " request may publish the job"
        )
    return problems
