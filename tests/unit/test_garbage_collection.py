"""What the garbage collector passes over while a process of the API serves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from distributor_node.shared.runtime.process import YOUNG_OBJECTS

_SCRIPT = """
import asyncio, gc, json, sys
from contextlib import AsyncExitStack
from distributor_node.services.api import service
from distributor_node.shared.runtime.run_service import ServiceScope
from distributor_node.shared.settings.model import Settings

async def serve_api(*_, **__):
    counted = {"passed_over": gc.get_freeze_count(), "left": len(gc.get_objects()), "young": gc.get_threshold()[0]}
    print(json.dumps(counted))

async def main():
    service.serve_api = serve_api
    settings = Settings(
        storage={"path": sys.argv[1], "limit": 10**9},
        catalog={"kind": "manifest", "manifest": sys.argv[2]},
        state_store={"url": "memory://"},
        job_queue={"url": "memory://"},
    )
    async with AsyncExitStack() as resources:
        await service.run_api(ServiceScope(asyncio.Event(), resources), settings)

asyncio.run(main())
"""


def test_a_full_collection_passes_over_what_the_start_has_made(tmp_path: Path) -> None:
    """A hundred thousand objects and more, behind which every request would wait."""
    (tmp_path / "objects.yaml").write_text("version: 1\nobjects: []\n")
    ran = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(tmp_path / "volume"), str(tmp_path / "objects.yaml")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    counted = json.loads(ran.stdout.splitlines()[-1])
    assert counted["passed_over"] > 10 * counted["left"], counted
    assert counted["young"] == YOUNG_OBJECTS
