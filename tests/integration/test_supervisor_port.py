"""A supervisor starts while workers of a killed one still hold its port."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace

import pytest

from distributor_node.services.api.listen import ListenAddress, bind
from distributor_node.services.api.supervisor import reserve_port
from distributor_node.shared.domain.errors import ConfigurationError

ANY = ListenAddress("127.0.0.1", 0)


async def test_a_port_still_held_by_a_predecessor_is_waited_for() -> None:
    with bind(replace(ANY, shared=True)) as leaving:
        leaving.listen()
        address = replace(ANY, port=leaving.getsockname()[1])
        reserving = asyncio.create_task(reserve_port(address, 10, asyncio.Event()))
        await asyncio.sleep(0.1)
        assert not reserving.done()
    with await reserving as reserved:
        assert reserved.getsockname()[1] == address.port


async def test_the_wait_is_bounded_and_ends_at_a_stop() -> None:
    stopped = asyncio.Event()
    stopped.set()
    with bind(replace(ANY, shared=True)) as leaving:
        leaving.listen()
        address = replace(ANY, port=leaving.getsockname()[1])
        with pytest.raises(ConfigurationError, match="in use"):
            await reserve_port(address, 0.3, asyncio.Event())
        with pytest.raises(ConfigurationError, match="in use"):
            await reserve_port(address, 600, stopped)


async def test_a_port_held_by_another_program_fails_immediately() -> None:
    with socket.socket() as foreign:
        foreign.bind(("127.0.0.1", 0))
        foreign.listen()
        with pytest.raises(ConfigurationError, match="in use"):
            await reserve_port(replace(ANY, port=foreign.getsockname()[1]), 600, asyncio.Event())
