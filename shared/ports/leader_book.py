"""The leading evictor's part of the state store: eviction, reconciliation, what policies keep.

Each verb returns or does nothing if `term` is over. The plural ones do for many objects what their singular does for
one, in one step for all of them: hand over a few hundred at most, so that nobody else waits long for the store.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Protocol

from shared.domain.objects import ObjectId

if TYPE_CHECKING:
    from shared.ports.state_store import Access, Fetch, IndexEntry, Lease, PolicyState, Term


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

    async def load_policy_state(self) -> PolicyState: ...

    async def save_policy(self, term: Term, entries: Sequence[IndexEntry], state: PolicyState) -> None:
        """Write changed values of existing entries (frequency, last_access, priority) and the policy's state, in one
        step; entries that are gone meanwhile are passed over. The access log before `state.position` is dropped."""
