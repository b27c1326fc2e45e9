"""Which version runs, and in which process."""

from __future__ import annotations

import os
import socket
import uuid
from importlib.metadata import PackageNotFoundError, version


def _installed_version() -> str:
    try:
        return version("distributor-node")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0.0.0"


VERSION = _installed_version()


def process_name() -> str:
    """Return a new name, unique across hosts and restarts, for a process that holds claims or leases."""
    return f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
