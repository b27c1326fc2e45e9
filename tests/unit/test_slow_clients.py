"""Which client is ended when places for proxied responses or space are scarce."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from distributor_node.services.api import clients as clients_module
from distributor_node.services.api.clients import WINDOW, SlowClients
from distributor_node.shared.ports.state_store import StateStore
from tests.waiting import eventually

RATE = 1000.0


@dataclass(slots=True, eq=False)
class Client:
    """Takes so many bytes per second."""

    rate: float
    taken: float = 0.0
    ended: list[str] = field(default_factory=list)

    def acknowledged(self) -> int | None:
        return int(self.taken)

    def abort_response(self, reason: str) -> None:
        self.ended.append(reason)


def measured(clients: SlowClients, *connections: Client) -> None:
    """Let the time pass that a measurement takes."""
    for now in (0.0, WINDOW / 2, WINDOW):
        for one in connections:
            one.taken = 5_000_000 + one.rate * now  # what fits into the buffers does not count
            clients.observe(one, 1, now)


def test_the_slowest_below_the_minimum_rate_is_ended_first() -> None:
    clients, slow, slower, quick = SlowClients(RATE), Client(900), Client(10), Client(1001)
    with ExitStack() as places:
        for one in (slow, slower, quick):
            places.enter_context(clients.place(one, "a"))
        assert not clients.free_place("b")  # nothing is known of them yet
        measured(clients, slow, slower, quick)
        assert clients.free_place("b")
        assert slower.ended == ["client_too_slow"]
        assert clients.free_place("b")
        assert slow.ended == ["client_too_slow"]
        assert not clients.free_place("b")
    assert not quick.ended


def test_a_client_that_has_taken_everything_is_not_slow() -> None:
    clients, one = SlowClients(RATE), Client(10)
    with clients.place(one, "a"):
        measured(clients, one)
        clients.observe(one, 0, WINDOW + 1)
        assert not clients.free_place("b")


def test_zero_ends_nobody_for_its_rate() -> None:
    clients, one = SlowClients(0), Client(0)
    with clients.place(one, "a"):
        measured(clients, one)
        assert not clients.free_place("b")


def test_an_address_with_many_places_gives_one_to_an_address_with_few() -> None:
    clients, crowd = SlowClients(RATE), [Client(5000.0 + number) for number in range(6)]
    with ExitStack() as places:
        for one in crowd:
            places.enter_context(clients.place(one, "crowd"))
        measured(clients, *crowd)
        assert not clients.free_place("crowd")
        assert clients.free_place("other")
        assert [bool(one.ended) for one in crowd] == [True, *[False] * 5]
        for _ in range(2):
            places.enter_context(clients.place(Client(0), "other"))
        assert not clients.free_place("other")  # 5 places are less than twice 3


@dataclass(slots=True)
class Usage:
    used: int = 0
    reserved: int = 0
    wanted: int = 0

    async def usage(self) -> Usage:
        return self

    async def space_requests(self) -> list[int]:
        return [self.wanted]


@pytest.mark.parametrize("scarce", ["used", "reserved", "wanted"])
async def test_clients_of_cached_objects_are_ended_while_space_is_scarce(
    scarce: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients_module, "SPACE_INTERVAL", 0.01)
    clients, state = SlowClients(RATE), Usage()
    cached = [Client(float(number)) for number in range(1, 4)]
    quick, proxied = Client(2000), Client(0)
    with clients.place(proxied, "a"):
        measured(clients, *cached, quick, proxied)
        watching = asyncio.create_task(clients.watch_space(cast("StateStore", cast("Any", state)), 100))
        await asyncio.sleep(0.1)
        assert not any(one.ended for one in cached)  # a paused player is left alone
        setattr(state, scarce, 101)
        order: list[Client] = []

        def all_ended() -> bool:
            order.extend(one for one in cached if one.ended and one not in order)
            return len(order) == 3

        await eventually(all_ended, 20, pause=0)
        watching.cancel()
    assert order == cached  # the slowest first
    assert not quick.ended
    assert not proxied.ended
