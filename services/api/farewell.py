"""What the kernel still has to send when all answers have ended.

A process may end while the last bytes of an answer are in the kernel's buffer, megabytes of them for a slow client; the
kernel goes on sending them. In a container it does not: with the last process the network goes, and the answer is cut.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from pathlib import Path

from services.api.kernel_table import PROC_NET_TCP, TcpState, tcp_connections

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
