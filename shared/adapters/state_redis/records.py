"""Redis keys, and conversion between the server's replies and the values of the port."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from distributor_node.shared.domain.eviction.policy import FIRST_COST_FACTOR, PriorityBasis
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import Followed, Followers, Viewer
from distributor_node.shared.ports.state_store import (
    ACCESS_TIME_RESOLUTION,
    Access,
    Announcement,
    Failure,
    FailureCause,
    Fetch,
    FetchPhase,
    IndexEntry,
    ObjectStatus,
    PolicyState,
    ServerStats,
    Topic,
    WorkerReport,
)


class Keys:
    """The names of all keys. A prefix with a hash tag, such as `{node-1}:`, keeps them on one shard of a proxy.

    objects   HASH    object id → packed record (see _OBJECT)
    fetches   HASH    object id → packed fetch (see records.lua)
    usage     HASH    format (of all of these, see records.lua), used, reserved (bytes), serial (of tokens and
                      generations), accounted (run id of the server whose index is reconciled), turnover, leaving
                      (bytes; see `set_leaving`), run, kept_since (run id of the server, and since when it has
                      kept its keys), cursor (of the search for answers that are not in catalog:answers)
    wishes    HASH    object id → requested bytes and their expiry
    leader    STRING  "token holder", expires
    policy    HASH    inflation, position, basis (JSON, see pack_basis)
    accesses  STREAM  batches of accesses, bounded
    failure:… STRING  reason and cause (see pack_failure), one per object, expires
    orders    HASH    version, orders (JSON): the operator state
    pins      SET     objects that are never evicted to make room
    purges    HASH    object id → serial of the request
    warming   HASH    serial, warming (JSON), state, holder, until (POSIX milliseconds)
    ticket:…  STRING  a token id that was used, expires
    workers   HASH    worker → when it reported, milliseconds until that expires, its report (JSON)
    reports   HASH    process → as in workers: what it reports of itself (JSON)
    watched   STRING  nothing; a page that shows the reports is open, expires
    viewed    ZSET    objects by the time they last had viewers (POSIX milliseconds), bounded
    first_views
              ZSET    large objects by the time of their first view (POSIX milliseconds), bounded
    wanted:…  ZSET    offsets of one object by the time that a viewer waited there, as `viewed`, bounded, expires
    probe     STRING  nothing; written to learn whether the server accepts writes, expires
    catalog:… STRING  answers of the catalog and locks on asking it; see RedisSharedCatalogCache
    catalog:answers
              ZSET    keys of answers by their expiry in POSIX milliseconds
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.objects = f"{prefix}objects"
        self.leader = f"{prefix}leader"
        self.policy = f"{prefix}policy"
        self.accesses = f"{prefix}accesses"
        self.operator_state = f"{prefix}orders"
        self.pins = f"{prefix}pins"
        self.purges = f"{prefix}purges"
        self.warming = f"{prefix}warming"
        self.workers = f"{prefix}workers"
        self.reports = f"{prefix}reports"
        self.reports_watched = f"{prefix}watched"
        self.viewed = f"{prefix}viewed"
        self.first_views = f"{prefix}first_views"
        self.write_probe = f"{prefix}probe"
        self.channel = f"{prefix}announcements"
        self._before_failure = (
            self.objects,
            f"{prefix}fetches",
            f"{prefix}usage",
            f"{prefix}wishes",
            self.leader,
            self.policy,
            self.accesses,
        )
        self._after_failure = (
            self.operator_state,
            self.pins,
            self.purges,
            self.warming,
            f"{prefix}catalog:answers",
        )

    def all_for(self, object_id: str) -> tuple[str, ...]:
        """The KEYS of each script, in the order that records.lua expects."""
        return (*self._before_failure, f"{self._prefix}failure:{object_id}", *self._after_failure)

    def wanted(self, object_id: str) -> str:
        return f"{self._prefix}wanted:{object_id}"

    def token_id(self, name: str) -> str:
        return f"{self._prefix}ticket:{name}"


# Replies

_OBJECT = struct.Struct("<IIHIHdIH")
"""Views × 2 + state, size, last access, priority, generation: 30 bytes, written by records.lua. Integers of six bytes
are read as four and two."""


def read_entry(object_id: bytes, packed: bytes) -> IndexEntry | None:
    """None for what records.lua did not write, such as a record in the layout of another version."""
    if len(packed) != _OBJECT.size or not object_id.isascii():
        return None
    counted, size, more_size, accessed, more_accessed, priority, generation, more_generation = _OBJECT.unpack(
        packed
    )
    return IndexEntry(
        ObjectId(object_id.decode()),
        size | more_size << 32,
        counted >> 1,
        (accessed | more_accessed << 32) * ACCESS_TIME_RESOLUTION,
        priority,
        evicting=bool(counted & 1),
        generation=generation | more_generation << 32,
    )


def read_fetch(object_id: ObjectId, shown: Sequence[Any]) -> Fetch:
    phase, size, worker, source, left, age, trace, reserved, views, last_access, priority = shown
    return Fetch(
        object_id=object_id,
        phase=FetchPhase(phase.decode()),
        size=size,
        worker=worker.decode(),
        source=source.decode() or None,
        lease_left=left / 1000,
        age=age / 1000,
        trace=trace.decode(),
        reserved=reserved,
        views=views,
        last_access=float(last_access),
        priority=float(priority),
    )


