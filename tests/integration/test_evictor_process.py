"""The evictor as a process: readiness, metrics, shutdown, failover."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from distributor_node.shared.domain.space import watermarks_for
from tests.integration.evictor_harness import LIMIT, EvictorHarness, evictor_harness
from tests.servers.redis_server import free_port
from tests.waiting import eventually

pytestmark = pytest.mark.servers

Where = tuple[str, str]


@pytest.fixture
async def harness(tmp_path: Path, redis_url: str, redis_prefix: str) -> AsyncIterator[EvictorHarness]:
    async with evictor_harness(tmp_path, (redis_url, redis_prefix)) as made:
        yield made


async def start(harness: EvictorHarness, where: Where, port: int) -> asyncio.subprocess.Process:
    manifest = harness.root.parent / "manifest.yaml"
    manifest.write_text("version: 1\nobjects: []\n")
    url, prefix = where
    environment = {
        "DISTRIBUTOR_STATE_STORE__URL": url,
        "DISTRIBUTOR_STATE_STORE__PREFIX": prefix,
        "DISTRIBUTOR_JOB_QUEUE__URL": "amqp://127.0.0.1:1/",
        "DISTRIBUTOR_CATALOG__MANIFEST": str(manifest),
        "DISTRIBUTOR_STORAGE__PATH": str(harness.root),
        "DISTRIBUTOR_STORAGE__LIMIT": str(LIMIT),
        "DISTRIBUTOR_EVICTOR__LEADERSHIP": "2",
        "DISTRIBUTOR_EVICTOR__LEADERSHIP_RENEWAL": "0.4",
        "DISTRIBUTOR_METRICS__HOST": "127.0.0.1",
        "DISTRIBUTOR_METRICS__PORT": str(port),
    }
    command = (sys.executable, "-m", "distributor_node.services.command_line", "evictor")
    with (harness.root.parent / f"evictor-{port}.log").open("wb") as log:
        return await asyncio.create_subprocess_exec(
            *command, env={**os.environ, **environment}, stdout=log, stderr=log
        )


def ask(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""
    except OSError:
        return 0, ""


async def ready(port: int) -> bool:
    return (await asyncio.to_thread(ask, port, "/readyz"))[0] == 200


async def leads(port: int) -> bool:
    return "distributor_evictor_leader 1.0" in (await asyncio.to_thread(ask, port, "/metrics"))[1]


async def test_a_standby_takes_over_from_a_killed_leader(
    harness: EvictorHarness, redis_url: str, redis_prefix: str
) -> None:
    harness.put_file("one")
    ports = (free_port(), free_port())
    processes = [await start(harness, (redis_url, redis_prefix), port) for port in ports]
    try:
        for port in ports:
            await eventually(partial(ready, port))
        await eventually(harness.reconciled)
        leader = 0 if await leads(ports[0]) else 1
        standby = 1 - leader
        assert not await leads(ports[standby])
        processes[leader].send_signal(signal.SIGKILL)
        await processes[leader].wait()
        await eventually(partial(leads, ports[standby]))
        await harness.store(*[f"o{number}" for number in range(4)], age=600)
        _, metrics = await asyncio.to_thread(ask, ports[standby], "/metrics")
        assert f"distributor_storage_limit_bytes {float(LIMIT)}" in metrics
        assert f"distributor_storage_high_watermark_bytes {float(watermarks_for(LIMIT).high)}" in metrics
        processes[standby].send_signal(signal.SIGTERM)
        assert await processes[standby].wait() == 0
        # It has resigned: the standby need not wait until the term expires
        assert await harness.state.lead("next", 1.0) is not None
    finally:
        for process in processes:
            if process.returncode is None:
                process.kill()
                await process.wait()
    for log in harness.root.parent.glob("evictor-*.log"):
        assert "Traceback" not in log.read_text()
