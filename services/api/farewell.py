"""What the kernel still has to send when all answers have ended.

A process may end while the last bytes of an answer are in the kernel's buffer, megabytes of them for a slow client; the
kernel goes on sending them. In a container it does not: with the last process the network goes, and the answer is cut.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from pathlib import Path

from services.api.kernel_table import TABLES, State, connections_of

_LOOK_INTERVAL = 0.1
_CLOSED_BY_US = {State.FIN_WAIT1, State.LAST_ACK, State.CLOSING}  # and not yet confirmed by the client


async def sent_to_the_end(port: int, seconds: float, tables: Iterable[Path] = TABLES) -> bool:
    """Wait until the clients of `port` have confirmed all that was sent to them; False after so many seconds.

    True at once where the kernel does not tell.
    """
    tables = tuple(tables)
    deadline = time.monotonic() + seconds
    while any(one.state in _CLOSED_BY_US and one.unsent for one in connections_of(port, tables)):
        if time.monotonic() >= deadline:
            return False
        await asyncio.sleep(_LOOK_INTERVAL)
    return True
