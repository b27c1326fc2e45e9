"""Graceful shutdown of a listening port: drains its accept queue before it closes, and waits until bytes are flushed.

Linux only (proc_net_tcp in the kernel's documentation). Elsewhere the waits are shorter, and clients may be reset.
"""

from __future__ import annotations

import asyncio
import re
import select
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

DRAIN_TIMEOUT = 1.0
"""Seconds that a half-open connection may take to complete once the port is closing."""
QUIET_PERIOD, QUIET_PERIOD_SHARED = 0.02, 0.2
"""Seconds without a new connection after which the socket is closed. Longer if several processes share the port: the
kernel distributes connections among them until the last one refuses SYNs, and they do so at nearly the same time."""
PROC_NET_TCP = (Path("/proc/self/net/tcp"), Path("/proc/self/net/tcp6"))
_MIN_INTERVAL, _MAX_INTERVAL = 0.01, 0.1
_FLUSH_POLL_INTERVAL = 0.1

# asm-generic/socket.h, since Linux 5.0, unprivileged since 5.7. Python has no name for it.
_SO_BINDTOIFINDEX = 62
_NO_DEVICE = 2**31 - 1  # the last index that the kernel could give to a device


async def drain_accept_queue(
    listener: socket.socket,
    accepted_count: Callable[[], int],
    seconds: float,
    quiet_period: float = QUIET_PERIOD,
    tables: Iterable[Path] | None = None,
) -> None:
    """Wait until no connection to `listener` is queued or half-open, at most `seconds`. Close it right afterwards.

    Closing a listening socket resets connections that the kernel has completed but the process has not accepted, and
    half-open ones. Their clients have most likely sent a request already. Therefore:

    1. Bind the listener to a non-existent network device. New SYNs no longer find it and are refused.
    2. Half-open connections still complete, and the accept loop accepts them.
    3. Return once no connection has come for `quiet_period`.

    Where step 1 is impossible, wait for the queue only. Later connections may then be reset.
    `accepted_count` returns the number of connections that the loop has accepted so far.
    """
    tables = _tables_of(listener) if tables is None else tuple(tables)
    refusing = _refuse_new_syns(listener)
    quiet_period = quiet_period if refusing else 0.0
    interval, count_before = _MIN_INTERVAL, accepted_count()
    quiet_since = started = time.monotonic()
    while True:
        quiet = time.monotonic() - quiet_since >= quiet_period
        # Half-open connections are looked for at the end, since for that the kernel goes through the connections of all
        # processes. One that completes after this look is found in the queue.
        pending = (quiet and refusing and _has_syn_recv(listener, tables)) or _has_backlog(listener)
        now = time.monotonic()
        if pending or accepted_count() != count_before:
            quiet_since, count_before = now, accepted_count()
        if quiet and not pending and now - quiet_since >= quiet_period:
            return
        if now - started >= seconds:
            return
        await asyncio.sleep(interval)
        interval = min(_MAX_INTERVAL, interval * 2) if pending else _MIN_INTERVAL


def _refuse_new_syns(listener: socket.socket) -> bool:
    """Make the kernel refuse new connections. Returns False if this system cannot."""
    if sys.platform != "linux":
        return False
    try:
        listener.setsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX, _NO_DEVICE)
    except OSError:
        return False
    return True


def _has_backlog(listener: socket.socket) -> bool:
    """Whether a completed connection waits to be accepted."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    return bool(poll.poll(0))


def _tables_of(listener: socket.socket) -> tuple[Path, ...]:
    """Return the tables that may have its connections. A listener of IPv6 may have clients of both kinds."""
    return PROC_NET_TCP[:1] if listener.family == socket.AF_INET else PROC_NET_TCP


def _has_syn_recv(listener: socket.socket, tables: Iterable[Path]) -> bool:
    """Whether a half-open connection exists."""
    port = listener.getsockname()[1]
    return any(connection.state == TcpState.SYN_RECV for connection in tcp_connections(port, tables))


async def wait_until_flushed(port: int, seconds: float, tables: Iterable[Path] = PROC_NET_TCP) -> bool:
    """Wait until the clients of `port` have acknowledged all sent bytes. Returns False after `seconds`.

    The kernel may still hold megabytes of a response for a slow client, and goes on sending them after the process has
    ended. In a container the network disappears with the last process, which would truncate the response.
    """
    tables = tuple(tables)
    deadline = time.monotonic() + seconds
    while any(
        connection.state in _CLOSING_STATES and connection.unsent
        for connection in tcp_connections(port, tables)
    ):
        if time.monotonic() >= deadline:
            return False
        await asyncio.sleep(_FLUSH_POLL_INTERVAL)
    return True


class TcpState(StrEnum):
    """States of connections, as in /proc/net/tcp (include/net/tcp_states.h). Only those used here."""

    SYN_RECV = "03"
    FIN_WAIT1 = "04"
    LAST_ACK = "09"
    CLOSING = "0B"


_CLOSING_STATES = {TcpState.FIN_WAIT1, TcpState.LAST_ACK, TcpState.CLOSING}
"""Closed by this process, not yet acknowledged by the client."""


@dataclass(frozen=True, slots=True)
class TcpConnection:
    """One row of /proc/net/tcp."""

    state: str  # two hexadecimal digits, see TcpState
    unsent: int  # bytes that the peer has not acknowledged


def tcp_connections(port: int, tables: Iterable[Path] = PROC_NET_TCP) -> Iterator[TcpConnection]:
    """Yield the connections with this local port. None where the kernel has no such table."""
    row = re.compile(
        rf"^ *\d+: [0-9A-F]+:{port:04X} [0-9A-F]+:[0-9A-F]+ ([0-9A-F]{{2}}) ([0-9A-F]+):", re.MULTILINE
    )
    for table in tables:
        try:
            text = table.read_text(encoding="ascii")
        except OSError:
            continue
        for state, unsent in row.findall(text):
            yield TcpConnection(state, int(unsent, 16))
