"""Settings of what the node learns from others: the catalog, and the storage nodes it fetches from."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from shared.settings.section import Seconds, SettingsGroup


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
