"""What every group of settings is made of."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from distributor_node.shared.domain.errors import InvalidInput
from distributor_node.shared.domain.eviction import DEFAULT_MISS_COST, PolicyName
from distributor_node.shared.domain.jobs import CLAIM_SECONDS
from distributor_node.shared.domain.objects import Assignment, parse_bucket_id
from distributor_node.shared.domain.space import Watermarks, footprint, watermarks_for
from distributor_node.shared.domain.urls import names_host
from distributor_node.shared.settings.sizes import Size, format_size

Seconds = Annotated[float, Field(gt=0, le=7 * 24 * 3600)]
Port = Annotated[int, Field(ge=0, le=65535)]


class SettingsGroup(BaseModel):
    """A group of settings. Unknown names are refused: a misspelt setting must not be silently ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


# Time limits that only make sense together.


def check_timeouts(operation: float, publish: float, kept_alive: Mapping[str, float]) -> list[str]:
    """What is wrong, in words. Seconds: of one call of the state store, of publishing one job, and, by the name of its
    setting, of what calls of the state store keep alive: a call that may take longer than that keeps nothing alive."""
    wrong = [
        f"state_store.operation_timeout ({operation:g} s) must be less than {name} ({seconds:g} s)"
        for name, seconds in kept_alive.items()
        if operation >= seconds
    ]
    if publish >= CLAIM_SECONDS:
        wrong.append(
            f"job_queue.publish_timeout ({publish:g} s) must be less than {CLAIM_SECONDS:g} s, after which another"
            " request may publish the job"
        )
    return wrong


# Settings of what the node learns from others: the catalog, and the storage nodes it fetches from.


class CatalogSettings(SettingsGroup):
    """Where the node learns which objects exist."""

    kind: Literal["manifest", "origin", "joystream"] = "manifest"
    """`manifest`: a YAML or JSON file. `origin`: any HTTP server. `joystream`: the network's Storage-Squid."""
    manifest: Path | None = None
    """The manifest file."""
    origin: str | None = None
    """URL template of the origin, with `{id}`."""
    squid: str = "http://localhost:4352/graphql"
    """The Storage-Squid's GraphQL endpoint, for `joystream`."""
    chain: str | None = None
    """A node of the chain, `ws(s)://` or `http(s)://`, for chainHead in /status; `joystream` only."""
    refuse_private_sources: bool = False
    """Ask no storage node at an address that is not public, whatever its name says. Recommended for a node on the
    Joystream network, where anybody's endpoint is in the catalog; off by default, since storage nodes of one's own may
    be at such addresses."""
    list_batch: int = Field(default=100, ge=1, le=10_000)
    """Bags in one question for the whole list, for `joystream`."""
    list_pause: float = Field(default=1.0, ge=0, le=3600)
    """Seconds between two such questions: one huge answer has taken the squid down before."""
    list_timeout: Seconds = 60.0
    """Seconds to wait for the answer to one of them."""
    timeout: Seconds = 2.0
    """Seconds that a look-up may take in all; a request that needs it is told 503 then."""
    max_in_flight: int = Field(default=16, ge=1)
    """Questions under way at once, per process."""
    positive_ttl: Seconds = 3600.0
    """Seconds an object's description is believed."""
    negative_ttl: Seconds = 60.0
    """Seconds `does not exist` and `not accepted yet` are believed."""


class SourceSettings(SettingsGroup):
    """In which order the storage nodes are asked."""

    probe_interval: Seconds = 60.0
    """Seconds between two probes (`/version`) of each active storage node, by the evictor that leads."""
    probes_at_once: int = Field(default=10, ge=1, le=100)
    """Probes under way at once."""
    probe_timeout: Seconds = 3.0
    """Seconds a storage node has to accept a probe's connection, and again to answer it."""
    share_interval: Seconds = 2.0
    """Seconds between two exchanges of what the processes have seen of the sources."""
    corrupted_memory: Seconds = 600.0
    """Seconds a source that gave wrong bytes for an object is not asked for that object."""


# Settings of the operator API.

MIN_SECRET_LENGTH = 16
"""Characters."""


class OperatorApi(SettingsGroup):
    """The HTTP server that operators talk to. Off unless a secret is set."""

    host: str = "127.0.0.1"
    """Address to listen on. Requests are authorised, but not encrypted."""
    port: Port = 3335
    """Port to listen on; 0 takes any free one."""
    secret: SecretStr | None = Field(default=None, min_length=MIN_SECRET_LENGTH)
    """What operators sign their requests with, at least 16 characters."""


