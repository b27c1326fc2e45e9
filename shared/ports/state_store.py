"""The state store port: fetches and their leases, space accounting, accesses, leader election, operator state.

The volume is the truth and the state store is its index: losing the store loses recency, never objects.

Every method is atomic. Every method may raise StateStoreUnavailable within a bounded time, and none waits without a
limit. Times inside the store are read from the store's own clock. Callers pass durations, never deadlines.

Life of one object in the store:

    (absent) ──claim──▶ CLAIMED ──mark_queued──▶ QUEUED ──begin──▶ FETCHING ──commit──▶ stored ──▶ evicting ──▶ (absent)
                   claims and queue marks expire by themselves       │  ▲
                                            lease expires, or park ──▼  │ begin (another worker, same reservation)
                                                                   PARKED ──release──▶ (absent)
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from distributor_node.shared.domain.eviction.policy import NO_BASIS, PolicyEntry, PriorityBasis
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.operator_state import (
    OperatorState,
    OperatorStateSnapshot,
    Warming,
    WarmingScope,
)
from distributor_node.shared.domain.space import AdmissionQuestion, Followed, Followers, Usage, footprint

# Fetches


class FetchPhase(StrEnum):
    """How far the fetch of an object is. FETCHING has a live lease. PARKED has reserved bytes but no live lease."""

    CLAIMED = "claimed"
    QUEUED = "queued"
    FETCHING = "fetching"
    PARKED = "parked"


@dataclass(frozen=True, slots=True)
class Fetch:
    """A fetch in the store."""

    object_id: ObjectId
    phase: FetchPhase
    size: int  # bytes of the object; 0 before `begin`
    worker: str  # which process claimed it, or holds or last held the lease
    source: str | None  # URL in use, if the worker reported one
    lease_left: float  # seconds until the lease, claim or queue mark expires; 0 if PARKED
    age: float  # seconds in this phase
    trace: str = ""  # traceparent of the span that claimed or fetches it; empty: it is not traced
    reserved: int = 0  # bytes, record included: the footprint of the object, or what was kept by `park`
    # As the policy last saved them, of a partial object that competes with stored ones; 0: never. The views are those
    # of the access log, and become those of the complete object. `Followers.views` counts this fetch's viewers alone
    views: int = 0
    last_access: float = 0.0  # POSIX seconds
    priority: float = 0.0

    @property
    def is_shrunk(self) -> bool:
        """Whether less is reserved than the whole object needs: `begin` has to claim the rest."""
        return 0 < self.reserved < footprint(self.size)


class FailureCause(StrEnum):
    """What a fetch failed by, as far as it can be refuted by evidence."""

    SOURCES = "sources"  # no source sent the object: refuted when one sends bytes of it
    CORRUPT = "corrupt"  # the sources sent wrong bytes: refuted when one sends the right ones
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Failure:
    """A remembered failure. The object cannot be claimed until it expires, so requests are proxied or refused.

    The job may be waiting for another attempt. During an attempt there is no failure.
    """

    reason: str
    seconds_left: float
    cause: FailureCause = FailureCause.OTHER


@dataclass(frozen=True, slots=True)
class ObjectStatus:
    """Whether an object is being fetched or failed lately."""

    fetch: Fetch | None
    failure: Failure | None


@dataclass(frozen=True, slots=True)
class Claim:
    """The reply to a claim."""

    won: bool
    status: ObjectStatus  # if the claim was refused: why
    serial: int = 0  # of the claim that was won, for its job; rises with every claim
    admitted: bool = True  # False: the object is to be proxied, because this is its first view


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to fetch one object, with its reservation of `footprint(size)` bytes."""

    object_id: ObjectId
    token: int  # rises with every grant
    size: int  # bytes
    worker: str
    surplus: int = 0  # bytes reserved beyond the footprint, for the larger file of an earlier attempt


@dataclass(frozen=True, slots=True)
class Granted:
    """`begin` granted the lease."""

    lease: Lease
    resumed: bool  # the reservation existed before, so a partial file may exist


@dataclass(frozen=True, slots=True)
class AlreadyStored:
    """The index holds a complete object of this generation; see `forget`."""

    generation: int


