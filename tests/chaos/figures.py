"""Results of the chaos tests, one JSON line each, for docs/reliability.md."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from tests.chaos.clients import ClientPool

_RESULTS_FILE = Path(os.environ.get("CHAOS_FIGURES", "build/chaos/figures.jsonl"))


def record_result(test: str, clients: ClientPool | None = None, **figures: float | int | str) -> None:
    """Times in seconds, sizes in bytes."""
    line: dict[str, float | int | str] = {"test": test, "at": round(time.time())}
    if clients is not None:
        line |= {
            "requests": clients.requested.total(),
            "failed": len(clients.failures),
            "wrong": len(clients.wrong),
        }
    line |= {name: round(value, 3) if isinstance(value, float) else value for name, value in figures.items()}
    _RESULTS_FILE.parent.mkdir(parents=True, exist_ok=True)
    with _RESULTS_FILE.open("a") as file:
        file.write(json.dumps(line) + "\n")