# All settings of all services, with their defaults and the rules between them.


class PublicApi(SettingsGroup):
    """The HTTP server that clients talk to."""

    host: str = "0.0.0.0"
    """Address to listen on."""
    port: Port = 3334
    """Port to listen on; 0 takes any free one."""
    workers: int = Field(default=1, ge=1, le=64)
    """Processes that share the port. One a core is plenty."""
    first_byte_wait: Seconds = 3.0
    """Seconds a missed request waits for its fetch to give a first byte before it is proxied to a source."""
    proxied_first_byte_wait: Seconds = 10.0
    """Seconds that all sources together have to begin a proxied answer; then 504. Players give up after 20."""
    send_stall_limit: Seconds = 120.0
    """Seconds a client may take nothing of its answer (a paused player) before it is disconnected."""
    keep_alive_timeout: Seconds = 75.0
    """Seconds an idle connection is kept open."""
    request_timeout: Seconds = 20.0
    """Seconds a client has to send the head of its request."""
    follow_growing_files: bool = True
    """Serve objects from their partial file while they are fetched. Turn off where the volume is NFS shared by
    several hosts: pending requests are then proxied."""
    far_range_distance: Size = Field(default=4 * 1024**2)
    """A range of a pending object that starts more than this beyond what is on disk is proxied."""
    max_proxied: int = Field(default=200, ge=1)
    """Answers proxied at once by one process; beyond that requests get 503 with Retry-After."""
    accel_redirect_prefix: str = Field(default="", pattern=r"^(/[A-Za-z0-9_-]+)*$")
    """Path of the internal location through which nginx in front sees the volume's objects, such as /_objects: hits
    are then handed to it by X-Accel-Redirect. Empty: the API sends every byte itself."""
    fast_lane: bool = True
    """Answer simple requests for cached objects without the web framework: the same answers, several times as fast."""
    memory_cache: Size = Field(default=64 * 1024**2)
    """Bytes of memory for small objects (up to 16 KiB) that are asked for again and again, for each worker; 0: none."""


class StateStoreSettings(SettingsGroup):
    """Redis, or memory:// in standalone mode."""

    url: SecretStr = SecretStr("memory://")
    """`redis://[user:password@]host:port/db`, `rediss://…`, `unix://…`, or `memory://`."""
    prefix: str = Field(default="distributor:", max_length=64)
    """What every key begins with; nodes that share a Redis need different ones."""
    operation_timeout: Seconds = 1.0
    """Seconds after which a call is given up."""


class JobQueueSettings(SettingsGroup):
    """RabbitMQ, or memory:// in standalone mode."""

    url: SecretStr = SecretStr("memory://")
    """`amqp://[user:password@]host:port/vhost`, `amqps://…`, or `memory://`."""
    prefix: str = Field(default="distributor", max_length=64)
    """What every queue's name begins with."""
    publish_timeout: Seconds = 2.0
    """Seconds to wait for the broker's confirmation of a job."""
    retry_delays: tuple[Seconds, ...] = (5.0, 30.0, 120.0, 600.0)
    """Seconds before the second, third, … attempt; one more attempt than there are delays."""
    consumer_timeout: Seconds = 24 * 3600.0
    """Seconds a job may take before the broker believes its worker to be dead."""


class FetchSettings(SettingsGroup):
    """How workers download."""

    concurrency: int = Field(default=8, ge=1, le=256)
    """Objects that one worker process downloads at once."""
    connect_timeout: Seconds = 3.0
    """Seconds to reach a source."""
    first_byte_timeout: Seconds = 5.0
    """Seconds a source has to begin its answer."""
    stall_timeout: Seconds = 10.0
    """Seconds without enough bytes after which the next source is asked."""
    minimum_rate: Size = Field(default=8 * 1024)
    """Bytes a second, over the stall timeout, below which a source counts as stalled."""
    space_wait: Seconds = 10.0
    """Seconds to wait for the evictor to make room before the job is delayed."""
    lease: Seconds = 15.0
    """Seconds without a renewal after which a worker counts as dead."""
    lease_renewal: Seconds = 4.0
    """Seconds between a worker's renewals."""
    failure_memory: Seconds = 60.0
    """Seconds a given-up object is not tried again."""