def read_object_status(object_id: ObjectId, reply: Sequence[Any]) -> ObjectStatus:
    shown, reason, left = reply
    return ObjectStatus(
        fetch=read_fetch(object_id, shown) if shown else None,
        failure=read_failure(reason, max(0, left) / 1000) if reason else None,
    )


def pack_followed(followed: Followed) -> tuple[str | int, ...]:
    """The arguments of the script for one object."""
    offsets = (offset for viewer in followed.viewers for offset in (viewer.first, viewer.position))
    return followed.object_id, int(followed.requested), len(followed.viewers), *offsets


def read_followers(reply: Sequence[Any]) -> Followers:
    views, whole, told, untold, offsets = reply
    return Followers(
        tuple(map(Viewer, offsets[::2], offsets[1::2])), views, bool(whole), bool(told), bool(untold)
    )


def pack_failure(reason: str, cause: FailureCause) -> str:
    """The reason, then a tab and the cause. A failure without a cause is one of another kind."""
    return f"{reason}\t{cause}"


def read_failure(packed: bytes, seconds_left: float) -> Failure:
    reason, _, cause = packed.decode().rpartition("\t")
    if cause in set(FailureCause):
        return Failure(reason, seconds_left, FailureCause(cause))
    return Failure(packed.decode(), seconds_left)


def pack_accesses(accesses: Sequence[Access]) -> bytes:
    return json.dumps([(access.object_id, access.views, access.last_at) for access in accesses]).encode()


def read_accesses(packed: bytes) -> list[Access]:
    """The accesses of one batch. Empty if it cannot be read: recency is lost, no object."""
    try:
        return [
            Access(ObjectId(object_id), int(views), float(last_at))
            for object_id, views, last_at in json.loads(packed)
        ]
    except (ValueError, TypeError, RecursionError):
        return []


def pack_basis(state: PolicyState) -> str:
    """JSON. The state's L and position are in it too: a version that knows no basis changes only the originals."""
    basis = state.basis
    return json.dumps(
        {
            "policy": basis.policy,
            "miss_cost": basis.miss_cost,
            "views": basis.views,
            "viewed_bytes": basis.viewed_bytes,
            "exponent": basis.exponent,
            "first_weight": basis.first_weight,
            "cost_factor": basis.cost_factor,
            "written_with": [basis.inflation, state.position],
        }
    )


def read_policy_state(inflation: bytes | None, position: bytes | None, packed: bytes | None) -> PolicyState:
    """ValueError if L or the position cannot be read."""
    level, at = _finite(float(inflation or 0)), (position or b"").decode("ascii")
    return PolicyState(_read_basis(level, at, packed or b""), at)


def _read_basis(level: float, position: str, packed: bytes) -> PriorityBasis:
    """L alone if there is no more, or no more that can be read."""
    try:
        fields = json.loads(packed)
        own = fields["written_with"] == [level, position]
        return PriorityBasis(
            inflation=level,
            policy=str(fields["policy"]) if own else "",
            miss_cost=_finite(float(fields["miss_cost"])) if own else 0.0,
            views=_finite(float(fields["views"])),
            viewed_bytes=_finite(float(fields["viewed_bytes"])),
            # The version before knew w(1) = 1/2 and w(views) = views
            exponent=_finite(float(fields.get("exponent", 1.0))),
            first_weight=_finite(float(fields.get("first_weight", 0.5))),
            cost_factor=_finite(float(fields.get("cost_factor", FIRST_COST_FACTOR))),
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return PriorityBasis(level)


def _finite(number: float) -> float:
    if not 0 <= number < float("inf"):
        raise ValueError(f"expected a finite number of at least 0, got {number}")
    return number


def pack_worker(report: WorkerReport) -> bytes:
    return json.dumps(
        {
            "slots": report.slots,
            "running": report.running,
            "waiting": report.waiting,
            "longest_wait": report.longest_wait,
            "full_sources": report.full_sources,
            "spare": report.spare,
        }
    ).encode()


def read_worker(worker: bytes, age: int, packed: bytes) -> WorkerReport:
    """`age`: in milliseconds. Missing fields are 0: not all processes are updated at once."""
    fields = json.loads(packed)
    return WorkerReport(
        worker.decode(),
        slots=int(fields.get("slots", 0)),
        running=int(fields.get("running", 0)),
        waiting=int(fields.get("waiting", 0)),
        longest_wait=float(fields.get("longest_wait", 0.0)),
        full_sources=tuple(map(str, fields.get("full_sources", ()))),
        spare=int(fields.get("spare", 0)),
        age=age / 1000,
    )


def pack_announcement(announcement: Announcement) -> str:
    return f"{announcement.topic} {announcement.object_id}"


def read_announcement(message: bytes) -> Announcement | None:
    """None for an unknown topic: not all processes are updated at once."""
    topic, _, object_id = message.decode(errors="replace").partition(" ")
    try:
        return Announcement(Topic(topic), object_id)
    except ValueError:
        return None


def read_server_stats(info: Mapping[str, Any]) -> ServerStats:
    """`info`: the parsed reply to INFO. A server that is configured to save nothing counts as saving."""
    return ServerStats(
        memory=int(info["used_memory"]),
        memory_limit=int(info["maxmemory"]),
        clients=int(info["connected_clients"]),
        commands=int(info["total_commands_processed"]),
        saving=info["rdb_last_bgsave_status"] == "ok" and info["aof_last_write_status"] == "ok",
        eviction=str(info["maxmemory_policy"]),
    )
