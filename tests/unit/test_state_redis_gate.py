"""Failing fast while Redis is out of reach."""

from __future__ import annotations

import pytest

from shared.adapters.state_redis.gate import CircuitBreaker
from shared.domain.errors import StateStoreUnavailable

CAUSE = ConnectionRefusedError()


def test_lets_everyone_through_while_the_server_answers() -> None:
    breaker = CircuitBreaker()
    assert [breaker.before_call() for _ in range(3)] == [False, False, False]


def test_names_the_cause_while_closed() -> None:
    breaker = CircuitBreaker(open_seconds=60)
    assert breaker.on_failure(CAUSE)
    with pytest.raises(StateStoreUnavailable) as caught:
        breaker.before_call()
    assert caught.value.__cause__ is CAUSE


def test_says_only_once_that_it_was_open_before() -> None:
    breaker = CircuitBreaker()
    assert [breaker.on_failure(CAUSE), breaker.on_failure(CAUSE)] == [True, False]


def test_lets_one_at_a_time_try_after_the_pause() -> None:
    breaker = CircuitBreaker(open_seconds=0)
    breaker.on_failure(CAUSE)
    probe = breaker.before_call()
    assert probe
    with pytest.raises(StateStoreUnavailable):
        breaker.before_call()
    breaker.after_call(probe)  # cancelled: it proved nothing
    assert breaker.before_call()


def test_opens_when_the_probe_was_answered() -> None:
    breaker = CircuitBreaker(open_seconds=0)
    breaker.on_failure(CAUSE)
    probe = breaker.before_call()
    breaker.on_success()
    breaker.after_call(probe)
    assert [breaker.before_call(), breaker.before_call()] == [False, False]
