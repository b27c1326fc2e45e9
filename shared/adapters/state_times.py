"""How long things last in the state store, for both of its adapters."""

from __future__ import annotations

from dataclasses import dataclass

from shared.domain.jobs import CLAIM_SECONDS

MAX_ACCESS_BATCHES = 10_000
"""Bound of the access log: when nobody reads it, the oldest batches are dropped (recency is lost, nothing else)."""

MAX_ANNOUNCEMENTS = 1_000
"""Bound of what one listener may lag behind before it loses the oldest announcements."""

QUEUED_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class StateTimeouts:
    """Seconds. `claim`: to publish a job; `queued`: for a worker to begin it; `lease`: between two renewals;
    `operation_timeout`: that any one verb may take before StateStoreUnavailable."""

    claim_seconds: float = CLAIM_SECONDS
    queued_seconds: float = QUEUED_SECONDS
    lease_seconds: float = 15.0
    operation_timeout: float = 1.0
