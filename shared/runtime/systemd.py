"""systemd's protocols for services: readiness (sd_notify), the watchdog, and socket activation.

Without systemd its environment variables are not set, and nothing here has an effect. The variables are described in
sd_notify(3), sd_listen_fds(3) and sd_watchdog_enabled(3).
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import structlog

from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.waiting import background

READY, STOPPING, WATCHDOG = "READY=1", "STOPPING=1", "WATCHDOG=1"
PUBLIC_SOCKET = "public_api"  # FileDescriptorName= of the socket units
FIRST_DESCRIPTOR = 3
_VARIABLES = ("NOTIFY_SOCKET", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_PID", "WATCHDOG_USEC")

logger = structlog.get_logger()


def notify(state: str) -> None:
    """Send a state, such as READY, to systemd. A failure is logged: systemd then waits, or restarts the service."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            # "@" stands for the zero byte of an abstract address.
            sender.connect("\0" + address[1:] if address.startswith("@") else address)
            sender.send(state.encode())
    except OSError as error:
        logger.warning("systemd_notification_failed", state=state, reason=str(error))


@asynccontextmanager
async def watchdog() -> AsyncIterator[None]:
    """Notify systemd's watchdog from the event loop inside the block, if the unit has one (WatchdogSec=)."""
    interval = watchdog_interval()
    if interval is None:
        yield
        return
    async with background(_feed_watchdog(interval), "systemd-watchdog"):
        yield


def watchdog_interval() -> float | None:
    """Seconds between two notifications: half of what the unit allows. None: no watchdog for this process."""
    owner, limit = os.environ.get("WATCHDOG_PID", ""), os.environ.get("WATCHDOG_USEC", "")
    if not limit.isdecimal() or not int(limit) or owner not in ("", str(os.getpid())):
        return None
    return int(limit) / 1e6 / 2


async def _feed_watchdog(interval: float) -> None:
    while True:
        notify(WATCHDOG)
        await asyncio.sleep(interval)


def activated_socket(name: str) -> socket.socket | None:
    """Return the listening socket that systemd opened for this process, non-blocking. None: it opened none.

    `name`: FileDescriptorName= of the socket unit. A single socket without that name is taken as well. Raises
    ConfigurationError if systemd passed other sockets.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    count = os.environ.get("LISTEN_FDS", "")
    if not count.isdecimal() or not int(count):
        return None
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    found = [number for number in range(int(count)) if names[number : number + 1] == [name]]
    if not found and int(count) == 1:
        found = [0]
    if len(found) != 1:
        raise ConfigurationError(
            f"socket activation: expected one socket with FileDescriptorName={name}, got {count}: {':'.join(names)}"
        )
    return inherited_socket(FIRST_DESCRIPTOR + found[0])


def inherited_socket(descriptor: int) -> socket.socket:
    """Return the listening TCP socket that is open as `descriptor`, non-blocking and not passed on to child processes.

    Raises ConfigurationError if it is none.
    """
    try:
        listener = socket.socket(fileno=descriptor)
    except OSError as error:
        raise ConfigurationError(f"socket activation: descriptor {descriptor}: {error.strerror}") from error
    if listener.type != socket.SOCK_STREAM or not listener.getsockopt(
        socket.SOL_SOCKET, socket.SO_ACCEPTCONN
    ):
        raise ConfigurationError("socket activation: expected a socket unit with ListenStream= and Accept=no")
    listener.setblocking(False)
    listener.set_inheritable(False)
    return listener


def child_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment for a child process: systemd's messages are for this process alone."""
    return {name: value for name, value in environment.items() if name not in _VARIABLES}
