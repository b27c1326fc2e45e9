"""The data of the state store in memory, and the rules on it that several methods share."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from distributor_node.shared.adapters.state_common import (
    MAX_ACCESS_BATCHES,
    MAX_LOGGED_ACCESSES,
    AnnouncementQueue,
    StateTimeouts,
)
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.operator_state import OperatorState, Warming
from distributor_node.shared.domain.space import (
    VIEW_WINDOW,
    AdmissionQuestion,
    Followed,
    Followers,
    SecondHitAdmission,
    Viewer,
    footprint,
)
from distributor_node.shared.ports.state_store import (
    FOLLOWER_MEMORY,
    MAX_WANTED,
    WANTED_MEMORY,
    Access,
    Announcement,
    Failure,
    FailureCause,
    Fetch,
    FetchPhase,
    IndexEntry,
    Lease,
    ObjectStatus,
    PolicyState,
    Term,
    Topic,
    WorkerReport,
)


@dataclass(frozen=True, slots=True)
class Following:
    """Who reads an object that is being fetched. Times are those of the store's clock."""

    views: int = 0  # that began since the first request
    began: float = 0.0  # when the last of them did
    whole: bool = False  # all of the object was ordered
    told_at: float = 0.0  # when a process last told of its clients
    clients: tuple[tuple[str, float, tuple[Viewer, ...]], ...] = ()  # process, when it told of them

    def recent(self, now: float) -> tuple[tuple[str, float, tuple[Viewer, ...]], ...]:
        return tuple(known for known in self.clients if 0 <= now - known[1] < FOLLOWER_MEMORY)

    def with_report(self, process: str, followed: Followed, now: float) -> Following:
        begins = followed.requested and (not self.views or abs(now - self.began) >= VIEW_WINDOW)
        others = tuple(known for known in self.recent(now) if known[0] != process)
        return replace(
            self,
            views=self.views + begins,
            began=now if begins else self.began,
            told_at=now,
            clients=(*others, (process, now, followed.viewers)),
        )


NOT_FOLLOWED = Following()


@dataclass(frozen=True, slots=True)
class FetchRow:
    """A fetch as it was written. Its phase now depends on the clock: see `Tables.phase`."""

    phase: FetchPhase
    reserved: bool  # whether `footprint(size)` bytes are reserved, in any phase
    size: int  # bytes
    token: int
    ends: float  # when the lease, claim or queue mark expires, on the store's clock
    since: float  # when the phase began, on the store's clock
    worker: str
    source: str | None = None
    duration: float = 0.0  # seconds from writing to `ends`
    job: int = 0  # serial of the claim whose job is carried out; 0: there is none
    held: int = 0  # bytes of the object that the reservation covers, if that is more than `size`
    trace: str = ""  # see Fetch
    whole: int = (
        0  # bytes of the object, if it was parked with fewer: `size` is what it has kept. 0: it was not
    )
    views: int = 0  # of the partial object, with the next two: see Fetch. Those of `following` are other ones
    last_access: float = 0.0
    priority: float = 0.0
    following: Following = NOT_FOLLOWED

    @property
    def held_size(self) -> int:
        return max(self.size, self.held)

    @property
    def reservation(self) -> int:
        return footprint(self.held_size) if self.reserved else 0


