"""A TCP connection to the first of a host's addresses that takes one (RFC 8305)."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Iterable
from itertools import chain, zip_longest
from typing import Any

_CONNECTION_ATTEMPT_DELAY = 0.25
"""Seconds that an address has for itself before the next one is tried beside it (RFC 8305 section 5)."""

Address = tuple[int, Any]
"""Family and address, as the socket module knows them."""


async def connect(host: str, port: int, allow_address: Callable[[str], bool] | None = None) -> socket.socket:
    """A connected, non-blocking socket. OSError if no address takes a connection; no bound in time of its own.

    `allow_address`: whether an address, as text, may be connected to at all; it is asked of what is connected to, so
    that a resolver that says another thing the next moment changes nothing.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = interleave([(family, address) for family, _, _, _, address in found])
    if allow_address is not None:
        addresses = [address for address in addresses if allow_address(address[1][0])]
        if not addresses:
            raise OSError("at a private address")
    if not addresses:
        raise OSError(f"no address of {host}")
    if len(addresses) == 1:
        return await _connected(addresses[0])
    return await _first_connected(addresses)


def interleave(addresses: Iterable[Address]) -> list[Address]:
    """Each once, the families by turns, the first one's first (RFC 8305 section 4). Pure."""
    by_family: dict[int, list[Address]] = {}
    for address in dict.fromkeys(addresses):
        by_family.setdefault(address[0], []).append(address)
    turns = chain.from_iterable(zip_longest(*by_family.values()))
    return [address for address in turns if address is not None]


async def _first_connected(addresses: Iterable[Address]) -> socket.socket:
    remaining, attempts = deque(addresses), set[asyncio.Task[socket.socket]]()
    failure: BaseException | None = None
    try:
        while remaining or attempts:
            if remaining:
                attempts.add(asyncio.create_task(_connected(remaining.popleft()), name="connect"))
            delay = _CONNECTION_ATTEMPT_DELAY if remaining else None
            await asyncio.wait(attempts, timeout=delay, return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in attempts if task.done()]:
                attempts.discard(task)
                if task.exception() is None:
                    return task.result()
                failure = failure or task.exception()
    finally:
        await _close_others(attempts)
    raise failure or OSError("no address")


async def _close_others(attempts: set[asyncio.Task[socket.socket]]) -> None:
    """Close what the others come to."""
    for task in attempts:
        task.cancel()
    for outcome in await asyncio.gather(*attempts, return_exceptions=True):
        if isinstance(outcome, socket.socket):
            outcome.close()


async def _connected(address: Address) -> socket.socket:
    family, where = address
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(sock, where)
    except BaseException:
        sock.close()
        raise
    return sock
