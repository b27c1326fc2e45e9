"""The operator's part of the state store: orders that all processes follow, and work that one of them carries out.

orders   what holds now (stopped, draining, assignment, pins); changed by compare-and-set, announced as SETTINGS_CHANGED
purges   objects that must go; the leading evictor carries them out
warming  at most one at a time; one API process at a time carries it out, by a lease
tokens   what may be used once
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from shared.domain.objects import ObjectId
from shared.domain.orders import OperatorState, OperatorStateSnapshot
from shared.domain.warming import Warming, WarmingScope

if TYPE_CHECKING:
    from shared.ports.state_store import Term


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
