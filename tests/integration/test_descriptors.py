"""Clients that take all descriptors do not take those that work needs, and no source is blamed for it."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from distributor_node.services.demo.objects import DemoObject, generated_object
from distributor_node.services.demo.storage_node import StorageNode
from distributor_node.shared.adapters.sources import SourceClient, SourceLimits
from distributor_node.shared.adapters.volume import Volume, layout
from distributor_node.shared.domain.errors import TooManyOpenFiles
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.runtime.process import MIN_DESCRIPTORS
from tests.chaos.watchers import open_descriptors, process_tree
from tests.end_to_end.client import Answer, get, read_answer
from tests.end_to_end.conftest import Harness
from tests.end_to_end.stack import ServiceProcess, Stack
from tests.waiting import eventually

MAX_AT_REST = 60
SMALL = 40_000  # bytes: too large for the memory of the fast path


@contextmanager
def full_table() -> Iterator[None]:
    """Take every descriptor of this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_descriptors(os.getpid()) + 64, hard))
    try:
        try:
            while True:
                taken.append(os.dup(0))
        except OSError:
            yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_source_is_not_blamed_for_our_own_lack_of_descriptors() -> None:
    async with StorageNode([generated_object("1", 1000)]).run() as node:
        observed: list[str | None] = []
        limits = SourceLimits(connect_timeout=2)
        async with SourceClient(limits, lambda seen: observed.append(seen.failure)) as client:
            with full_table(), pytest.raises(TooManyOpenFiles):
                async with client.get(node.object_url("1")):
                    pass
            with full_table(), pytest.raises(TooManyOpenFiles):
                async with client.get(node.object_url("1").replace("127.0.0.1", "localhost")):
                    pass
    assert observed == [None, None]


def test_the_volume_says_that_descriptors_are_lacking(tmp_path: Path) -> None:
    volume = Volume(tmp_path)
    volume.prepare()
    volume.open_object(ObjectId("1"))
    with full_table(), pytest.raises(TooManyOpenFiles):
        volume.open_object(ObjectId("1"))
    volume.close()


def test_directories_that_are_not_used_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directories = layout.Directories(tmp_path)
    directories.create()
    before = open_descriptors(os.getpid())
    for shard in layout.SHARDS:
        directories.create_shard(f"{layout.OBJECTS}/{shard}")
        with directories.entries(f"{layout.OBJECTS}/{shard}") as entries:
            assert not list(entries)
    assert open_descriptors(os.getpid()) > before + 256
    monkeypatch.setattr(layout, "_IDLE_TTL", 0)
    monkeypatch.setattr(layout, "_RETIRED_TTL", 0)
    kept = -1
    for _ in range(3):
        kept = directories.descriptor(f"{layout.OBJECTS}/{layout.SHARDS[7]}")
        assert directories.revalidate()
    assert open_descriptors(os.getpid()) < before + 10
    os.fstat(kept)  # it is used
    directories.close()


OBJECTS = [generated_object(str(number), SMALL) for number in range(1, 5)]


async def fetch_and_hit(harness: Harness) -> None:
    """Objects in as many directories as there are objects, each fetched, then asked for again."""
    for item in OBJECTS:
        assert_whole(await get(harness.stack.url(item.object_id)), item, "miss")
    for item in OBJECTS:
        await harness.stack.until_hit(item.object_id)
        assert_whole(await get(harness.stack.url(item.object_id)), item, "hit")
    assert len({file.parent for file in harness.stack.volume.glob("objects/*/*")}) > 2


async def until_few_at_rest(stack: Stack) -> None:
    """In every process. A file stays open for a second or two after a hit, a directory for up to two minutes."""

    def counts() -> dict[str, int]:
        running = [(service.name, service.process) for service in stack.running()]
        return {
            f"{name} {pid}": open_descriptors(pid)
            for name, process in running
            if process is not None
            for pid in process_tree(process.pid)
        }

    await eventually(lambda: max(counts().values()) < MAX_AT_REST, 200, what=f"few descriptors: {counts()}")


async def test_a_node_at_rest_holds_few_descriptors(alone: Harness) -> None:
    alone.publish(OBJECTS)
    await alone.stack.add("standalone").healthy()
    await fetch_and_hit(alone)
    await until_few_at_rest(alone.stack)


@pytest.mark.servers
async def test_all_processes_of_a_deployment_at_rest_hold_few_descriptors(deployment: Harness) -> None:
    deployment.publish(OBJECTS)
    await deployment.stack.up(fetchers=1, workers=2)
    await fetch_and_hit(deployment)
    await until_few_at_rest(deployment.stack)


