"""What the kernel tells of a port's connections (Linux: proc_net_tcp in the kernel's documentation)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
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