@dataclass(frozen=True, slots=True)
class HeldElsewhere:
    """Another worker has a live lease, or the object is being evicted at this moment."""

    seconds_left: float  # of the lease; 0 for an eviction


@dataclass(frozen=True, slots=True)
class Superseded:
    """The job of another claim is being carried out by a worker with a live lease. If it fails, it is tried again."""


@dataclass(frozen=True, slots=True)
class NoSpace:
    """The reservation would exceed the limit now."""

    missing: int  # bytes above the limit


@dataclass(frozen=True, slots=True)
class NeverFits:
    """The object is larger than the limit."""


@dataclass(frozen=True, slots=True)
class NotReconciled:
    """The index does not match the volume yet, because the store is empty or was restarted. Wait."""


BeginResult = Granted | AlreadyStored | HeldElsewhere | Superseded | NoSpace | NeverFits | NotReconciled


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """The heartbeat of a fetcher: that it is alive, and how busy it is."""

    worker: str
    slots: int  # downloads that it runs at once, at most
    running: int  # jobs that have a slot
    waiting: int  # jobs that it holds and that wait for a slot
    longest_wait: float  # seconds that the oldest of these has waited; 0 if there is none
    full_sources: tuple[str, ...] = ()  # host:port of sources that have no free slot
    spare: int = 0  # bytes that its paused downloads would give to an object that needs room
    age: float = 0.0  # seconds since the report, as read from the store


@dataclass(frozen=True, slots=True)
class ProcessReport:
    """What one process reports of itself for the node's page."""

    process: str
    content: str  # JSON, written and read by shared/runtime/process_reports.py
    age: float  # seconds since it was reported


VIEWER_MEMORY = 600.0
"""Seconds that the store remembers when an object had viewers."""
MAX_VIEWED = 10_000
"""Objects of which it does; beyond that, those without viewers for longest are forgotten."""

WANTED_MEMORY = 3.0
"""Seconds that the store remembers at which byte of an object a viewer waits. One that waits on says so again."""
MAX_WANTED = 64
"""Positions of one object; beyond that, the oldest are forgotten."""

FOLLOWER_MEMORY = 5.0
"""Seconds that the store remembers where the clients of a process read an object that is being fetched."""


# The index


@dataclass(frozen=True, slots=True)
class Access:
    """Accesses to one object since the last flush."""

    object_id: ObjectId
    views: int
    last_at: float  # POSIX seconds


ACCESS_TIME_RESOLUTION = 1 / 2**16
"""Seconds. Stores need not distinguish access times that are closer than this."""


@dataclass(slots=True)
class IndexEntry(PolicyEntry):
    """What the index holds of a complete object. It is a policy's entry as it is: a new leader adds a million of them.

    Accesses are rounded to ACCESS_TIME_RESOLUTION, priorities are stored as they are, and there may be no view yet.
    """

    evicting: bool = False
    generation: int = 0  # changes whenever the entry stands for another file, or an eviction begins


@dataclass(frozen=True, slots=True)
class Term:
    """A term of leadership over the evictors."""

    holder: str
    token: int  # fencing token: rises with every new leader


@dataclass(frozen=True, slots=True)
class PolicyState:
    """What the policy keeps in addition to its entries."""

    basis: PriorityBasis = NO_BASIS  # without a policy name: written by a version that knew L alone
    position: str = ""  # how far the access log has been applied; opaque; "" is the beginning


# Operator


@dataclass(frozen=True, slots=True)
class PurgeRequest:
    """An object that the operator wants removed."""

    object_id: ObjectId
    serial: int  # distinguishes a request from a later one for the same object


# Announcements


class Topic(StrEnum):
    """What an announcement is about."""

    FETCH_CHANGED = "fetch_changed"
    SPACE_REQUESTED = "space_wanted"
    SPACE_FREED = "space_freed"
    SETTINGS_CHANGED = "settings_changed"
    PURGE_REQUESTED = "purge_wanted"


@dataclass(frozen=True, slots=True)
class Announcement:
    """A wake-up. It may be lost, so a process that waits for one also polls."""

    topic: Topic
    object_id: str = ""


@dataclass(frozen=True, slots=True)
class ServerStats:
    """The state of the server behind the store, for monitoring."""

    memory: int  # bytes
    memory_limit: int  # bytes; 0: no limit
    clients: int  # connections
    commands: int  # processed since the server started
    saving: bool  # the last write to its disk succeeded
    eviction: str  # maxmemory policy; any other than `noeviction` drops our keys when memory is full


