"""Time limits that only make sense together."""

from __future__ import annotations

from collections.abc import Mapping

from shared.domain.jobs import CLAIM_SECONDS


def check_timeouts(operation: float, publish: float, kept_alive: Mapping[str, float]) -> list[str]:
    """What is wrong, in words. Seconds: of one call of the state store, of publishing one job, and, by the name of its
    setting, of what calls of the state store keep alive: a call that may take longer than that keeps nothing alive."""
    wrong = [
        f"state_store.operation_timeout ({operation:g} s) must be less than {name} ({seconds:g} s)"
        for name, seconds in kept_alive.items()
        if operation >= seconds
    ]
    if publish >= CLAIM_SECONDS:
        wrong.append(
            f"job_queue.publish_timeout ({publish:g} s) must be less than {CLAIM_SECONDS:g} s, after which another"
            " request may publish the job"
        )
    return wrong