class StorageSettings(SettingsGroup):
    """The volume and its limit."""

    path: Path = Path("data")
    """Directory that all services share."""
    limit: Size = Field(default=20 * 1024**3, gt=0)
    """Bytes on the volume, partial downloads and promises included, are never more than this."""
    max_cached_item: Size | None = None
    """Objects larger than this are proxied, never cached; default: what fits below the limit."""
    high_watermark: float | None = Field(default=None, gt=0, le=1)
    """Share of the limit above which the evictor starts; default: leaves room for the largest cached item or 512 MiB,
    whichever is more, but at least 2 % and at most 10 % of the limit."""
    low_watermark: float | None = Field(default=None, gt=0, le=1)
    """Share of the limit down to which it evicts; default: half of that room below the high watermark."""
    import_assets: Path | None = None
    """Directory of an existing node's objects, one file per object id, to be taken over at the start without
    downloading; may be storage.path itself. See docs/migration.md."""
    import_cache_state: Path | None = None
    """That node's `cache.json` (or the directory it lies in): when and how often its objects were asked for."""

    @property
    def watermarks(self) -> Watermarks:
        return watermarks_for(self.limit, self.max_cached_item, self.high_watermark, self.low_watermark)

    @property
    def largest_cached_size(self) -> int:
        """Size in bytes of the largest object that is ever fetched (negative: none is)."""
        fits = self.limit - (footprint(0))
        return fits if self.max_cached_item is None else min(fits, self.max_cached_item)


class EvictorSettings(SettingsGroup):
    """Eviction and reconciliation."""

    policy: PolicyName = "gdsf"
    """How victims are chosen: `gdsf` weighs views against size, `lru-sp` is what the network's existing node does,
    `lru` goes by the last access alone. May be changed at a restart; see docs/eviction.md."""
    cost_per_miss: Size = Field(default=DEFAULT_MISS_COST)
    """For `gdsf`: what a miss costs besides its bytes, in bytes. More keeps small objects, less keeps large ones."""
    min_idle: float = Field(default=120.0, ge=1, le=24 * 3600)
    """Seconds since its last access (or since it was fetched) before an object may be evicted to make room."""
    leadership: Seconds = 10.0
    """Seconds after which a silent leader is replaced by a standby."""
    leadership_renewal: Seconds = 3.0
    """Seconds between a leader's renewals."""
    interval: Seconds = 1.0
    """Seconds between looks at the usage when nobody asks."""
    reconcile_interval: Seconds = 3600.0
    """Seconds between comparisons of volume and index."""
    duty_interval: Seconds = 6 * 3600.0
    """Seconds between looks at the catalog's whole list for objects no longer ours."""
    partial_keep: Seconds = 3600.0
    """Seconds an abandoned partial file is kept for a resumption."""
    scrub_rate: Size = Field(default=4 * 1024**2)
    """Bytes a second that the scrub reads; 0 turns it off."""


class AdmissionSettings(SettingsGroup):
    """Which objects are cached at all. Counts only while the cache is under pressure."""

    above_size: Size | None = None
    """Objects of more bytes are fetched on their second view only; the first is proxied. Default: none."""
    window: Seconds = 7 * 24 * 3600.0
    """Seconds in which the second view has to follow the first."""


class MetricsSettings(SettingsGroup):
    """Where fetcher and evictor answer /metrics, /healthz and /readyz (the API does so on its own port)."""

    host: str = "0.0.0.0"
    """Address to listen on."""
    port: Port = 9464
    """Port to listen on; 0 takes any free one."""
    multiprocess_dir: Path | None = None
    """Directory for the counters of several API workers; default: a new temporary directory."""


class LogSettings(SettingsGroup):
    """Logs."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe events that are logged."""
    format: Literal["json", "console"] = "json"
    """`console` is for people."""
    hits: bool = False
    """A line for each hit too. Off, hits are counted in the metrics alone; misses, errors and cut answers have their
    line in any case."""