REBUILD_DELAY = 0.1
"""Seconds after the loss of the index until the last look of its rebuild at the partial files. One that was opened
sooner after its lease was requested is seen: its bytes count before the store grants anything again."""


class EvictorStore(Protocol):
    """The leading evictor's part of every state store: eviction, reconciliation, what policies keep.

    Methods with a `term` return without effect if that term is over. The plural methods do the same for many objects
    in one step. Pass at most a few hundred objects, because the store serves no other call during the step.
    """

    async def lead(self, holder: str, seconds: float) -> Term | None:
        """Become or stay leader for `seconds`. None while another process leads."""

    async def resign(self, term: Term) -> None: ...

    async def is_leader(self, term: Term) -> bool:
        """Whether that term goes on."""

    async def space_requests(self) -> Sequence[int]:
        """Bytes (footprints) of each live `request_space` request that was not granted yet, in any order.

        Less what a partial object that was parked with less than its whole reservation has kept: only the rest of it
        is missing.
        """

    async def begin_eviction(
        self, term: Term, object_id: ObjectId, min_idle: float, *, even_pinned: bool = False
    ) -> bool:
        """Mark a complete object as being evicted. It still counts as used.

        False if the object is unknown, already evicting, pinned, or was accessed less than `min_idle` seconds ago as
        far as the index knows. The generation changes, so a process that saw the object before cannot `forget` it while
        its file may still be open.
        """

    async def finish_eviction(self, term: Term, object_id: ObjectId) -> int:
        """Drop the entry of an object whose file was removed. Returns the freed bytes; 0 if it was not evicting.

        Announces SPACE_FREED.
        """

    async def detach_eviction(self, term: Term, object_id: ObjectId) -> bool:
        """Drop the entry of an evicting object whose file was moved aside while it is being sent.

        Its bytes go on counting, in `leaving` (see `set_leaving`), and the object can be fetched again at once. False
        if it was not evicting.
        """

    async def begin_evictions(
        self, term: Term, object_ids: Sequence[ObjectId], min_idle: float
    ) -> Sequence[bool]:
        """`begin_eviction` of each, in the order given. Pinned objects are refused."""

    async def finish_evictions(self, term: Term, object_ids: Sequence[ObjectId]) -> Sequence[int]:
        """`finish_eviction` of each, in the order given."""

    async def cancel_eviction(self, term: Term, object_id: ObjectId) -> None:
        """Make an evicting object stored again, because its file cannot be removed now."""

    async def adopt(self, term: Term, entry: IndexEntry) -> bool:
        """Add a complete file of the volume to the index, even above the limit.

        A fetch of the object without a live lease ends: its reservation is released, FETCH_CHANGED is announced.
        False if the object is in the index already, or a live lease exists.
        """

    async def adopt_many(self, term: Term, entries: Sequence[IndexEntry]) -> Sequence[bool]:
        """`adopt` of each, in the order given."""

    async def adopt_partial(self, term: Term, object_id: ObjectId, size: int) -> bool:
        """Add a partial file that belongs to no fetch: PARKED, with `footprint(size)` bytes reserved.

        Even above the limit. A smaller reservation without a live lease grows. False if the fetch of the object has a
        live lease, or a reservation that is large enough. A writer that the store has forgotten may still be writing:
        `size` is what the file may grow to, until its lock proves that there is none (see `park`).
        """

    async def steal_lease(self, term: Term, object_id: ObjectId) -> Lease | None:
        """Take the lease of a PARKED or expired fetch, to remove its partial file and `release` it."""

    async def recount(self, term: Term, *, entries: bool = True) -> int:
        """Set `used` and `reserved` to the sums of the entries and the fetches, in one step.

        Returns by how many bytes the two were wrong. Without `entries` only `reserved` is recounted, which is fast.
        Entries take one to two seconds per million, during which the store serves no other call. Check first whether
        `used` can be right.
        """

    async def set_leaving(self, term: Term, count: int) -> None:
        """Count so many bytes as used in addition: removed files that are still being sent, and that no entry stands
        for."""

    async def set_reconciled(self, term: Term) -> None:
        """Declare that the index matches the volume. Valid until this store is restarted or emptied."""

    def entries(self) -> AsyncIterator[Sequence[IndexEntry]]:
        """All complete objects in batches, unordered. Objects that come or go during the scan may be missed or seen
        twice."""

    async def fetches(self) -> Sequence[Fetch]:
        """All fetches, parked ones included."""

    async def read_accesses(self, position: str, at_most: int) -> tuple[str, Sequence[Access]]:
        """Up to `at_most` batches of the access log after `position`, flattened, and the new position.

        Returns at once if there are none.
        """

    async def entry(self, object_id: ObjectId) -> IndexEntry | None:
        """The index entry of one complete object; None: the index holds no such object."""

    async def load_policy_state(self) -> PolicyState: ...

    async def save_policy(self, term: Term, entries: Sequence[IndexEntry], state: PolicyState) -> None:
        """Write frequency, last_access and priority of existing entries, and the policy's state, in one step.

        An object that is not in the index and has a reservation is a partial one: its fetch keeps these fields.
        Entries that no longer exist are skipped. The access log before `state.position` is dropped.
        """


