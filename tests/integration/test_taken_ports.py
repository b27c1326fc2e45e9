"""A port that another program has is one sentence and exit code 2, in every service."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers.redis_server import free_port

SERVERS = {
    "DISTRIBUTOR_STATE_STORE__URL": "redis://127.0.0.1:1/0",
    "DISTRIBUTOR_JOB_QUEUE__URL": "amqp://127.0.0.1:1/",
}
WORKERS = {**SERVERS, "DISTRIBUTOR_PUBLIC_API__WORKERS": "2"}
OPERATOR = {"DISTRIBUTOR_OPERATOR_API__SECRET": "sixteen characters"}


@pytest.mark.parametrize(
    ("service", "setting", "environment"),
    [
        ("standalone", "PUBLIC_API__PORT", {}),
        ("standalone", "METRICS__PORT", {}),
        ("standalone", "OPERATOR_API__PORT", OPERATOR),
        ("api", "PUBLIC_API__PORT", SERVERS),
        ("api", "METRICS__PORT", SERVERS),
        ("api", "PUBLIC_API__PORT", WORKERS),
        ("api", "METRICS__PORT", WORKERS),
        ("api", "OPERATOR_API__PORT", WORKERS | OPERATOR),
        ("fetcher", "METRICS__PORT", SERVERS),
        ("evictor", "METRICS__PORT", SERVERS),
        ("evictor", "METRICS__HOST", SERVERS),
        ("standalone", "PUBLIC_API__HOST", {}),
    ],
)
def test_a_port_that_is_taken_is_named(
    tmp_path: Path, service: str, setting: str, environment: dict[str, str]
) -> None:
    (tmp_path / "manifest.yaml").write_text("version: 1\nobjects: []\n")
    with socket.socket() as foreign:
        foreign.bind(("127.0.0.1", 0))
        foreign.listen()
        wrong = str(foreign.getsockname()[1]) if setting.endswith("PORT") else "a" * 64 + ".invalid"
        own = {
            "CATALOG__MANIFEST": str(tmp_path / "manifest.yaml"),
            "STORAGE__PATH": str(tmp_path / "volume"),
            **{f"{group}__HOST": "127.0.0.1" for group in ("PUBLIC_API", "METRICS", "OPERATOR_API")},
            **{f"{group}__PORT": str(free_port()) for group in ("PUBLIC_API", "METRICS", "OPERATOR_API")},
            setting: wrong,
        }
        done = subprocess.run(
            [sys.executable, "-m", "distributor_node.services.command_line", service],
            env={
                **os.environ,
                **{f"DISTRIBUTOR_{name}": value for name, value in own.items()},
                **environment,
            },
            check=False,
            capture_output=True,
            text=True,
            timeout=50,
        )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    reasons = [
        line["reason"]
        for line in map(json.loads, done.stderr.splitlines())
        if line["event"] == "settings_rejected"
    ]
    assert len(reasons) == 1
    assert setting.lower().replace("__", ".") in reasons[0]
    assert wrong in reasons[0]
