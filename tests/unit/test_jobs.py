"""Jobs: outcomes against the retry plan."""

from __future__ import annotations

import pytest

from distributor_node.shared.domain.jobs import (
    Ack,
    DeadLetter,
    JobOutcome,
    Nack,
    Requeue,
    Retry,
    RetryPlan,
)

PLAN = RetryPlan((5.0, 30.0))


@pytest.mark.parametrize(
    ("outcome", "attempt", "resolved"),
    [
        (Ack("already_cached"), 1, Ack("already_cached")),
        (Retry("no space"), 1, Retry("no space")),
        (Retry("no space"), 2, Retry("no space")),
        (Retry("no space"), 3, DeadLetter("no space")),
        (Retry("no space"), 1_000_000, DeadLetter("no space")),
        (Requeue("fetched by another worker"), 3, Requeue("fetched by another worker")),
        (DeadLetter("too large"), 1, DeadLetter("too large")),
        (Nack(), 3, Nack()),
    ],
)
def test_a_retry_of_the_last_attempt_becomes_a_dead_letter(
    outcome: JobOutcome, attempt: int, resolved: JobOutcome
) -> None:
    assert PLAN.resolve(outcome, attempt) == resolved
    assert PLAN.resolve(resolved, attempt) == resolved


def test_a_plan_without_delays_retries_and_requeues_nothing() -> None:
    plan = RetryPlan(())
    assert plan.resolve(Retry("no space"), 1) == DeadLetter("no space")
    assert isinstance(plan.resolve(Requeue("fetched by another worker"), 1), Ack)
