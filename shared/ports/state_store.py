"""How the state store's own server is doing: for those who watch the node, not for the node."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.operator_state import (
    OperatorState,
    OperatorStateSnapshot,
    Warming,
    WarmingScope,
)
from distributor_node.shared.domain.space import Usage


@dataclass(frozen=True, slots=True)
class ServerStats:
    """`memory` in use and its limit in bytes (0: no limit); `clients`: connections; `commands`: processed since it
    started; `saving`: what it last wrote to its disk was written; `eviction`: what it does when its memory is full, as
    it calls it: anything but `noeviction` drops keys of ours behind our back."""

    memory: int
    memory_limit: int
    clients: int
    commands: int
    saving: bool
    eviction: str


# The leading evictor's part of the state store: eviction, reconciliation, what policies keep.
#
# Each verb returns or does nothing if `term` is over. The plural ones do for many objects what their singular does for
# one, in one step for all of them: hand over a few hundred at most, so that nobody else waits long for the store.


class EvictorStore(Protocol):
    """Part of every state store; the same promises: atomic, bounded, StateStoreUnavailable."""

    async def lead(self, holder: str, seconds: float) -> Term | None:
        """Become or stay leader for `seconds`; None while another leads."""

    async def resign(self, term: Term) -> None: ...

    async def space_requested(self) -> int:
        """Bytes (footprints) asked for by `request_space` and not yet granted or run out."""

    async def begin_eviction(
        self, term: Term, object_id: ObjectId, min_idle: float, *, even_pinned: bool = False
    ) -> bool:
        """Mark a complete object as being evicted; it still counts as used. Refused: unknown, already evicting, pinned,
        or accessed (as far as the index knows) less than `min_idle` seconds ago. The generation changes, so that who
        saw the object before cannot `forget` it while its file may still be open."""

    async def finish_eviction(self, term: Term, object_id: ObjectId) -> int:
        """The file is gone: drop the entry, give its bytes back (returned; 0 if it was not being evicted).
        Announces SPACE_FREED."""

    async def begin_evictions(
        self, term: Term, object_ids: Sequence[ObjectId], min_idle: float
    ) -> Sequence[bool]:
        """`begin_eviction` of each, pinned ones refused; in the order given."""

    async def finish_evictions(self, term: Term, object_ids: Sequence[ObjectId]) -> Sequence[int]:
        """`finish_eviction` of each, in the order given."""

    async def cancel_eviction(self, term: Term, object_id: ObjectId) -> None:
        """Back to stored: the file could not be removed now."""

    async def adopt(self, term: Term, entry: IndexEntry) -> bool:
        """Take a complete file of the volume into the index, whatever the limit says. Any fetch of the object without
        a live lease ends with it (reservation given back; announces FETCH_CHANGED). False: known already, or a live
        lease is at work."""

    async def adopt_many(self, term: Term, entries: Sequence[IndexEntry]) -> Sequence[bool]:
        """`adopt` of each, in the order given."""

    async def adopt_partial(self, term: Term, object_id: ObjectId, size: int) -> bool:
        """Account for a partial file that no fetch knows: PARKED, `footprint(size)` reserved, whatever the limit."""

    async def steal_lease(self, term: Term, object_id: ObjectId) -> Lease | None:
        """Take the lease of a PARKED or run-out fetch, to remove its partial file and `release` it."""

    async def recount(self, term: Term, *, entries: bool = True) -> int:
        """Make `used` and `reserved` what the entries and the fetches add up to, in one step; by how many bytes they
        were wrong. Not `entries`: only `reserved`, which takes no time. Entries take one to two seconds a million, in
        which the store answers nobody: see whether `used` can be right first."""

    async def set_reconciled(self, term: Term) -> None:
        """The index stands for the volume as of now, until this store restarts or is emptied."""

    def entries(self) -> AsyncIterator[Sequence[IndexEntry]]:
        """All complete objects in batches, in no order; those that come or go meanwhile may be missed or seen twice."""

    async def fetches(self) -> Sequence[Fetch]:
        """All fetches under way or parked."""

    async def read_accesses(self, position: str, at_most: int) -> tuple[str, Sequence[Access]]:
        """Batches of the access log after `position`, flattened, and the new position; returns at once."""

    async def entry(self, object_id: ObjectId) -> IndexEntry | None:
        """The index entry of one complete object; None: the index holds no such object."""

    async def load_policy_state(self) -> PolicyState: ...

    async def save_policy(self, term: Term, entries: Sequence[IndexEntry], state: PolicyState) -> None:
        """Write changed values of existing entries (frequency, last_access, priority) and the policy's state, in one
        step; entries that are gone meanwhile are passed over. The access log before `state.position` is dropped."""


# The operator's part of the state store: orders that all processes follow, and work that one of them carries out.
#
# orders   what holds now (stopped, draining, assignment, pins); changed by compare-and-set, announced as
# SETTINGS_CHANGED
# purges   objects that must go; the leading evictor carries them out
# warming  at most one at a time; one API process at a time carries it out, by a lease
# tokens   what may be used once


@dataclass(frozen=True, slots=True)
class PurgeRequest:
    """An object that must go. `serial` tells a request from a later one for the same object."""

    object_id: ObjectId
    serial: int


class OperatorStore(Protocol):
    """Part of every state store; the same promises: atomic, bounded, StateStoreUnavailable."""

    async def operator_state(self) -> OperatorState | None:
        """What is ordered; None: nothing ever was, or the store has been emptied."""

    async def change_operator_state(
        self, expected_version: int, state: OperatorState
    ) -> OperatorState | None:
        """Replace the orders of that version (0: there are none); as they stand now, with their new version. None:
        somebody else was quicker. Announces SETTINGS_CHANGED."""

    async def restore_operator_state(self, snapshot: OperatorStateSnapshot) -> bool:
        """Take over a copy, pins included, if the store has no orders at all; True if it had none."""

    async def pinned(self) -> frozenset[ObjectId]:
        """Objects that are never evicted to make room."""

    async def change_pins(self, pin: Sequence[ObjectId] = (), unpin: Sequence[ObjectId] = ()) -> int:
        """How many of them were not as asked for. The orders get a new version if there were any."""

    async def request_purges(self, object_ids: Sequence[ObjectId]) -> None:
        """Ask the evictor to remove objects. Announces PURGE_REQUESTED."""

    async def pending_purges(self, at_most: int) -> Sequence[PurgeRequest]:
        """Some of the requests, in no order."""

    async def complete_purge(self, term: Term, request: PurgeRequest) -> None:
        """The request is fulfilled; a later one for the same object stays."""

    async def start_warming(self, scope: WarmingScope) -> Warming | None:
        """Begin a new warming in place of a finished one; None while one is not finished."""

    async def warming(self) -> Warming | None:
        """The latest one; None: there was none."""

    async def lease_warming(
        self, holder: str, seconds: float, progress: Warming | None = None
    ) -> Warming | None:
        """Take or keep the lease on the warming that is not finished, and write its progress if it is the same one.
        None: there is none, or another process tends it."""

    async def consume_token_id(self, token_id: str, issued: float, seconds: float) -> bool:
        """True the first time within so many seconds that anybody uses it. `issued`: POSIX time; a store that forgets
        at its end says False to tokens from before its beginning (to the second), which may have been used then."""


# The state store: who fetches what, how much space is taken, what was accessed, who leads the evictors.
#
# The volume is the truth, the state store its index: losing it loses recency, never objects. Each verb is atomic.
# Every verb may raise StateStoreUnavailable, within a bounded time; none waits for ever. Times inside the store
# are the store's own clock; callers hand over durations, never deadlines.
#
# Life of one object in the store:
#
#     (absent) ──claim──▶ CLAIMED ──mark_queued──▶ QUEUED ──begin──▶ FETCHING ──commit──▶ stored ──▶ evicting ──▶
# (absent)
#                  claims and queue marks run out by themselves        │  ▲
#                                               lease runs out, park ──▼  │ begin (another worker, same reservation)
#                                                                    PARKED ──release──▶ (absent)


class FetchPhase(StrEnum):
    """How far the fetch of an object is. FETCHING has a live lease; PARKED has reserved bytes but no live lease."""

    CLAIMED = "claimed"
    QUEUED = "queued"
    FETCHING = "fetching"
    PARKED = "parked"


@dataclass(frozen=True, slots=True)
class Fetch:
    """A fetch in the store. `size`: bytes of the object (0 before `begin`); `source`: URL in use, if a worker said so;
    `worker`: who holds (or last held) the lease, or claimed; `lease_left`: seconds until lease, claim or mark run out
    (0 for PARKED); `age`: seconds in this phase."""

    object_id: ObjectId
    phase: FetchPhase
    size: int
    worker: str
    source: str | None
    lease_left: float
    age: float


@dataclass(frozen=True, slots=True)
class Failure:
    """A remembered failure: until `seconds_left` have passed nobody claims the object; requests are proxied or told.
    Its job may be waiting for another attempt meanwhile; while one is under way, there is no failure."""

    reason: str
    seconds_left: float


@dataclass(frozen=True, slots=True)
class ObjectStatus:
    """Where an object stands: being fetched, failed lately, both None when neither."""

    fetch: Fetch | None
    failure: Failure | None


@dataclass(frozen=True, slots=True)
class Claim:
    """Answer to a claim: won by the asker, or the status that is in the way."""

    won: bool
    status: ObjectStatus


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to fetch one object, and its reservation of `footprint(size)` bytes. `token` rises with every grant."""

    object_id: ObjectId
    token: int
    size: int
    worker: str


