"""Who is coming in while the port is being closed.

The kernel makes connections by itself and queues them until the process takes them. Closing the socket resets what is
queued, and what is half made: clients that were let in, and have asked already, most likely. So the door is shut before
it is taken away. The listening socket is bound to a network device that does not exist: no first packet (SYN) finds it
any more, and whoever comes now is refused at once, as if it were closed. Connections that are half made belong to it
still; they are completed, queued, taken by the loop and answered. Once nothing is on its way it is closed without harm
to anybody.
"""

from __future__ import annotations

import asyncio
import select
import socket
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from services.api.kernel_table import TABLES, State, connections_of

ARRIVAL_LIMIT = 1.0
"""Seconds that a connection may take to be made, once the port is closing."""
QUIET_SECONDS, QUIET_SECONDS_SHARED = 0.02, 0.2
"""How long nobody may have come in before the socket is closed. Longer if several processes listen at the port: the
kernel hands connections to each of them until the last has shut its door, which is at nearly the same time."""
_FIRST_INTERVAL, _LONGEST_INTERVAL = 0.01, 0.1

# asm-generic/socket.h, since Linux 5.0, without privilege since 5.7; Python does not name it
_SO_BINDTOIFINDEX = 62
_NO_DEVICE = 2**31 - 1  # the last number that the kernel could give to a device


async def let_the_last_in(
    listener: socket.socket,
    taken: Callable[[], int],
    seconds: float,
    quiet_seconds: float = QUIET_SECONDS,
    tables: Iterable[Path] = TABLES,
) -> None:
    """Shut the door, and return when the loop, which accepts at `listener`, has taken everybody who was coming in, or
    after so many seconds. To be closed right afterwards. `taken`: how many connections the loop has taken, ever.

    Where the kernel does not know this, the wait is for those who are queued; who comes after that may be reset.
    """
    tables = tuple(tables)
    door_shut = _shut(listener)
    quiet_seconds = quiet_seconds if door_shut else 0.0
    interval, taken_before = _FIRST_INTERVAL, taken()
    quiet_since = began = time.monotonic()
    while True:
        coming = _has_queued(listener) or (door_shut and _has_half_made(listener, tables))
        now = time.monotonic()
        if coming or taken() != taken_before:
            quiet_since, taken_before = now, taken()
        if not coming and now - quiet_since >= quiet_seconds:
            return
        if now - began >= seconds:
            return
        await asyncio.sleep(interval)
        interval = min(_LONGEST_INTERVAL, interval * 2) if coming else _FIRST_INTERVAL


def _shut(listener: socket.socket) -> bool:
    """False if that cannot be had here."""
    if sys.platform != "linux":
        return False
    try:
        listener.setsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX, _NO_DEVICE)
    except OSError:
        return False
    return True


def _has_queued(listener: socket.socket) -> bool:
    """Whether a connection is made that the loop has not taken."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    return bool(poll.poll(0))


def _has_half_made(listener: socket.socket, tables: Iterable[Path]) -> bool:
    port = listener.getsockname()[1]
    return any(one.state == State.BEING_MADE for one in connections_of(port, tables))
