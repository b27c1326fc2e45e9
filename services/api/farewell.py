"""What the kernel still has to send when all answers have ended.

A process may end while the last bytes of an answer are in the kernel's buffer, megabytes of them for a slow client; the
kernel goes on sending them. In a container it does not: with the last process the network goes, and the answer is cut.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from pathlib import Path

TABLES = (Path("/proc/self/net/tcp"), Path("/proc/self/net/tcp6"))
_LOOK_INTERVAL = 0.1
# Closed by us, not yet confirmed by the client: FIN_WAIT1, LAST_ACK, CLOSING (Linux, include/net/tcp_states.h).
_CLOSED_BY_US = {"04", "09", "0B"}


async def sent_to_the_end(port: int, seconds: float, tables: Iterable[Path] = TABLES) -> bool:
    """Wait until the clients of `port` have confirmed all that was sent to them; False after so many seconds.

    True at once where the kernel does not tell.
    """
    deadline = time.monotonic() + seconds
    while any(_still_sending(table, port) for table in tables):
        if time.monotonic() >= deadline:
            return False
        await asyncio.sleep(_LOOK_INTERVAL)
    return True


def _still_sending(table: Path, port: int) -> bool:
    """Whether a closed connection of the port has bytes left (proc_net_tcp in the kernel's documentation)."""
    try:
        lines = table.read_text(encoding="ascii").splitlines()[1:]
    except OSError:
        return False
    for fields in map(str.split, lines):
        local_port, unsent = fields[1].rpartition(":")[2], fields[4].partition(":")[0]
        if fields[3] in _CLOSED_BY_US and int(local_port, 16) == port and int(unsent, 16) > 0:
            return True
    return False