class WorkerStore(Protocol):
    """Who fetches and who waits: heartbeats of the fetchers, and objects that clients read or wait for."""

    async def report_worker(self, report: WorkerReport, seconds: float) -> None:
        """Record a heartbeat, in place of the worker's last one. It expires after `seconds`."""

    async def withdraw_worker(self, worker: str) -> None:
        """The worker takes no more jobs: drop its heartbeat."""

    async def workers(self) -> Sequence[WorkerReport]:
        """The heartbeats of all workers that are alive, by name."""

    async def record_viewers(self, object_ids: Sequence[ObjectId]) -> None:
        """Clients read these objects, or wait for them, at this moment. Remembered for VIEWER_MEMORY seconds."""

    async def last_viewed(self, object_ids: Sequence[ObjectId]) -> Sequence[float | None]:
        """Seconds since each object was last reported by `record_viewers`. None: not remembered."""

    async def record_wanted(self, object_id: ObjectId, positions: Sequence[int]) -> None:
        """Viewers of an object that is being fetched wait for its bytes from these offsets on.

        Remembered for WANTED_MEMORY seconds.
        """

    async def wanted_positions(self, object_ids: Sequence[ObjectId]) -> Sequence[Sequence[int]]:
        """The offsets of each object that were last reported by `record_wanted`, in order."""

    async def record_followers(self, process: str, followed: Sequence[Followed]) -> None:
        """What the clients of a process read, in place of its last report on these objects.

        Remembered for FOLLOWER_MEMORY seconds with the fetch, if there is one. The views among them are counted here,
        as ViewCoalescer does and over all processes, because the fetch asks for them several times a second. Those that
        the policy counts from the access log (`Fetch.views`) come seconds later. Includes `record_viewers`.
        """

    async def followers(self, object_id: ObjectId) -> Followers:
        """What was told of one object that is being fetched."""

    async def order_whole(self, object_id: ObjectId) -> None:
        """Have the whole object fetched, wherever its viewers are. Kept in the record of its fetch, if there is one."""


class ReportStore(Protocol):
    """What all processes report of themselves, for the node's page. Losing it loses nothing but a view."""

    async def report_process(self, process: str, content: str, seconds: float) -> bool:
        """Record a report, in place of the process's last one. It expires after `seconds`.

        Returns whether a page is open, so that reports are wanted more often.
        """

    async def withdraw_process(self, process: str) -> None:
        """The process ends in good order: drop its report."""

    async def process_reports(self) -> Sequence[ProcessReport]:
        """The reports of all processes, also of those that ended without withdrawing theirs, by name."""

    async def watch_reports(self, seconds: float) -> None:
        """A page is open, for so many seconds."""


