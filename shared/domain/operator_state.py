"""What the operator sets while the node runs: the operator state, and warming. Both with their JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from distributor_node.shared.domain.errors import InvalidInput
from distributor_node.shared.domain.formats import FORMAT, check_format
from distributor_node.shared.domain.objects import Assignment, ObjectId, parse_bucket_id

MAX_WORKER_ID = 2**63 - 1


# The operator state: takes precedence over the settings, and outlives every process


@dataclass(frozen=True, slots=True)
class OperatorState:
    """What the operator has set."""

    version: int = 0  # set by the state store, new with every change; 0: never set
    stopped: bool = False  # the public port is closed
    draining: bool = False  # no new fetches
    worker_ordered: bool = False  # whether `worker_id` was set by the operator
    worker_id: int | None = None
    buckets_ordered: bool = False  # whether `buckets` was set by the operator
    buckets: frozenset[str] | None = None  # None: all buckets of the worker
    shutdowns: int = 0  # number of shutdown requests; a process ends when it rises

    def assignment(self, configured: Assignment) -> Assignment:
        """The effective assignment: what the operator set, or else what is configured.

        "All buckets of the worker" needs a worker id. Without one the configured buckets apply.
        """
        worker_id = self.worker_id if self.worker_ordered else configured.worker_id
        if not self.buckets_ordered or (self.buckets is None and worker_id is None):
            return Assignment(configured.bucket_ids, worker_id)
        return Assignment(self.buckets, worker_id)


def encode_operator_state(state: OperatorState) -> str:
    """JSON without the version, which the state store keeps separately."""
    document: dict[str, Any] = {one.name: getattr(state, one.name) for one in fields(OperatorState)}
    del document["version"]
    document["buckets"] = None if state.buckets is None else sorted(state.buckets)
    return json.dumps(document)


def decode_operator_state(text: str | bytes, version: int) -> OperatorState:
    """Read what `encode_operator_state` wrote. Unknown fields are ignored. Raises InvalidInput for anything else."""
    try:
        document = json.loads(text)
        known = {one.name: document[one.name] for one in fields(OperatorState) if one.name in document}
        buckets = known.get("buckets")
        state = OperatorState(**{**known, "version": version})
        if buckets is not None:
            state = replace(state, buckets=frozenset(parse_bucket_id(bucket) for bucket in buckets))
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidInput(f"operator state: unreadable: {type(error).__name__}") from error
    flags = (state.stopped, state.draining, state.worker_ordered, state.buckets_ordered)
    numbers = (state.shutdowns, 0 if state.worker_id is None else state.worker_id)
    if not all(type(flag) is bool for flag in flags) or not all(
        type(number) is int and 0 <= number <= MAX_WORKER_ID for number in numbers
    ):
        raise InvalidInput(
            "operator state: expected booleans stopped, draining, worker_ordered, buckets_ordered and non-negative"
            f" integers worker_id, shutdowns, got {flags!r}, {numbers!r}"
        )
    return state


@dataclass(frozen=True, slots=True)
class OperatorStateSnapshot:
    """The copy on the volume: the operator state, and the pinned objects."""

    state: OperatorState
    pinned: frozenset[ObjectId] = frozenset()


def encode_snapshot(snapshot: OperatorStateSnapshot) -> str:
    """The content of the file, as JSON."""
    body = {
        "format": FORMAT,
        "version": snapshot.state.version,
        "orders": json.loads(encode_operator_state(snapshot.state)),
        "pinned": sorted(snapshot.pinned),
    }
    return json.dumps(body, indent=1) + "\n"


def decode_snapshot(text: str | bytes) -> OperatorStateSnapshot:
    """Read what `encode_snapshot` wrote. Raises InvalidInput for anything else."""
    try:
        body = json.loads(text)
        check_format(body, "operator state")
        pinned = frozenset(ObjectId.parse(object_id) for object_id in body["pinned"])
        return OperatorStateSnapshot(
            decode_operator_state(json.dumps(body["orders"]), int(body["version"])), pinned
        )
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InvalidInput(f"operator state: unreadable: {type(error).__name__}") from error


# Warming: fetching objects before clients request them

WarmingState = Literal["waiting", "listing", "fetching", "finished"]


@dataclass(frozen=True, slots=True)
class WarmingScope:
    """What to warm. Without object ids and bucket: all assigned objects."""

    object_ids: tuple[ObjectId, ...] | None = None
    bucket_id: str | None = None  # all assigned objects of this bucket


@dataclass(frozen=True, slots=True)
class Warming:
    """One warming and its progress."""

    serial: int  # distinguishes it from other warmings
    scope: WarmingScope
    state: WarmingState = "waiting"
    total: int = 0  # objects; grows while the catalog is listed
    done: int = 0
    skipped: int = 0
    skipped_for: Mapping[str, int] = field(
        default_factory=dict
    )  # by reason; without those of an earlier version
    failed: int = 0  # requested, but not fetched in time
    not_warmed: tuple[tuple[str, str], ...] = ()
    """The first objects that were to be fetched and are not here, each with the reason."""
    reason: str = ""  # why it ended early or cannot continue

    @property
    def is_finished(self) -> bool:
        return self.state == "finished"


def encode_warming(warming: Warming) -> str:
    """JSON without the serial, which the state store keeps separately."""
    document = asdict(warming)
    del document["serial"]
    return json.dumps(document)


def decode_warming(text: str | bytes, serial: int) -> Warming:
    """Read what `encode_warming` wrote. Raises InvalidInput for anything else."""
    try:
        document = json.loads(text)
        ids, bucket = document["scope"]["object_ids"], document["scope"]["bucket_id"]
        scope = WarmingScope(
            None if ids is None else tuple(ObjectId.parse(object_id) for object_id in ids),
            None if bucket is None else parse_bucket_id(bucket),
        )
        if document["state"] not in get_args(WarmingState):
            raise InvalidInput(
                f"warming: expected state {', '.join(get_args(WarmingState))}, got {document['state']!r}"
            )
        counts = {name: int(document[name]) for name in ("total", "done", "skipped", "failed")}
        skipped_for = {str(name): int(count) for name, count in document.get("skipped_for", {}).items()}
        reason = str(document.get("reason", ""))
        not_warmed = tuple((str(name), str(why)) for name, why in document.get("not_warmed", ()))
        return Warming(
            serial,
            scope,
            document["state"],
            **counts,
            skipped_for=skipped_for,
            not_warmed=not_warmed,
            reason=reason,
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InvalidInput(f"warming: unreadable: {type(error).__name__}") from error
