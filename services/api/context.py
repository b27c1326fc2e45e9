"""The adapters and state that the API's handlers share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from distributor_node.services.api.accesses import AccessCounter, Viewers
from distributor_node.services.api.clients import ClientAddresses, SlowClients
from distributor_node.services.api.fetch_capacity import FetchCapacity, FetchEvents
from distributor_node.shared.adapters.volume import Volume
from distributor_node.shared.domain.objects import Assignment
from distributor_node.shared.ports.catalog import Catalog
from distributor_node.shared.ports.job_queue import JobQueue
from distributor_node.shared.ports.state_store import StateStore
from distributor_node.shared.runtime.operator_state import OperatorStateWatcher
from distributor_node.shared.settings.model import Settings
from distributor_node.shared.waiting import TurnBudget

if TYPE_CHECKING:
    from distributor_node.shared.adapters.peers import CopyOffers, Peers
    from distributor_node.shared.adapters.sources.failover import FailoverReader


@dataclass(slots=True)
class CurrentAssignment:
    """The node's assignment. An operator may change it while the node runs."""

    current: Assignment


class RefusedLookups:
    """When a look-up was last refused because too many waited, for readiness."""

    def __init__(self) -> None:
        self._last = float("-inf")

    def note(self) -> None:
        self._last = time.monotonic()

    def recent(self, seconds: float) -> bool:
        """Whether one was refused in the last `seconds`."""
        return time.monotonic() - self._last < seconds


@dataclass(frozen=True, slots=True)
class ApiContext:
    """Everything that handlers use. Built once per process, and open before the first request."""

    settings: Settings
    volume: Volume
    state: StateStore
    queue: JobQueue
    catalog: Catalog
    failover_reader: FailoverReader
    accesses: AccessCounter
    assignment: CurrentAssignment
    fetch_events: FetchEvents
    fetch_capacity: FetchCapacity
    viewers: Viewers
    operator_state: OperatorStateWatcher
    client_addresses: ClientAddresses = field(default_factory=lambda: ClientAddresses(()))
    slow_clients: SlowClients = field(default_factory=lambda: SlowClients(0))
    refused_lookups: RefusedLookups = field(default_factory=RefusedLookups)
    turns: TurnBudget = field(default_factory=TurnBudget)  # of all bodies that are streamed piece by piece
    copy_offers: CopyOffers | None = None  # if second homes keep copies
    peers: Peers | None = None  # the other nodes of the fleet, if there is one
