"""What was measured, one JSON line each, for docs/reliability.md."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from tests.fire.crew import Crew

_PLACE = Path(os.environ.get("FIRE_FIGURES", "build/fire/figures.jsonl"))


def note(test: str, crew: Crew | None = None, **figures: float | int | str) -> None:
    """Times in seconds, sizes in bytes."""
    line: dict[str, float | int | str] = {"test": test, "at": round(time.time())}
    if crew is not None:
        line |= {"requests": crew.asked.total(), "failed": len(crew.failures), "wrong": len(crew.wrong)}
    line |= {name: round(value, 3) if isinstance(value, float) else value for name, value in figures.items()}
    _PLACE.parent.mkdir(parents=True, exist_ok=True)
    with _PLACE.open("a") as file:
        file.write(json.dumps(line) + "\n")