@dataclass(slots=True)
class Tables:
    """All data of the store."""

    limit: int  # bytes
    timeouts: StateTimeouts
    clock: Callable[[], float]  # POSIX seconds
    objects: dict[ObjectId, IndexEntry] = field(default_factory=dict)
    rows: dict[ObjectId, FetchRow] = field(default_factory=dict)
    failures: dict[ObjectId, tuple[str, float, float, FailureCause]] = field(default_factory=dict)
    """Reason, expiry, seconds from recording to expiry, and cause."""
    space_requests: dict[ObjectId, tuple[int, float]] = field(default_factory=dict)
    """Bytes and expiry."""
    accesses: deque[tuple[int, Sequence[Access]]] = field(default_factory=deque)
    """Serial and batch."""
    logged_accesses: int = 0  # in all batches
    policy: PolicyState = field(default_factory=PolicyState)
    used: int = 0
    reserved: int = 0
    leaving: int = 0
    churn: int = 0
    serial: int = 0
    reconciled: bool = False
    term: Term | None = None
    term_ends: float = 0.0
    operator_state: OperatorState | None = None
    pins: set[ObjectId] = field(default_factory=set)
    purges: dict[ObjectId, int] = field(default_factory=dict)  # serials of the requests
    warming: Warming | None = None
    warming_lease: tuple[str, float] | None = None  # holder, expiry
    token_ids: dict[str, float] = field(default_factory=dict)  # expiry
    workers: dict[str, tuple[WorkerReport, float, float]] = field(default_factory=dict)
    """Report, when it was made, and seconds until it expires."""
    reports: dict[str, tuple[str, float, float]] = field(default_factory=dict)  # likewise, of each process
    reports_watched_until: float = 0.0
    viewed: dict[ObjectId, float] = field(default_factory=dict)  # when they last had viewers, oldest first
    first_views: SecondHitAdmission = field(default_factory=SecondHitAdmission)
    wanted: dict[ObjectId, dict[int, float]] = field(default_factory=dict)  # offsets, oldest first
    started_at: float = field(init=False)
    listeners: set[AnnouncementQueue] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.started_at = self.clock()

    def record_wanted(self, object_id: ObjectId, positions: Sequence[int]) -> None:
        now, known = self.clock(), self.wanted.pop(object_id, {})
        for position in positions:
            known.pop(position, None)
            known[position] = now
        while len(known) > MAX_WANTED:
            del known[next(iter(known))]
        self.wanted[object_id] = known
        oldest = next(iter(self.wanted))
        if not self.wanted_positions(oldest):
            del self.wanted[oldest]

    def wanted_positions(self, object_id: ObjectId) -> Sequence[int]:
        known, now = self.wanted.get(object_id, {}), self.clock()
        return sorted(position for position, at in known.items() if now - at < WANTED_MEMORY)

    def record_followers(self, process: str, followed: Followed) -> None:
        row = self.rows.get(followed.object_id)
        if row is not None:
            following = row.following.with_report(process, followed, self.clock())
            self.rows[followed.object_id] = replace(row, following=following)

    def order_whole(self, object_id: ObjectId) -> None:
        row = self.rows.get(object_id)
        if row is not None:
            self.rows[object_id] = replace(row, following=replace(row.following, whole=True))

    def followers(self, object_id: ObjectId) -> Followers:
        row, now = self.rows.get(object_id), self.clock()
        following, viewed = row.following if row else NOT_FOLLOWED, self.viewed.get(object_id, 0.0)
        return Followers(
            tuple(viewer for _, _, viewers in following.recent(now) for viewer in viewers),
            following.views,
            following.whole or object_id in self.pins,
            told=following.told_at > 0,
            untold=viewed > following.told_at and now - viewed < FOLLOWER_MEMORY,
        )

    def next_serial(self) -> int:
        self.serial += 1
        return self.serial

    def announce(self, topic: Topic, object_id: str = "") -> None:
        for listener in self.listeners:
            listener.put(Announcement(topic, object_id))

    def log_accesses(self, accesses: Sequence[Access]) -> None:
        self.accesses.append((self.next_serial(), tuple(accesses)))
        self.logged_accesses += len(accesses)
        while len(self.accesses) > MAX_ACCESS_BATCHES or self.logged_accesses > MAX_LOGGED_ACCESSES:
            self.drop_oldest_accesses()

    def drop_oldest_accesses(self) -> None:
        _, batch = self.accesses.popleft()
        self.logged_accesses -= len(batch)

    def is_leader(self, term: Term) -> bool:
        return self.term == term and self.clock() < self.term_ends

    def admits(self, object_id: ObjectId, question: AdmissionQuestion) -> bool:
        mean = self.policy.basis.mean_view or self.used / max(1, len(self.objects))
        taken = self.used + self.leaving + self.reserved
        return self.first_views.admits(object_id, question, self.clock(), taken=taken, mean=mean)

    def row(self, object_id: ObjectId) -> FetchRow | None:
        """The fetch of an object.

        A row that ends later than `duration` from now was written before the clock was set back. It is shortened to
        `duration` from now.
        """
        row = self.rows.get(object_id)
        if row and row.ends > (latest := self.clock() + row.duration):
            row = self.rows[object_id] = replace(row, ends=latest)
        return row

    def phase(self, row: FetchRow | None) -> FetchPhase | None:
        """The phase of a row now. None if it has expired without a reservation."""
        if row is None or row.phase is FetchPhase.PARKED or row.ends > self.clock():
            return row.phase if row else None
        return FetchPhase.PARKED if row.reserved else None

    def job_waits(self, row: FetchRow | None) -> bool:
        """Whether the job of an expired queue mark still waits in a queue that does not move."""
        if row is None or row.phase is not FetchPhase.QUEUED:
            return False
        return 0 <= self.clock() - row.since < self.timeouts.lost_job_seconds

    def leased(self, lease: Lease) -> FetchRow | None:
        """The row of a lease. An expired lease stays valid as long as no other worker has taken the object over."""
        row = self.row(lease.object_id)
        if (
            row
            and row.phase is FetchPhase.FETCHING
            and (row.token, row.worker) == (lease.token, lease.worker)
        ):
            return row
        return None

    def park(self, object_id: ObjectId, row: FetchRow, held: int | None = None) -> bool:
        """`held`: see StateStore.park. Returns whether bytes were released."""
        now = self.clock()
        parked = replace(row, phase=FetchPhase.PARKED, ends=now, since=now, duration=0.0)
        if row.reserved and held is not None and held < row.size:
            parked = replace(parked, size=held, held=0, whole=row.whole or row.size)
        elif row.reserved and held is not None and held < row.held_size:
            parked = replace(parked, held=held)
        self.rows[object_id] = parked
        self.reserved -= row.reservation - parked.reservation
        return parked.reservation < row.reservation

    def live_space_requests(self) -> list[int]:
        """Bytes of requests that have not expired, less what is kept of their objects."""
        now = self.clock()
        self.space_requests = {known: wish for known, wish in self.space_requests.items() if wish[1] > now}
        return [
            max(0, wanted - self._kept_by_shrunk(known)) for known, (wanted, _) in self.space_requests.items()
        ]

    def _kept_by_shrunk(self, object_id: ObjectId) -> int:
        """What a fetch has reserved of an object that needs more; 0 for any other."""
        row = self.rows.get(object_id)
        return row.reservation if row and row.whole else 0

    def drop_fetch(self, object_id: ObjectId) -> None:
        """End a fetch and release its reservation."""
        row = self.rows.pop(object_id, None)
        if row:
            self.reserved -= row.reservation

    def put_object(self, entry: IndexEntry) -> None:
        """Add an entry with a new generation, or replace the existing one."""
        replaced = self.objects.get(entry.object_id)
        self.objects[entry.object_id] = replace(entry, evicting=False, generation=self.next_serial())
        self._add_used(footprint(entry.size) - (footprint(replaced.size) if replaced else 0))

    def drop_object(self, entry: IndexEntry) -> None:
        del self.objects[entry.object_id]
        self._add_used(-footprint(entry.size))
        self.announce(Topic.SPACE_FREED, entry.object_id)

    def _add_used(self, more: int) -> None:
        self.used += more
        self.churn += abs(more)

    def fetch(self, object_id: ObjectId) -> Fetch | None:
        row = self.row(object_id)
        phase = self.phase(row)
        if row is None or phase is None:
            return None
        now = self.clock()
        parked = phase is FetchPhase.PARKED
        since = row.ends if parked and row.phase is not phase else row.since
        return Fetch(
            object_id=object_id,
            phase=phase,
            size=row.whole or row.size,
            worker=row.worker,
            source=row.source,
            lease_left=0.0 if parked else row.ends - now,
            age=max(0.0, now - since),
            trace=row.trace,
            reserved=row.reservation,
            views=row.views,
            last_access=row.last_access,
            priority=row.priority,
        )

    def object_status(self, object_id: ObjectId) -> ObjectStatus:
        fetch = self.fetch(object_id)
        nothing = ("", 0.0, 0.0, FailureCause.OTHER)
        reason, ends, duration, cause = self.failures.get(object_id, nothing)
        left = min(ends - self.clock(), duration)
        # During another attempt the failure is hidden
        failed = left > 0 and not (fetch and fetch.phase is FetchPhase.FETCHING)
        return ObjectStatus(fetch, Failure(reason, left, cause) if failed else None)