@pytest.mark.parametrize("service", ["standalone", "api", "fetcher", "evictor"])
def test_a_limit_that_is_too_low_is_refused_with_the_number(tmp_path: Path, service: str) -> None:
    (tmp_path / "manifest.yaml").write_text("version: 1\nobjects: []\n")
    servers = {"STATE_STORE__URL": "redis://127.0.0.1:1/0", "JOB_QUEUE__URL": "amqp://127.0.0.1:1/"}
    own = {
        "CATALOG__MANIFEST": str(tmp_path / "manifest.yaml"),
        "STORAGE__PATH": str(tmp_path / "volume"),
        **(servers if service != "standalone" else {}),
    }
    done = subprocess.run(
        ["prlimit", "--nofile=200:200", sys.executable, "-m", COMMAND, service],
        env={**os.environ, **{f"DISTRIBUTOR_{name}": value for name, value in own.items()}},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert f"expected at least {MIN_DESCRIPTORS}, got 200" in done.stderr
    assert "Traceback" not in done.stderr


COMMAND = "distributor_node.services.command_line"


@pytest.fixture
async def deployment(tmp_path: Path, redis_url: str, amqp_url: str) -> AsyncIterator[Harness]:
    stack = Stack(tmp_path, redis_url, amqp_url, f"descriptors-{uuid.uuid4().hex[:8]}")
    async with StorageNode([]).run() as first, StorageNode([]).run() as second:
        try:
            yield Harness(stack, first, second)
        finally:
            stack.kill_all()


@pytest.fixture
async def alone(tmp_path: Path) -> AsyncIterator[Harness]:
    stack = Stack(tmp_path, "memory://", "memory://", "descriptors")
    async with StorageNode([]).run() as first, StorageNode([]).run() as second:
        try:
            yield Harness(stack, first, second)
        finally:
            stack.kill_all()


async def asked(connection: tuple[asyncio.StreamReader, asyncio.StreamWriter], object_id: str) -> Answer:
    reader, writer = connection
    writer.write(f"GET /api/v1/assets/{object_id} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    async with asyncio.timeout(30):
        return await read_answer(reader, 0.0)


async def test_connections_leave_descriptors_for_work(alone: Harness) -> None:
    """More connections than the process may have descriptors, while cached objects and misses are asked for."""
    cached = [generated_object(str(number), SMALL) for number in range(1, 31)]
    missed = [generated_object(str(number), SMALL) for number in range(101, 121)]
    alone.publish([*cached, *missed])
    node = limited(alone.stack, MIN_DESCRIPTORS)
    await node.healthy()
    for item in cached:
        await get(alone.stack.url(item.object_id))
    for item in cached:
        await alone.stack.until_hit(item.object_id)
    assert node.process is not None
    early = [await asyncio.open_connection("127.0.0.1", alone.stack.port) for _ in range(20)]
    for connection, item in zip(early, cached, strict=False):
        assert (await asked(connection, item.object_id)).status == 200
    crowd: list[socket.socket] = []
    try:
        for _ in range(MIN_DESCRIPTORS):
            connecting = socket.socket()
            connecting.setblocking(False)
            connecting.connect_ex(("127.0.0.1", alone.stack.port))
            crowd.append(connecting)
        await eventually(lambda: "accepting_paused" in node.tail(), 30)
        for connection, item in zip(early, cached[10:], strict=False):
            assert_whole(await asked(connection, item.object_id), item, "hit")
        for connection, item in zip(early, missed, strict=False):
            assert_whole(await asked(connection, item.object_id), item, "miss")
        assert open_descriptors(node.process.pid) < MIN_DESCRIPTORS
    finally:
        for one in crowd:
            one.close()
    await eventually(lambda: "accepting_resumed" in node.tail(), 30)
    assert (await get(alone.stack.url("1"))).status == 200
    metrics = (await get(f"{node.health_url}/metrics")).body.decode()
    assert "distributor_source_failures_total{" not in metrics
    for _, writer in early:
        writer.close()


def limited(stack: Stack, descriptors: int) -> ServiceProcess:
    """A standalone node that may open so many descriptors."""
    process = stack.add("standalone")
    assert process.process is not None
    resource.prlimit(process.process.pid, resource.RLIMIT_NOFILE, (descriptors, descriptors))
    return process


def assert_whole(answer: Answer, item: DemoObject, outcome: str) -> None:
    assert (answer.status, answer.headers["x-cache"]) == (200, outcome)
    assert answer.body == item.content.read(0, item.size)