@dataclass(frozen=True, slots=True)
class Granted:
    """The lease is yours. `resumed`: the reservation existed already (a partial file may be there)."""

    lease: Lease
    resumed: bool


@dataclass(frozen=True, slots=True)
class AlreadyStored:
    """The index holds a complete object of this generation; see `forget`."""

    generation: int


@dataclass(frozen=True, slots=True)
class HeldElsewhere:
    """Another worker has a live lease, or the object is being evicted at this moment."""

    seconds_left: float


@dataclass(frozen=True, slots=True)
class NoSpace:
    """The reservation would pass the limit by this many bytes now."""

    missing: int


@dataclass(frozen=True, slots=True)
class NeverFits:
    """The object is larger than the limit."""


@dataclass(frozen=True, slots=True)
class NotReconciled:
    """The index does not stand for the volume yet (empty or restarted store): wait for the evictor to reconcile."""


BeginResult = Granted | AlreadyStored | HeldElsewhere | NoSpace | NeverFits | NotReconciled


@dataclass(frozen=True, slots=True)
class Access:
    """Accesses to one object since the last hand-over: how many views, and the POSIX time of the last one."""

    object_id: ObjectId
    views: int
    last_at: float


ACCESS_TIME_RESOLUTION = 1 / 2**16
"""Seconds: stores need not tell apart times of access that are closer than this."""


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """What the index holds of a complete object: all that any eviction policy needs.

    `size` in bytes; `frequency` in views; `last_access` POSIX seconds, kept to `ACCESS_TIME_RESOLUTION`; `priority` is
    the policy's own figure, kept as it is.
    """

    object_id: ObjectId
    size: int
    frequency: int
    last_access: float
    priority: float = 0.0
    evicting: bool = False
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Term:
    """A term of leadership over the evictors. `token` rises with every new leader: a fencing token."""

    holder: str
    token: int


