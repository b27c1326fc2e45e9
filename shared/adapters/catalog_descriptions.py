"""The catalog's word on one object as bytes, for the memory that processes share."""

from __future__ import annotations

import json
from typing import Any

from shared.domain.errors import InvalidInput
from shared.domain.objects import ContentHash, DistributionBucket, MediaObject, ObjectId

_VERSION = 1


def write_description(answer: MediaObject | None) -> bytes:
    """`answer`: None for an object that does not exist."""
    if answer is None:
        return json.dumps({"v": _VERSION, "exists": False}).encode()
    described = {
        "v": _VERSION,
        "exists": True,
        "id": answer.object_id,
        "size": answer.size,
        "hash": str(answer.content_hash) if answer.content_hash else None,
        "type": answer.media_type,
        "buckets": [[bucket.bucket_id, sorted(bucket.active_workers)] for bucket in answer.buckets],
        "accepted": answer.accepted,
        "sources": answer.sources,
        "validator": answer.validator,
    }
    return json.dumps(described, separators=(",", ":")).encode()


def read_description(packed: bytes) -> MediaObject | None:
    """Raise InvalidInput for what this version did not write (nodes are not all updated at once)."""
    try:
        described: dict[str, Any] = json.loads(packed)
        if described["v"] != _VERSION:
            raise InvalidInput(f"description of version {described['v']}")
        if not described["exists"]:
            return None
        return MediaObject(
            object_id=ObjectId.parse(described["id"]),
            size=described["size"],
            content_hash=ContentHash.parse(described["hash"]) if described["hash"] else None,
            media_type=described["type"],
            buckets=tuple(
                DistributionBucket(bucket_id, frozenset(workers))
                for bucket_id, workers in described["buckets"]
            ),
            accepted=described["accepted"],
            sources=tuple(described["sources"]),
            validator=described["validator"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"no description of an object: {error!r}") from error