class OperatorStore(Protocol):
    """The operator's part of every state store: state that all processes apply, and work that one of them does.

    operator state  what holds now (stopped, draining, assignment, pins); changed by compare-and-set, announced as
                    SETTINGS_CHANGED
    purges          objects to be removed by the leading evictor
    warming         at most one at a time, done by one API process at a time under a lease
    token ids       of authentication tokens that may be used once
    """

    async def operator_state(self) -> OperatorState | None:
        """The operator state. None if it was never set, or if the store was emptied."""

    async def change_operator_state(
        self, expected_version: int, state: OperatorState
    ) -> OperatorState | None:
        """Replace the state of that version (0: there is none). Returns it with its new version.

        None if another process changed it first. Announces SETTINGS_CHANGED.
        """

    async def restore_operator_state(self, snapshot: OperatorStateSnapshot) -> bool:
        """Set state and pins from a copy if the store has no operator state at all. Returns whether it did."""

    async def pinned(self) -> frozenset[ObjectId]:
        """Objects that are never evicted to make room."""

    async def change_pins(
        self, pin: Sequence[ObjectId] = (), unpin: Sequence[ObjectId] = ()
    ) -> frozenset[ObjectId]:
        """Pin and unpin objects. Returns those that changed. If any did, the operator state gets a new version."""

    async def request_purges(self, object_ids: Sequence[ObjectId]) -> None:
        """Ask the evictor to remove objects. Announces PURGE_REQUESTED."""

    async def pending_purges(self, at_most: int) -> Sequence[PurgeRequest]:
        """Some of the requests, unordered."""

    async def complete_purge(self, term: Term, request: PurgeRequest) -> None:
        """Drop a request that was carried out. A later request for the same object stays."""

    async def start_warming(self, scope: WarmingScope) -> Warming | None:
        """Start a warming in place of a finished one. None while another one is not finished."""

    async def warming(self) -> Warming | None:
        """The latest warming. None if there was none."""

    async def lease_warming(
        self, holder: str, seconds: float, progress: Warming | None = None
    ) -> Warming | None:
        """Take or renew the lease on the unfinished warming, and write its progress if that has the same serial.

        None if there is no unfinished warming, or another process holds the lease.
        """

    async def consume_token_id(self, token_id: str, issued: float, seconds: float) -> bool:
        """True the first time that the token id is used within `seconds`.

        `issued` is in POSIX seconds. Tokens issued before the store started or was emptied (to the second) are
        rejected, because they may have been used then.
        """


