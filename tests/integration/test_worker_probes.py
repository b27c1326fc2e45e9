"""One health, readiness and metrics port for an API of several worker processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from distributor_node.services.api.worker_probes import WorkerProbes
from distributor_node.shared.observability.probe_server import Probes, ProbeServer, Readiness
from tests.end_to_end.client import Answer, get
from tests.servers.redis_server import free_port
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(120)


async def plain_metrics() -> tuple[bytes, str]:
    return b"up 1\n", "text/plain; version=0.0.4"


@pytest.fixture
async def resources() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def worker(resources: AsyncExitStack, path: Path, *problems: str, degraded: str = "") -> ProbeServer:
    async def readiness() -> Readiness:
        return Readiness(problems, (degraded,) if degraded else ())

    return await resources.enter_async_context(
        ProbeServer("", 0, Probes(readiness, plain_metrics), path=path)
    )


class SupervisorProbes:
    """A supervisor's probe server over workers with these sockets."""

    def __init__(self, server: ProbeServer) -> None:
        self._url = f"http://127.0.0.1:{server.port}"

    async def get(self, path: str) -> Answer:
        return await get(f"{self._url}{path}", timeout=8)

    async def report(self, path: str) -> tuple[int, list[str], list[str]]:
        answer = await self.get(path)
        report = answer.json()
        return answer.status, report.get("problems", []), report.get("degraded", [])


async def supervisor(resources: AsyncExitStack, *paths: Path) -> SupervisorProbes:
    probes = WorkerProbes(paths).probes()
    return SupervisorProbes(await resources.enter_async_context(ProbeServer("127.0.0.1", 0, probes)))


async def test_all_workers_are_asked(tmp_path: Path, resources: AsyncExitStack) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    asked = await supervisor(resources, first, second)
    not_started = ["worker 1 has not started", "worker 2 has not started"]
    assert await asked.report("/healthz") == (503, not_started, [])
    assert (await asked.report("/readyz"))[:2] == (503, ["no worker responds"])
    assert (await asked.get("/metrics")).status == 503
    await worker(resources, first, degraded="catalog: timeout")
    assert await asked.report("/healthz") == (503, not_started[1:], [])
    assert await asked.report("/readyz") == (200, [], ["catalog: timeout", "worker 2 does not respond"])
    metrics = await asked.get("/metrics")
    assert (metrics.status, metrics.body) == (200, b"up 1\n")
    assert metrics.headers["content-type"] == "text/plain; version=0.0.4"
    await worker(resources, second, "stopped by an operator", degraded="catalog: timeout")
    assert await asked.report("/healthz") == (200, [], [])
    assert await asked.report("/readyz") == (503, ["stopped by an operator"], ["catalog: timeout"])


async def test_a_worker_that_is_restarted_is_no_failure_and_one_that_hangs_is(
    tmp_path: Path, resources: AsyncExitStack
) -> None:
    path = tmp_path / "1"
    asked = await supervisor(resources, path)
    async with AsyncExitStack() as first_life:
        await worker(first_life, path)
        assert await asked.report("/healthz") == (200, [], [])
    assert await asked.report("/healthz") == (200, [], [])
    path.unlink(missing_ok=True)

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()  # until the other end gives up
        writer.close()

    await resources.enter_async_context(await asyncio.start_unix_server(hang, path))
    assert await asked.report("/healthz") == (503, ["worker 1 does not respond"], [])


async def test_a_killed_worker_leaves_health_and_metrics_alone(tmp_path: Path) -> None:
    (tmp_path / "manifest.yaml").write_text("version: 1\nobjects: []\n")
    port, metrics_port = free_port(), free_port()
    environment = {
        # It serves without its servers
        "DISTRIBUTOR_STATE_STORE__URL": "redis://127.0.0.1:1/0",
        "DISTRIBUTOR_JOB_QUEUE__URL": "amqp://127.0.0.1:1/",
        "DISTRIBUTOR_CATALOG__MANIFEST": str(tmp_path / "manifest.yaml"),
        "DISTRIBUTOR_STORAGE__PATH": str(tmp_path / "volume"),
        "DISTRIBUTOR_PUBLIC_API__HOST": "127.0.0.1",
        "DISTRIBUTOR_PUBLIC_API__PORT": str(port),
        "DISTRIBUTOR_PUBLIC_API__WORKERS": "2",
        "DISTRIBUTOR_METRICS__HOST": "127.0.0.1",
        "DISTRIBUTOR_METRICS__PORT": str(metrics_port),
    }
    with (tmp_path / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "distributor_node.services.command_line", "api"),
            env={**os.environ, **environment},
            stderr=log,
        )

    async def healthy() -> bool:
        try:
            answer = await get(f"http://127.0.0.1:{metrics_port}/healthz", timeout=8)
        except OSError:
            return False
        return answer.status == 200

    def events() -> list[dict[str, object]]:
        return [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]

    try:
        await eventually(healthy)
        started = [line["process"] for line in events() if line["event"] == "worker_started"]
        assert len(started) == 2
        os.kill(int(str(started[0])), signal.SIGKILL)
        await eventually(lambda: any(line["event"] == "worker_died" for line in events()))
        assert await healthy()
        for _ in range(3):  # counted by both workers together
            await get(f"http://127.0.0.1:{port}/api/v1/status", timeout=8)
        metrics = (await get(f"http://127.0.0.1:{metrics_port}/metrics", timeout=8)).body.decode()
        counted = [line for line in metrics.splitlines() if line.startswith("distributor_requests_total")]
        assert any('status="200"' in line and line.endswith(" 3.0") for line in counted), counted
    finally:
        process.terminate()
        code = await process.wait()
    assert code == 0, (tmp_path / "log").read_text()
