"""Folders in the current directory with the names of the node's packages are not executed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.client import get
from tests.servers.redis_server import free_port
from tests.waiting import eventually

HIJACK = """
from pathlib import Path
Path(__file__).with_name("executed").touch()
"""
NAMES = ("distributor_node", "services", "shared")


@pytest.mark.slow
async def test_api_workers_run_no_code_of_the_current_directory(tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(HIJACK)
    (tmp_path / "manifest.yaml").write_text("version: 1\nobjects: []\n")
    port, metrics_port = free_port(), free_port()
    settings = {
        "STATE_STORE__URL": "redis://127.0.0.1:1",
        "JOB_QUEUE__URL": "amqp://127.0.0.1:1",
        "CATALOG__MANIFEST": str(tmp_path / "manifest.yaml"),
        "STORAGE__PATH": str(tmp_path / "volume"),
        "STORAGE__LIMIT": "1G",
        "PUBLIC_API__HOST": "127.0.0.1",
        "PUBLIC_API__PORT": str(port),
        "PUBLIC_API__WORKERS": "2",
        "METRICS__HOST": "127.0.0.1",
        "METRICS__PORT": str(metrics_port),
    }
    (tmp_path / "volume").mkdir()

    def executed() -> list[str]:
        return [name for name in NAMES if (tmp_path / name / "executed").exists()]

    async def is_up() -> bool:
        assert executed() == []
        assert process.poll() is None, (tmp_path / "log").read_text()
        try:
            return (await get(f"http://127.0.0.1:{port}/healthz")).status == 200
        except OSError:
            return False

    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(  # noqa: ASYNC220 - its end is waited for below
            # As the console script does: without the current directory in front of the path.
            [sys.executable, "-P", "-m", "distributor_node.services.command_line", "api"],
            cwd=tmp_path,
            env={**os.environ, **{f"DISTRIBUTOR_{name}": value for name, value in settings.items()}},
            stdout=log,
            stderr=log,
        )
    try:
        await eventually(is_up)
    finally:
        process.terminate()
        process.wait(60)
    assert executed() == []
