"""Entry point of one of the supervisor's workers. It reads its settings as JSON from standard input."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading

from distributor_node.services.api.main import run_worker
from distributor_node.shared.settings.model import Settings


def main() -> int:
    """Serve until the supervisor says stop, or is gone."""
    settings = Settings(**json.loads(sys.stdin.buffer.readline()))
    threading.Thread(target=_end_with_supervisor, name="supervisor-watch", daemon=True).start()
    return run_worker(settings, shared_port=True)


def _end_with_supervisor() -> None:
    """Returns from the read when the pipe's other end is closed: the supervisor has died."""
    while os.read(sys.stdin.fileno(), 1024):
        continue
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
