"""Counters of several worker processes, added up: prometheus-client's multiprocess mode.

prometheus-client decides on its mode when it is imported, so `prepare_multiprocess` comes before the first import of
`shared/observability/metrics.py` in the process that starts the workers; the workers inherit the environment.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


def prepare_multiprocess(directory: Path | None) -> Path:
    """Switch multiprocess mode on, with its files in `directory` (default: a new temporary one), emptied of old files.

    Raises RuntimeError if prometheus-client has been imported already, OSError if the directory cannot be used.
    """
    if "prometheus_client" in sys.modules:
        raise RuntimeError("multiprocess mode must be prepared before prometheus_client is imported")
    if directory is None:
        directory = Path(tempfile.mkdtemp(prefix="distributor-metrics-"))
    directory.mkdir(parents=True, exist_ok=True)
    for left_behind in directory.glob("*.db"):
        left_behind.unlink(missing_ok=True)
    os.environ[VARIABLE] = str(directory)
    return directory


def forget_process(process_id: int) -> None:
    """A worker has ended: its live gauges no longer count. Its counters stay. No effect outside multiprocess mode."""
    if VARIABLE in os.environ:
        from prometheus_client.multiprocess import mark_process_dead  # noqa: PLC0415 (see the module's text)

        mark_process_dead(process_id)  # type: ignore[no-untyped-call]
