"""What the kernel tells of a port's connections (Linux: proc_net_tcp in the kernel's documentation)."""

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

PROC_NET_TCP = (Path("/proc/self/net/tcp"), Path("/proc/self/net/tcp6"))


class TcpState(StrEnum):
    """As the table has them (include/net/tcp_states.h); those that are asked for here."""

    SYN_RECV = "03"
    FIN_WAIT1 = "04"
    LAST_ACK = "09"
    CLOSING = "0B"


@dataclass(frozen=True, slots=True)
class TcpConnection:
    """`state`: two hexadecimal digits. `unsent`: bytes that the other end has not confirmed."""

    state: str
    unsent: int


def tcp_connections(port: int, tables: Iterable[Path] = PROC_NET_TCP) -> Iterator[TcpConnection]:
    """The connections with this local port; none where the kernel does not tell."""
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


# Who is coming in while the port is being closed.
#
# The kernel makes connections by itself and queues them until the process takes them. Closing the socket resets what
# is
# queued, and what is half made: clients that were let in, and have asked already, most likely. So the door is shut
# before
# it is taken away. The listening socket is bound to a network device that does not exist: no first packet (SYN) finds
# it
# any more, and whoever comes now is refused at once, as if it were closed. Connections that are half made belong to it
# still; they are completed, queued, taken by the loop and answered. Once nothing is on its way it is closed without
# harm
# to anybody.

DRAIN_TIMEOUT = 1.0
"""Seconds that a connection may take to be made, once the port is closing."""
QUIET_PERIOD, QUIET_PERIOD_SHARED = 0.02, 0.2
"""How long nobody may have come in before the socket is closed. Longer if several processes listen at the port: the
kernel hands connections to each of them until the last has shut its door, which is at nearly the same time."""
_MIN_INTERVAL, _MAX_INTERVAL = 0.01, 0.1

# asm-generic/socket.h, since Linux 5.0, without privilege since 5.7; Python does not name it
_SO_BINDTOIFINDEX = 62
_NO_DEVICE = 2**31 - 1  # the last number that the kernel could give to a device


async def drain_accept_queue(
    listener: socket.socket,
    accepted_count: Callable[[], int],
    seconds: float,
    quiet_period: float = QUIET_PERIOD,
    tables: Iterable[Path] = PROC_NET_TCP,
) -> None:
    """Shut the door, and return when the loop, which accepts at `listener`, has taken everybody who was coming in, or
    after so many seconds. To be closed right afterwards.
    `accepted_count`: how many connections the loop has taken, ever.

    Where the kernel does not know this, the wait is for those who are queued; who comes after that may be reset.
    """
    tables = tuple(tables)
    refusing = _refuse_new_syns(listener)
    quiet_period = quiet_period if refusing else 0.0
    interval, count_before = _MIN_INTERVAL, accepted_count()
    quiet_since = started = time.monotonic()
    while True:
        pending = _has_backlog(listener) or (refusing and _has_syn_recv(listener, tables))
        now = time.monotonic()
        if pending or accepted_count() != count_before:
            quiet_since, count_before = now, accepted_count()
        if not pending and now - quiet_since >= quiet_period:
            return
        if now - started >= seconds:
            return
        await asyncio.sleep(interval)
        interval = min(_MAX_INTERVAL, interval * 2) if pending else _MIN_INTERVAL


def _refuse_new_syns(listener: socket.socket) -> bool:
    """False if that cannot be had here."""
    if sys.platform != "linux":
        return False
    try:
        listener.setsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX, _NO_DEVICE)
    except OSError:
        return False
    return True


def _has_backlog(listener: socket.socket) -> bool:
    """Whether a connection is made that the loop has not taken."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    return bool(poll.poll(0))


def _has_syn_recv(listener: socket.socket, tables: Iterable[Path]) -> bool:
    port = listener.getsockname()[1]
    return any(connection.state == TcpState.SYN_RECV for connection in tcp_connections(port, tables))


# What the kernel still has to send when all answers have ended.
#
# A process may end while the last bytes of an answer are in the kernel's buffer, megabytes of them for a slow client;
# the
# kernel goes on sending them. In a container it does not: with the last process the network goes, and the answer is
# cut.

_POLL_INTERVAL = 0.1
_CLOSING_STATES = {
    TcpState.FIN_WAIT1,
    TcpState.LAST_ACK,
    TcpState.CLOSING,
}  # and not yet confirmed by the client


async def wait_until_flushed(port: int, seconds: float, tables: Iterable[Path] = PROC_NET_TCP) -> bool:
    """Wait until the clients of `port` have confirmed all that was sent to them; False after so many seconds.

    True at once where the kernel does not tell.
    """
    tables = tuple(tables)
    deadline = time.monotonic() + seconds
    while any(
        connection.state in _CLOSING_STATES and connection.unsent
        for connection in tcp_connections(port, tables)
    ):
        if time.monotonic() >= deadline:
            return False
        await asyncio.sleep(_POLL_INTERVAL)
    return True