class StateStore(WorkerStore, ReportStore, OperatorStore, EvictorStore, Protocol):
    """One instance per process. `open` it before use, `close` it at the end. See the module docstring."""

    async def open(self) -> None:
        """Connect in the background. Never fails because the store is down: methods raise then."""

    async def close(self) -> None: ...

    async def ping(self) -> None:
        """Return if the store answers."""

    async def server_stats(self) -> ServerStats | None:
        """For monitoring. None if there is no server."""

    async def problems(self) -> Sequence[str]:
        """What keeps the store from working in full, in words: nearly full, refusing writes. Raises if it is down."""

    # Requests

    async def find(self, object_id: ObjectId) -> ObjectStatus:
        """Read only, without side effects."""

    async def claim(
        self,
        object_id: ObjectId,
        claimant: str,
        admission: AdmissionQuestion | None = None,
        trace: str = "",
    ) -> Claim:
        """Win the right to publish the job, until the claim expires. `trace`: a traceparent, which others may link to.

        `admission`: claim the object only if it is admitted, and remember the first view of a large one. The last
        MAX_FIRST_VIEWS of all processes are remembered. A PARKED fetch is admitted. A server that is nearly full
        remembers none and admits all.

        Refused while a fetch is CLAIMED, QUEUED or FETCHING, or a failure is remembered. A PARKED fetch or an expired
        claim can be claimed again. A parked fetch keeps its reservation. An expired queue mark is prolonged instead,
        until its job counts as lost: in a queue that does not move another job would only wait behind it.
        """

    async def mark_queued(self, object_id: ObjectId, claimant: str, serial: int = 0) -> None:
        """The job is published: the claim becomes QUEUED, which lasts longer.

        `serial`: of the claim; another one stays as it is. 0: any of this claimant. No effect if it no longer holds the
        claim: a worker may have begun already.
        """

    async def release_claim(self, object_id: ObjectId, claimant: str | None, serial: int = 0) -> None:
        """Publishing failed, or the job has ended: drop this claimant's claim or queue mark, expired or not.

        `claimant`: None: of any. `serial`: of the claim; another one stays. 0: any. A reservation stays, PARKED.
        """

    async def usage(self) -> Usage:
        """`fetches` counts the live leases, `queued` the queue marks that have not expired."""

    async def record_accesses(self, accesses: Sequence[Access]) -> None:
        """Append one batch, as one entry, to the access log, which is bounded."""

    # Fetching

    async def begin(
        self, object_id: ObjectId, size: int, worker: str, claim: int = 0, trace: str = ""
    ) -> BeginResult:
        """Take the lease and reserve `footprint(size)` bytes in one step. `claim`: its serial, if a job carries one.
        `trace`: a traceparent, which replaces that of the claim.

        Never granted if used + reserved would exceed the limit. The reservation of a PARKED fetch or an expired lease
        is taken over. It grows to `size` if that is larger and fits: so a fetch that was parked with less claims the
        rest in the same step, or gets NoSpace and stays as it is. It never shrinks, because the larger file of
        before may still be on the volume: see `return_surplus`. A grant drops the object's `request_space`. A
        remembered failure stays, hidden while the fetch is live, because this attempt may fail too. Announces
        FETCH_CHANGED only where a reservation is taken over: of a new fetch nothing can be sent yet.
        """

    async def renew(self, lease: Lease, source: str | None = None) -> bool:
        """Extend the lease and report the source in use. False: the lease is lost, stop writing at once."""

    async def resize(self, lease: Lease, size: int) -> bool:
        """Set the size of a fetch whose length was not known before: its reservation grows or shrinks to it.

        False, and nothing is changed, if it would exceed the limit, or if the lease is lost. Announces SPACE_FREED if
        it shrinks.
        """

    async def return_surplus(self, lease: Lease) -> None:
        """Release what is reserved beyond the footprint, once the file is no larger. Announces SPACE_FREED."""

    async def commit(self, lease: Lease, stored_at: float) -> bool:
        """The object is complete: reserved bytes become used, the object enters the index, its failure is dropped.

        The entry has the views that were saved of the partial object, at least one. Its last access is `stored_at`
        (POSIX seconds), but not later than the store's now. False: the lease was lost and nothing is changed; the next
        worker or reconciliation adopts the file. An expired lease can still be committed if no other process has taken
        it.
        """

    async def park(self, lease: Lease, held: int | None = None) -> None:
        """Release the lease and keep the reservation: a partial file stays on the volume.

        `held`: bytes that the file takes. The reservation shrinks to `footprint(held)`, in the same step, and what is
        released is announced as SPACE_FREED. It never grows. Measure the file under the lease and its writer's lock,
        so that no process can write it between the measurement and this call. None: the whole reservation is kept.
        """

    async def release(self, lease: Lease) -> None:
        """Release lease and reservation. Only after the partial file was removed."""

    async def record_failure(
        self,
        object_id: ObjectId,
        reason: str,
        seconds: float,
        cause: FailureCause = FailureCause.OTHER,
    ) -> None:
        """Refuse claims of the object for `seconds` from now. Announces FETCH_CHANGED."""

    async def refute_failure(self, object_id: ObjectId, cause: FailureCause) -> bool:
        """Forget the object's failure if it has this cause: it can be claimed again. Returns whether it was dropped."""

    async def request_space(self, object_id: ObjectId, size: int, seconds: float) -> None:
        """Ask the evictor for room for one object. The request expires after `seconds`. Announces SPACE_REQUESTED."""

    async def forget(self, object_id: ObjectId, generation: int) -> bool:
        """Drop the entry of this generation, because its file is missing or invalid. Returns whether it was dropped."""

    # Announcements

    async def announce(self, announcement: Announcement) -> None:
        """Notify all processes. Best effort: does not raise if the store is down."""

    def listen(self) -> AbstractAsyncContextManager[AsyncIterator[Announcement]]:
        """Announcements of all processes from now on. Reconnects by itself. Drops the oldest when the reader lags.

        Yields one SETTINGS_CHANGED after every connect and reconnect, because some may have been missed.
        """


async def with_views(state: StateStore, basis: PriorityBasis) -> PriorityBasis:
    """The basis; the views of the complete objects if no leader has counted any yet. Reads the whole index then."""
    if not basis.views:
        async for batch in state.entries():
            basis = basis.counting((entry.size, entry.frequency) for entry in batch)
    return basis
