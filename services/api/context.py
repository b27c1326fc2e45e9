"""What the handlers of the API work with."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.api.accesses import AccessCounter
from services.api.fetch_events import FetchEvents
from shared.adapters.volume import Volume
from shared.domain.objects import Assignment
from shared.ports.catalog import Catalog
from shared.ports.job_queue import JobQueue
from shared.ports.state_store import StateStore
from shared.runtime.operator_state import OperatorStateWatcher
from shared.settings.model import Settings

if TYPE_CHECKING:
    from shared.adapters.sources.failover import FailoverReader


@dataclass(slots=True)
class CurrentAssignment:
    """The node's assignment as it is now: an operator may change it while the node runs."""

    current: Assignment


@dataclass(frozen=True, slots=True)
class ApiContext:
    """Built once in each process by the wiring; everything in it is open when a handler sees it. `clock`: POSIX
    seconds, by which views are told apart."""

    settings: Settings
    volume: Volume
    state: StateStore
    queue: JobQueue
    catalog: Catalog
    failover_reader: FailoverReader
    accesses: AccessCounter
    assignment: CurrentAssignment
    fetch_events: FetchEvents
    operator_state: OperatorStateWatcher
    clock: Callable[[], float] = time.time