class Settings(BaseSettings):
    """All settings. Each can be set in the file, or in the environment as DISTRIBUTOR_ and its path, such as
    DISTRIBUTOR_STORAGE__LIMIT=500G."""

    model_config = SettingsConfigDict(
        env_prefix="DISTRIBUTOR_",
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
    )

    id: str = Field(default_factory=socket.gethostname, min_length=1, max_length=128)
    """The node's name in /status; default: the host's name."""
    buckets: frozenset[str] | None = None
    """Buckets to serve. Neither buckets nor worker_id: everything the catalog knows."""
    worker_id: int | None = Field(default=None, ge=0)
    """Serve all buckets that this worker operates, unless buckets are named."""
    environment: str = "production"
    """Shown as nodeEnv in /status."""
    shutdown_deadline: Seconds = 30.0
    """Seconds that answers and downloads under way get at a stop."""
    public_api: PublicApi = PublicApi()
    operator_api: OperatorApi = OperatorApi()
    state_store: StateStoreSettings = StateStoreSettings()
    job_queue: JobQueueSettings = JobQueueSettings()
    catalog: CatalogSettings = CatalogSettings()
    sources: SourceSettings = SourceSettings()
    fetch: FetchSettings = FetchSettings()
    storage: StorageSettings = StorageSettings()
    evictor: EvictorSettings = EvictorSettings()
    admission: AdmissionSettings = AdmissionSettings()
    metrics: MetricsSettings = MetricsSettings()
    log: LogSettings = LogSettings()

    @field_validator("buckets")
    @classmethod
    def _check_buckets(cls, buckets: frozenset[str] | None) -> frozenset[str] | None:
        try:
            return None if buckets is None else frozenset(parse_bucket_id(bucket) for bucket in buckets)
        except InvalidInput as error:
            raise ValueError(str(error)) from error

    @property
    def assignment(self) -> Assignment:
        return Assignment(bucket_ids=self.buckets, worker_id=self.worker_id)

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        wrong: list[str] = []
        if self.fetch.lease_renewal * 2 > self.fetch.lease:
            wrong.append(
                f"fetch.lease ({self.fetch.lease:g} s) must be at least twice fetch.lease_renewal"
                f" ({self.fetch.lease_renewal:g} s): one lost renewal must not cost the lease"
            )
        wrong.extend(self._check_timeouts())
        if self.evictor.leadership_renewal * 2 > self.evictor.leadership:
            wrong.append("evictor.leadership must be at least twice evictor.leadership_renewal")
        if self.storage.watermarks.low > self.storage.watermarks.high:
            wrong.append("storage.low_watermark is above storage.high_watermark: eviction could never end")
        if self.storage.max_cached_item is not None and self.storage.max_cached_item > self.storage.limit:
            wrong.append(
                f"storage.max_cached_item ({format_size(self.storage.max_cached_item)}) is above storage.limit"
                f" ({format_size(self.storage.limit)})"
            )
        wrong.extend(self._check_catalog())
        wrong.extend(self._check_urls())
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def _check_timeouts(self) -> list[str]:
        kept_alive = {"fetch.lease": self.fetch.lease, "evictor.leadership": self.evictor.leadership}
        return check_timeouts(self.state_store.operation_timeout, self.job_queue.publish_timeout, kept_alive)

    def _check_catalog(self) -> list[str]:
        if self.catalog.kind == "manifest" and self.catalog.manifest is None:
            return ["catalog.manifest is missing: name the manifest file (or choose another catalog.kind)"]
        if self.catalog.kind == "origin":
            origin = self.catalog.origin or ""
            if not origin.startswith(("http://", "https://")) or "{id}" not in origin:
                return ["catalog.origin must be an http(s) URL with {id} in it"]
        wrong = []
        if self.catalog.kind == "joystream" and not self.catalog.squid.startswith(("http://", "https://")):
            wrong.append("catalog.squid must begin with http:// or https://")
        if self.catalog.chain is not None and not names_host(
            self.catalog.chain, "ws", "wss", "http", "https"
        ):
            wrong.append("catalog.chain must begin with ws://, wss://, http:// or https://, and name a host")
        return wrong

    def _check_urls(self) -> list[str]:
        wrong = []
        state, queue = self.state_store.url.get_secret_value(), self.job_queue.url.get_secret_value()
        if not state.startswith(("redis://", "rediss://", "unix://", "memory://")):
            wrong.append("state_store.url must begin with redis://, rediss://, unix:// or memory://")
        if not queue.startswith(("amqp://", "amqps://", "memory://")):
            wrong.append("job_queue.url must begin with amqp://, amqps:// or memory://")
        if state.startswith("memory://") != queue.startswith("memory://"):
            wrong.append("state_store.url and job_queue.url are memory:// both (standalone mode) or neither")
        return wrong
