"""What the squid says of the network and of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shared.adapters.catalogs.joystream.answers import base_or_none, bucket_id_or_none
from shared.domain.errors import CatalogUnavailable


@dataclass(frozen=True, slots=True)
class StorageEndpoint:
    """An active storage node: its bucket's id, and the base of its API with `/` at the end."""

    bucket_id: str
    api_url: str


@dataclass(frozen=True, slots=True)
class SquidStatus:
    """Blocks processed, and the squid's version; None where it does not say."""

    height: int | None
    version: str | None


def read_endpoints(data: dict[str, Any], *, refuse_private: bool) -> tuple[StorageEndpoint, ...]:
    """Nodes without a usable endpoint are left out. CatalogUnavailable if there is no list."""
    endpoints = []
    for bucket in _list(data, "storageBuckets"):
        base = base_or_none(bucket, refuse_private=refuse_private)
        if base is not None:
            endpoints.append(StorageEndpoint(str(bucket.get("id"))[:40], base))
    return tuple(endpoints)


def read_bucket_ids(data: dict[str, Any]) -> tuple[str, ...]:
    """CatalogUnavailable if there is no list."""
    found = (bucket_id_or_none(bucket.get("id")) for bucket in _list(data, "distributionBuckets"))
    return tuple(sorted(bucket_id for bucket_id in found if bucket_id is not None))


def read_status(data: dict[str, Any]) -> SquidStatus:
    status, version = data.get("squidStatus"), data.get("squidVersion")
    height = status.get("height") if isinstance(status, dict) else None
    stated = version.get("version") if isinstance(version, dict) else None
    return SquidStatus(
        height=height if isinstance(height, int) and not isinstance(height, bool) else None,
        version=stated[:64] if isinstance(stated, str) else None,
    )


def _list(data: dict[str, Any], field: str) -> list[dict[str, Any]]:
    listed = data.get(field)
    if not isinstance(listed, list):
        raise CatalogUnavailable(f"the squid's {field} are missing")
    return [entry for entry in listed if isinstance(entry, dict)]
