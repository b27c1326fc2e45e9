"""The settings of a fleet: which nodes are peers, and how they are asked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from distributor_node.shared.domain.errors import InvalidInput
from distributor_node.shared.domain.peers import FleetRules
from distributor_node.shared.domain.urls import parse_source_url
from distributor_node.shared.settings.sizes import SettingsGroup, Size

_Seconds = Annotated[float, Field(gt=0, le=7 * 24 * 3600)]
_Weight = Annotated[float, Field(gt=0, le=1e9)]


class PeerSettings(SettingsGroup):
    """Other nodes that act with this one as one cache. Off unless `urls` or `dns` is set. See docs/fleet.md."""

    urls: tuple[str, ...] = ()
    """Base URLs of all nodes of the fleet, such as http://cell-a:3334, in any order. All nodes need the same list."""
    dns: str | None = Field(default=None, pattern=r"^[A-Za-z0-9._-]{1,253}:[0-9]{1,5}$")
    """Instead of `urls`: a name and a port. Each address of the name is a node, as with a headless service of
    Kubernetes."""
    own_url: str | None = None
    """Base URL of this node, as its peers know it. With `dns`, its address and port."""
    secret_file: Path | None = None
    """File with a secret that all nodes of the fleet share, at least 16 bytes. Requests between nodes are signed with
    it. Their clocks may differ by 60 seconds."""
    port: int | None = Field(default=None, ge=1, le=65535)
    """A port of its own for traffic between nodes, which `urls` or `dns` name then. It serves assets and `/status` for
    requests with the header of a peer alone. A request at the public port is a stranger's then, whatever its headers
    say."""
    host: str = "0.0.0.0"
    """Address of that port."""
    operator_urls: tuple[str, ...] = ()
    """URLs of the operator APIs of all nodes, for orders with `--fleet`. Default: the hosts of `urls`, with
    `operator_api.port`. All nodes need the same operator secret."""
    weights: dict[str, _Weight] = Field(default={})
    """Weight by base URL; 1 for the others. Set them in proportion to the storage limits, where these differ."""
    keep_below: Size = Field(default=1024**2)
    """Objects up to so many bytes are kept by each node that serves them. Larger ones are kept by their home, and by
    others while they are hot."""
    copies: int = Field(default=1, ge=1, le=2)
    """Copies of a larger object. 2: the second node in rank fetches one from the home after the second view. A node
    that is lost then costs the sources less. The copies take space from other objects. Objects without a content hash
    are not copied. Set it once all processes of all nodes know it."""
    copy_after: float = Field(default=300.0, ge=0, le=7 * 24 * 3600)
    """Seconds after an object was fetched from which a request for it is a second view. What one player asks for within
    this time is the first. 0: what is asked for twice is copied."""
    copy_rate: Size = Field(default=20 * 1024**2, gt=0)
    """Bytes a second, in the mean, that one API process has second homes copy."""
    hot_views: float = Field(default=4.0, ge=1, le=1e6)
    """Views from which an object is hot at this node. A view weighs half after `hot_half_life`."""
    hot_half_life: _Seconds = 60.0
    """Seconds after which a view of an object weighs half."""
    first_byte_wait: _Seconds = 0.25
    """Seconds for a peer to accept a connection, and again to begin its response. A peer that has to fetch the object
    first says so within this time, and then has `fetch.first_byte_timeout`."""
    probe_interval: _Seconds = 1.0
    """Seconds between two probes of each peer. After three that failed, the others take over its objects."""
    refresh_interval: _Seconds = 5.0
    """Seconds between two look-ups of `dns`."""
    handover: float = Field(default=24 * 3600.0, ge=0, le=30 * 24 * 3600)
    """Seconds after a change of the members, or the start, for which the former home of an object is asked for it."""

    @property
    def enabled(self) -> bool:
        """Whether this node is part of a fleet."""
        return bool(self.urls) or self.dns is not None

    @property
    def rules(self) -> FleetRules | None:
        """What these settings say. None: this node is in no fleet."""
        if not self.enabled or self.own_url is None:
            return None
        return FleetRules(
            own=self.own_url,
            urls=self.urls,
            dns=self.dns,
            weights=self.weights,
            keep_below=self.keep_below,
            copies=self.copies,
            copy_after=self.copy_after,
            copy_rate=self.copy_rate,
            has_port=self.port is not None,
            hot_views=self.hot_views,
            hot_half_life=self.hot_half_life,
            first_byte_wait=self.first_byte_wait,
            probe_interval=self.probe_interval,
            refresh_interval=self.refresh_interval,
            handover=self.handover,
        )

    @field_validator("urls", "operator_urls")
    @classmethod
    def _check_urls(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(_base_url(url) for url in urls))

    @field_validator("own_url")
    @classmethod
    def _check_own_url(cls, url: str | None) -> str | None:
        return None if url is None else _base_url(url)

    @field_validator("weights")
    @classmethod
    def _check_weights(cls, weights: dict[str, float]) -> dict[str, float]:
        given: dict[str, str] = {}  # by base URL, as the operator wrote it
        for text in weights:
            former = given.setdefault(_base_url(text), text)
            if former != text:
                raise ValueError(
                    f"expected one weight for each node, got two for the same: {former!r}, {text!r}"
                )
        return {_base_url(url): weight for url, weight in weights.items()}

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.urls and self.dns is not None:
            raise ValueError("urls, dns: expected one of them, got both")
        if self.enabled and self.own_url is None:
            raise ValueError("own_url: expected the base URL of this node, got nothing")
        if self.urls and self.own_url not in self.urls:
            raise ValueError(f"own_url: expected one of peers.urls, got {self.own_url}")
        return self


def _base_url(text: str) -> str:
    """Return the URL without a slash at its end. ValueError if it is not the base URL of a node."""
    try:
        url = parse_source_url(text.rstrip("/"))
    except InvalidInput as error:
        raise ValueError(str(error)) from error
    if urlsplit(url).query:
        raise ValueError(f"expected a base URL without a query, got {text!r}")
    return url