@dataclass(frozen=True, slots=True)
class PolicyState:
    """What the policy keeps beside its entries: `inflation` (priority of the last victim) and the position up to
    which the access log has been applied (opaque; "" is the beginning)."""

    inflation: float = 0.0
    position: str = ""


class Topic(StrEnum):
    """What an announcement is about."""

    FETCH_CHANGED = "fetch_changed"
    SPACE_REQUESTED = "space_wanted"
    SPACE_FREED = "space_freed"
    SETTINGS_CHANGED = "settings_changed"
    PURGE_REQUESTED = "purge_wanted"


@dataclass(frozen=True, slots=True)
class Announcement:
    """A wake-up, no more: it may be lost, so whoever waits for one also looks from time to time."""

    topic: Topic
    object_id: str = ""


class StateStore(OperatorStore, EvictorStore, Protocol):
    """See the module's text; orders and what comes with them are in `order_book`, the leading evictor's verbs in
    `leader_book`.

    One instance per process; `open` before use, `close` at the end."""

    async def open(self) -> None:
        """Connect in the background; never fails because the store is down (verbs then raise)."""

    async def close(self) -> None: ...

    async def ping(self) -> None:
        """Return if the store answers."""

    async def server_stats(self) -> ServerStats | None:
        """For those who watch it; None where there is no server."""

    # Requests

    async def find(self, object_id: ObjectId) -> ObjectStatus:
        """Look only: no side effects."""

    async def claim(self, object_id: ObjectId, claimant: str) -> Claim:
        """Win the right to publish the job, for the claim time; refused while any fetch is under way or a failure
        is remembered. A PARKED fetch or a run-out claim can be claimed anew (a parked one keeps its reservation)."""

    async def mark_queued(self, object_id: ObjectId, claimant: str) -> None:
        """The job is published: the claim becomes QUEUED for the (longer) queue time. No effect if no longer CLAIMED
        by this claimant (a worker may have begun already)."""

    async def release_claim(self, object_id: ObjectId, claimant: str) -> None:
        """Publishing failed: drop the claim, if it is still CLAIMED or QUEUED by this claimant (a reservation stays,
        PARKED)."""

    async def usage(self) -> Usage:
        """`fetches` counts the live leases."""

    async def record_accesses(self, accesses: Sequence[Access]) -> None:
        """Hand over one batch, as one entry of the (bounded) access log."""

    # Fetching

    async def begin(self, object_id: ObjectId, size: int, worker: str) -> BeginResult:
        """Take the lease and reserve `footprint(size)` in one step. Over a PARKED fetch or a run-out lease the existing
        reservation is taken over (adjusted to `size`, if that differs and fits). Never grants what would make
        used + reserved pass the limit. Granting forgets what was recorded by `request_space`; a failure stays, out of
        sight while the fetch is live, since another attempt may fail, too."""

    async def renew(self, lease: Lease, source: str | None = None) -> bool:
        """Prolong the lease and say which source is in use. False: the lease is lost; stop writing at once."""

    async def commit(self, lease: Lease, stored_at: float) -> bool:
        """Reserved becomes used, the entry is in the index (one view; last access is `stored_at`, POSIX seconds, but
        not later than the store's now), a failure is forgotten. False: the lease was lost (nothing is changed; the
        file is adopted by the next worker or by reconciliation). A lease that ran out but was taken by nobody can
        still be committed."""

    async def park(self, lease: Lease) -> None:
        """Give the lease back, keep the reservation: a partial file stays on the volume."""

    async def release(self, lease: Lease) -> None:
        """Give lease and reservation back: no file is left. Only after the partial file is gone."""

    async def record_failure(self, object_id: ObjectId, reason: str, seconds: float) -> None:
        """Keep everybody from claiming the object for so long, counted anew with each call. Announces FETCH_CHANGED."""

    async def request_space(self, object_id: ObjectId, size: int, seconds: float) -> None:
        """Ask the evictor for room for one object; the request expires after `seconds`. Announces SPACE_REQUESTED."""

    async def forget(self, object_id: ObjectId, generation: int) -> bool:
        """Drop the entry of this generation: its file is gone from the volume or was never right. True if dropped."""

    # Wake-ups

    async def announce(self, announcement: Announcement) -> None:
        """Tell all processes; best effort, never raises because the store is down."""

    def listen(self) -> AbstractAsyncContextManager[AsyncIterator[Announcement]]:
        """Announcements from now on, of all processes; survives reconnects; drops the oldest when the reader lags.
        Yields one SETTINGS_CHANGED after every (re)connect, since some may have been missed."""
