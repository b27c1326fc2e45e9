"""Entry point of one worker of the supervisor. It reads its settings as JSON from standard input."""

from __future__ import annotations

import asyncio
import faulthandler
import json
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

from distributor_node.services.api.service import run_api
from distributor_node.services.api.supervisor import (
    HEARTBEAT,
    HEARTBEAT_INTERVAL,
    SHUTDOWN_ORDERED,
    STACK_SIGNAL,
)
from distributor_node.shared.runtime.run_service import CLEAN, ServiceScope, run_service
from distributor_node.shared.runtime.systemd import inherited_socket
from distributor_node.shared.settings.model import Settings
from distributor_node.shared.waiting import background


def main() -> int:
    """Serve until the supervisor sends SIGTERM or dies. Returns the exit code. Argument: where the heartbeat goes."""
    given = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_supervisor, name="supervisor-watch", daemon=True).start()
    settings = Settings(**given["settings"])
    settings.remember_file(None if given["file"] is None else Path(given["file"]))
    return run_worker(settings, Path(given["probe_path"]), given["listener"], int(sys.argv[1]))


def _end_with_supervisor() -> None:
    """Send SIGTERM to this process once the pipe ends, which means that the supervisor has died."""
    while os.read(sys.stdin.fileno(), 1024):
        continue
    os.kill(os.getpid(), signal.SIGTERM)


async def send_heartbeat(pipe: int) -> None:
    """Report that the event loop runs, until cancelled. `pipe`: the supervisor's, closed at the end."""
    os.set_blocking(pipe, False)
    faulthandler.register(STACK_SIGNAL, file=pipe, all_threads=True, chain=False)
    try:
        while True:
            with suppress(
                OSError
            ):  # full: the supervisor is stopped; broken: it has died, and this process ends
                os.write(pipe, HEARTBEAT)
            await asyncio.sleep(HEARTBEAT_INTERVAL)
    finally:
        faulthandler.unregister(STACK_SIGNAL)
        os.close(pipe)


def run_worker(settings: Settings, probe_path: Path, listener: int | None, heartbeat: int) -> int:
    """Serve on a port that other workers share. Returns the exit code, SHUTDOWN_ORDERED included.

    `probe_path`: Unix socket where the supervisor asks for health and metrics. `listener`: descriptor of the public
    port, if systemd has opened it. `heartbeat`: descriptor of the supervisor's pipe."""
    shutdown_ordered = False

    async def serve(scope: ServiceScope) -> None:
        nonlocal shutdown_ordered
        inherited = None if listener is None else inherited_socket(listener)
        async with background(send_heartbeat(heartbeat), "heartbeat"):
            shutdown_ordered = await run_api(scope, settings, probe_path=probe_path, listener=inherited)

    code = run_service(serve, name="api", settings=settings)
    return SHUTDOWN_ORDERED if code == CLEAN and shutdown_ordered else code


if __name__ == "__main__":
    sys.exit(main())
