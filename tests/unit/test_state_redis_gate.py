"""Failing fast while Redis is out of reach."""

from __future__ import annotations

import pytest

from shared.adapters.state_redis.gate import Gate
from shared.domain.errors import StateStoreUnavailable

CAUSE = ConnectionRefusedError()


def test_lets_everyone_through_while_the_server_answers() -> None:
    gate = Gate()
    assert [gate.enter() for _ in range(3)] == [False, False, False]


def test_names_the_cause_while_closed() -> None:
    gate = Gate(pause=60)
    assert gate.close(CAUSE)
    with pytest.raises(StateStoreUnavailable) as caught:
        gate.enter()
    assert caught.value.__cause__ is CAUSE


def test_says_only_once_that_it_was_open_before() -> None:
    gate = Gate()
    assert [gate.close(CAUSE), gate.close(CAUSE)] == [True, False]


def test_lets_one_at_a_time_try_after_the_pause() -> None:
    gate = Gate(pause=0)
    gate.close(CAUSE)
    probe = gate.enter()
    assert probe
    with pytest.raises(StateStoreUnavailable):
        gate.enter()
    gate.leave(probe)  # cancelled: it proved nothing
    assert gate.enter()


def test_opens_when_the_probe_was_answered() -> None:
    gate = Gate(pause=0)
    gate.close(CAUSE)
    probe = gate.enter()
    gate.open()
    gate.leave(probe)
    assert [gate.enter(), gate.enter()] == [False, False]
