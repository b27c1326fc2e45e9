"""Adds up the counters of several worker processes: prometheus-client's multiprocess mode.

prometheus-client chooses its mode when it is imported. So the process that starts the workers must call
`prepare_multiprocess` before it imports `shared/observability/metrics.py`. The workers inherit the environment.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


def prepare_multiprocess(directory: Path | None) -> Path:
    """Turn multiprocess mode on, with files in `directory` (default: a new temporary one). Old files are removed.

    Raises RuntimeError if prometheus-client is already imported, OSError if the directory cannot be used.
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
    """Drop the live gauges of a worker that has ended. Its counters stay. No effect outside multiprocess mode."""
    if VARIABLE in os.environ:
        from prometheus_client.multiprocess import mark_process_dead  # noqa: PLC0415 (see the module docstring)

        mark_process_dead(process_id)  # type: ignore[no-untyped-call]
