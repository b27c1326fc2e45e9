"""Warming: fetching objects before anybody asks for them. What is to be warmed, and how far it is."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from shared.domain.errors import InvalidInput
from shared.domain.objects import ObjectId, parse_bucket_id

WarmingState = Literal["waiting", "listing", "fetching", "finished"]


@dataclass(frozen=True, slots=True)
class WarmingScope:
    """What to warm: these objects, or all that is ours in one bucket, or (neither) everything that is ours."""

    object_ids: tuple[ObjectId, ...] | None = None
    bucket_id: str | None = None


@dataclass(frozen=True, slots=True)
class Warming:
    """One warming. `serial` tells it from others; `total` grows while the catalog is listed; `skipped`: cached already,
    not ours, or without room; `failed`: asked for, and not there in time; `reason`: why it ended early, or
    cannot go on, in words."""

    serial: int
    scope: WarmingScope
    state: WarmingState = "waiting"
    total: int = 0
    done: int = 0
    skipped: int = 0
    failed: int = 0
    reason: str = ""

    @property
    def is_finished(self) -> bool:
        return self.state == "finished"


def encode_warming(warming: Warming) -> str:
    """JSON, without the serial: that is the store's."""
    document = asdict(warming)
    del document["serial"]
    return json.dumps(document)


def decode_warming(text: str | bytes, serial: int) -> Warming:
    """Read what `encode_warming` wrote; InvalidInput for anything else."""
    try:
        document = json.loads(text)
        ids, bucket = document["scope"]["object_ids"], document["scope"]["bucket_id"]
        scope = WarmingScope(
            None if ids is None else tuple(ObjectId.parse(object_id) for object_id in ids),
            None if bucket is None else parse_bucket_id(bucket),
        )
        if document["state"] not in get_args(WarmingState):
            raise InvalidInput("unreadable warming: unknown state")
        counts = {name: int(document[name]) for name in ("total", "done", "skipped", "failed")}
        return Warming(serial, scope, document["state"], **counts, reason=str(document.get("reason", "")))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InvalidInput(f"unreadable warming: {type(error).__name__}") from error
