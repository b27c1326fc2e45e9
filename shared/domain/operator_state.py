"""Warming: fetching objects before anybody asks for them. What is to be warmed, and how far it is."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from distributor_node.shared.domain.errors import InvalidInput
from distributor_node.shared.domain.objects import Assignment, ObjectId, parse_bucket_id

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


# What an operator has ordered while the node runs: it stands above the settings, and outlives every process.

MAX_WORKER_ID = 2**63 - 1


@dataclass(frozen=True, slots=True)
class OperatorState:
    """`version` changes with every change and is given by the state store (0: nothing was ever ordered).

    `worker_id` and `buckets` are the operator's only if `worker_ordered` and `buckets_ordered`; `buckets` None: all of
    the worker. `shutdowns` counts the orders to shut down: a process ends when it rises.
    """

    version: int = 0
    stopped: bool = False
    draining: bool = False
    worker_ordered: bool = False
    worker_id: int | None = None
    buckets_ordered: bool = False
    buckets: frozenset[str] | None = None
    shutdowns: int = 0

    def assignment(self, configured: Assignment) -> Assignment:
        """The assignment in force: what was ordered, else what is configured. All of a worker whom nobody has named is
        no assignment: then the buckets are as configured."""
        worker_id = self.worker_id if self.worker_ordered else configured.worker_id
        if not self.buckets_ordered or (self.buckets is None and worker_id is None):
            return Assignment(configured.bucket_ids, worker_id)
        return Assignment(self.buckets, worker_id)


def encode_operator_state(state: OperatorState) -> str:
    """JSON, without the version: that is the store's."""
    document: dict[str, Any] = {field.name: getattr(state, field.name) for field in fields(OperatorState)}
    del document["version"]
    document["buckets"] = None if state.buckets is None else sorted(state.buckets)
    return json.dumps(document)


def decode_operator_state(text: str | bytes, version: int) -> OperatorState:
    """Read what `encode_operator_state` wrote; InvalidInput for anything else. Fields of later versions are ignored."""
    try:
        document = json.loads(text)
        known = {
            field.name: document[field.name] for field in fields(OperatorState) if field.name in document
        }
        buckets = known.get("buckets")
        state = OperatorState(**{**known, "version": version})
        if buckets is not None:
            state = replace(state, buckets=frozenset(parse_bucket_id(bucket) for bucket in buckets))
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidInput(f"unreadable operator state: {type(error).__name__}") from error
    flags = (state.stopped, state.draining, state.worker_ordered, state.buckets_ordered)
    numbers = (state.shutdowns, 0 if state.worker_id is None else state.worker_id)
    if not all(type(flag) is bool for flag in flags) or not all(
        type(number) is int and 0 <= number <= MAX_WORKER_ID for number in numbers
    ):
        raise InvalidInput("unreadable operator state: a field of the wrong type")
    return state


@dataclass(frozen=True, slots=True)
class OperatorStateSnapshot:
    """The copy on the volume: orders, and the pinned objects that belong to them."""

    state: OperatorState
    pinned: frozenset[ObjectId] = frozenset()


def encode_snapshot(snapshot: OperatorStateSnapshot) -> str:
    """The text of the file."""
    body = {
        "version": snapshot.state.version,
        "orders": json.loads(encode_operator_state(snapshot.state)),
        "pinned": sorted(snapshot.pinned),
    }
    return json.dumps(body, indent=1) + "\n"


def decode_snapshot(text: str | bytes) -> OperatorStateSnapshot:
    """Read the file; InvalidInput if it is none of ours."""
    try:
        body = json.loads(text)
        pinned = frozenset(ObjectId.parse(object_id) for object_id in body["pinned"])
        return OperatorStateSnapshot(
            decode_operator_state(json.dumps(body["orders"]), int(body["version"])), pinned
        )
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InvalidInput(f"unreadable operator state: {type(error).__name__}") from error
