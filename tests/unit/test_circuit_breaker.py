"""The circuit breaker fails fast while Redis is unavailable."""

from __future__ import annotations

import pytest

from distributor_node.shared.adapters.state_redis.connection import CircuitBreaker
from distributor_node.shared.domain.errors import StateStoreUnavailable

CAUSE = ConnectionRefusedError()


def test_allows_all_calls_while_the_server_answers() -> None:
    breaker = CircuitBreaker()
    assert [breaker.before_call() for _ in range(3)] == [False, False, False]


def test_reports_the_cause_while_open() -> None:
    breaker = CircuitBreaker(open_seconds=60)
    assert breaker.on_failure(CAUSE)
    with pytest.raises(StateStoreUnavailable) as caught:
        breaker.before_call()
    assert caught.value.__cause__ is CAUSE


def test_reports_only_once_that_it_was_closed_before() -> None:
    breaker = CircuitBreaker()
    assert [breaker.on_failure(CAUSE), breaker.on_failure(CAUSE)] == [True, False]


def test_allows_one_probe_at_a_time_after_the_pause() -> None:
    breaker = CircuitBreaker(open_seconds=0)
    breaker.on_failure(CAUSE)
    probe = breaker.before_call()
    assert probe
    with pytest.raises(StateStoreUnavailable):
        breaker.before_call()
    breaker.after_call(probe)  # cancelled: it proved nothing
    assert breaker.before_call()


def test_closes_when_the_probe_succeeds() -> None:
    breaker = CircuitBreaker(open_seconds=0)
    breaker.on_failure(CAUSE)
    probe = breaker.before_call()
    breaker.on_success()
    breaker.after_call(probe)
    assert [breaker.before_call(), breaker.before_call()] == [False, False]
