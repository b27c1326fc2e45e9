"""Directories and configuration of an existing node, taken over by ours."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from distributor_node.services.demo.objects import DemoObject, generated_object
from distributor_node.services.demo.squid import TestSquid
from distributor_node.services.demo.squid.data import make_squid_data
from distributor_node.services.demo.storage_node import StorageNode
from tests.end_to_end.client import get
from tests.end_to_end.stack import Stack
from tests.end_to_end.test_one_get import assert_whole, body_of
from tests.waiting import eventually

COUNT = 200
SIZE = 20_000
HOUR_MS = 3_600_000


@dataclass(slots=True)
class Harness:
    """An existing node that was stopped: `data` holds its objects, `state` its cache.json."""

    folder: Path
    stack: Stack
    node: StorageNode
    squid: TestSquid
    objects: list[DemoObject] = field(default_factory=list)

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    def leave_behind(self, count: int = COUNT) -> None:
        """As the existing node leaves its directories."""
        self.objects = [generated_object(str(number), SIZE + number) for number in range(1, count + 1)]
        for folder in (self.data, self.state):
            folder.mkdir()
        for item in self.objects:
            (self.data / item.object_id).write_bytes(body_of(item))
        now = int(time.time() * 1000)
        groups: list[list[Any]] = [[] for _ in range(24)]
        for number, item in enumerate(self.objects, start=1):
            told = {
                "sizeKB": SIZE // 1024,
                "popularity": number,
                "lastAccessTime": now - 2 * HOUR_MS + number,
            }
            groups[number % 24].append([item.object_id, told])
        types = [[item.object_id, "image/x-made-up"] for item in self.objects]
        (self.state / "cache.json").write_text(
            json.dumps({"lruCacheGroups": groups, "mimeTypeByObjectId": types})
        )
        self.node.objects.update({item.object_id: item for item in self.objects})
        self.squid.data = make_squid_data(self.objects, [self.node.url], workers={7: ["0:1"]})

    def import_config(self, limit: str = "1G") -> None:
        """Run the command on the existing node's configuration; the stack's processes get what it printed."""
        config = self.folder / "config.yml"
        config.write_text(
            json.dumps(
                {
                    "id": "moved-over",
                    "endpoints": {"storageSquid": self.squid.url},
                    "directories": {"assets": "./data", "cacheState": "./state"},
                    "limits": {"storage": limit, "pendingDownloadTimeoutSec": 3600},
                    "intervals": {"saveCacheState": 60},
                    "publicApi": {"port": self.stack.port},
                    "buckets": ["0:1"],
                    "workerId": 7,
                }
            )
        )
        command = [
            sys.executable,
            "-m",
            "distributor_node.services.command_line",
            "import-config",
            str(config),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "limits.pendingDownloadTimeoutSec has no equivalent" in done.stderr
        ours = self.folder / "ours.yaml"
        ours.write_text(done.stdout)
        assert "refuse_private_sources: true" in done.stdout
        self.stack.environment["DISTRIBUTOR_CATALOG__REFUSE_PRIVATE_SOURCES"] = "false"  # all is local here
        check = [
            sys.executable,
            "-m",
            "distributor_node.services.command_line",
            "config",
            "check",
            "--config",
            str(ours),
        ]
        subprocess.run(check, capture_output=True, check=True)
        self.stack.config = ours
        self.stack.volume = self.data
        for name in ("CATALOG__MANIFEST", "STORAGE__PATH", "STORAGE__LIMIT", "PUBLIC_API__PORT"):
            del self.stack.environment[f"DISTRIBUTOR_{name}"]

    def asked_for_objects(self) -> Sequence[str]:
        return [record.path for record in self.node.requests if "/files/" in record.path]

    def flat_files(self) -> list[str]:
        return [path.name for path in self.data.iterdir() if path.is_file() and path.name.isdigit()]

    def objects_in_volume(self) -> set[str]:
        return {path.name for path in (self.data / "objects").rglob("*") if path.is_file()}


@pytest.fixture
async def harness(tmp_path: Path, redis_url: str, amqp_url: str) -> AsyncIterator[Harness]:
    stack = Stack(tmp_path, redis_url, amqp_url, f"e2e-{uuid.uuid4().hex[:8]}")
    async with StorageNode([]).run() as node, TestSquid([]).run() as squid:
        try:
            yield Harness(tmp_path, stack, node, squid)
        finally:
            stack.kill_all()


async def assert_all_hits(harness: Harness) -> None:
    for item in harness.objects:
        answer = await get(harness.stack.url(item.object_id))
        assert answer.headers.get("x-cache") == "hit", (item.object_id, answer.headers, harness.stack.logs())
        assert_whole(answer, item)
    assert not harness.asked_for_objects(), "nothing was downloaded"


async def test_every_object_is_a_hit_and_nothing_was_downloaded(harness: Harness) -> None:
    harness.leave_behind()
    harness.import_config()
    await harness.stack.up()
    await assert_all_hits(harness)
    assert not harness.flat_files(), "moved, not copied"
    status = await harness.stack.status()
    assert (status["id"], status["objectsInCache"]) == ("moved-over", COUNT)
    query_node = status["queryNodeStatus"]
    assert query_node["url"] == harness.squid.url
    assert query_node["blocksProcessed"] > 0
    assert query_node["packageVersion"]
    answer = await get(harness.stack.url("1"), method="HEAD")
    assert answer.headers["content-type"] == "image/x-made-up", "what the existing node found it to be"


async def test_standalone_takes_over_as_well(harness: Harness) -> None:
    harness.leave_behind()
    harness.import_config()
    for name in ("STATE_STORE__URL", "JOB_QUEUE__URL"):
        del harness.stack.environment[f"DISTRIBUTOR_{name}"]
    process = harness.stack.add("standalone")
    await process.healthy()
    await assert_all_hits(harness)
    await process.stop()
    process.start()
    await process.healthy()
    await assert_all_hits(harness)


async def test_eviction_honours_the_imported_popularity(harness: Harness) -> None:
    """The limit holds half of what was left behind: the least popular go."""
    harness.leave_behind()
    harness.import_config(limit=str(COUNT // 2 * (SIZE + 100 + 1024)))
    await harness.stack.up()

    def kept() -> set[int]:
        return {int(name) for name in harness.objects_in_volume()}

    def most_popular(count: int) -> set[int]:
        return set(range(COUNT - count + 1, COUNT + 1))

    # In the middle of a pass, several are removed at once.
    await eventually(lambda: len(kept()) <= COUNT // 2 and kept() == most_popular(len(kept())))
    assert len(kept()) > COUNT // 4


@pytest.mark.parametrize("state", ["torn", "missing"])
async def test_without_a_usable_cache_state_only_recency_is_lost(harness: Harness, state: str) -> None:
    harness.leave_behind(20)
    file = harness.state / "cache.json"
    if state == "torn":
        file.write_bytes(file.read_bytes()[:500])
    else:
        file.unlink()
    harness.import_config()
    await harness.stack.up()
    await assert_all_hits(harness)
    assert '"cache_state_unusable"' in harness.stack.logs()


async def test_an_import_killed_midway_continues_at_the_next_start(harness: Harness) -> None:
    harness.leave_behind()
    harness.import_config()
    evictor = harness.stack.add("evictor")
    await eventually(
        lambda: (harness.data / "objects").exists() and len(harness.objects_in_volume()) >= 5, pause=0.001
    )
    evictor.kill()
    harness.stack.processes.clear()
    await harness.stack.up()
    await assert_all_hits(harness)
    assert not harness.flat_files()


async def test_files_of_the_wrong_size_are_not_served(harness: Harness) -> None:
    harness.leave_behind(10)
    (harness.data / "3").write_bytes(b"cut short")
    (harness.data / "notes.txt").write_text("not an object")
    harness.import_config()
    await harness.stack.up()
    wrong = harness.objects[2]
    answer = await get(harness.stack.url("3"))
    assert_whole(answer, wrong)
    assert answer.headers["x-cache"] != "hit"
    assert (harness.data / "notes.txt").exists()
    for item in harness.objects[3:]:
        assert (await get(harness.stack.url(item.object_id))).headers["x-cache"] == "hit"


async def test_a_squid_that_is_down_at_first_costs_no_object(harness: Harness) -> None:
    harness.leave_behind(20)
    harness.import_config()
    await harness.squid.start_outage()
    evictor = harness.stack.add("evictor")
    await eventually(lambda: '"repair_deferred"' in evictor.log.read_text())
    assert len(harness.objects_in_volume()) == 20
    await harness.squid.end_outage()
    # A request in between is answered from what is there: the fetcher verifies it, and downloads nothing
    fetcher, api = harness.stack.add("fetcher"), harness.stack.add("api")
    await fetcher.healthy()
    # The API listens before it is ready, which waits for the takeover.
    await eventually(lambda: '"server_listening"' in api.log.read_text())

    async def is_hit() -> bool:
        return (await get(harness.stack.url("5"))).headers.get("x-cache") == "hit"

    await eventually(is_hit, pause=0.2)
    assert not re.search(r'"outcome": ?"fetched"', harness.stack.logs())
