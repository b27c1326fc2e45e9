"""Up and down between two versions on one volume, Redis and RabbitMQ: yesterday's writes, today's reads, and back."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from redis.asyncio import Redis

from distributor_node.services.demo.faults import Fault, Match
from distributor_node.services.demo.objects import MIB, generated_object
from distributor_node.shared.domain.formats import FORMAT
from tests.end_to_end.client import get
from tests.end_to_end.conftest import Harness
from tests.end_to_end.operator_client import OperatorClient
from tests.end_to_end.test_one_get import assert_whole
from tests.servers.redis_server import free_port

ROOT = Path(__file__).parents[2]
BEFORE_FORMATS = "e30b17de3a6de36453a71060f560029935960c9f"
"""The last version without format numbers; for as long as no release has a tag."""


def git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], check=True, cwd=ROOT, capture_output=True).stdout


def former_commit() -> str | None:
    """The newest release before this commit. None: its history is not here."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return None
    tags = git(
        "tag", "--list", "v[0-9]*", "--no-contains", "HEAD", "--merged", "HEAD", "--sort=-v:refname"
    ).split()
    found = tags[0].decode() if tags else BEFORE_FORMATS
    asked = subprocess.run(
        ["git", "cat-file", "-e", f"{found}^{{commit}}"], check=False, cwd=ROOT, capture_output=True
    )
    return found if asked.returncode == 0 else None


FORMER = former_commit()


@pytest.fixture
def former(tmp_path: Path) -> Path:
    assert FORMER is not None
    folder = tmp_path / "former"
    folder.mkdir()
    archive = git("archive", FORMER, "distributor_node", "services", "shared")
    subprocess.run(["tar", "--extract", "--directory", str(folder)], input=archive, check=True)
    return folder


@pytest.mark.slow
@pytest.mark.servers
@pytest.mark.skipif(FORMER is None, reason="needs git and the history of this checkout")
async def test_up_and_down_between_two_versions(harness: Harness, former: Path) -> None:
    """1. The former version fetches, pins, and is killed in the middle of a download.
    2. This one finishes that download, and has the rest as hits.
    3. The former one has all of it as hits."""
    stack, source = harness.stack, harness.first
    operator = OperatorClient(free_port())
    stack.environment |= operator.environment | {
        "DISTRIBUTOR_FETCH__LEASE": "3",
        "DISTRIBUTOR_FETCH__LEASE_RENEWAL": "1",
    }
    objects = {str(number): generated_object(str(number), MIB) for number in range(1, 6)}
    objects["9"] = generated_object("9", 8 * MIB)
    harness.publish(list(objects.values()))
    source.faults.add(Fault(bytes_per_second=2 * MIB), Match(object_id="9", method="GET", endpoint="files"))

    async def fetch(*object_ids: str) -> None:
        for object_id in object_ids:
            assert_whole(await get(stack.url(object_id)), objects[object_id])
            await stack.until_hit(object_id)

    async def all_hits(*object_ids: str) -> None:
        for object_id in object_ids:
            answer = await get(stack.url(object_id))
            assert_whole(answer, objects[object_id])
            assert answer.headers["x-cache"] == "hit"

    stack.release = former
    await stack.up()
    await fetch("1", "2", "3")
    await operator.command("pin", {"ids": ["2"]})
    etag = (await get(stack.url("1"), method="HEAD")).headers["etag"]
    assert (await get(stack.url("9"), method="HEAD")).headers["x-cache"] == "miss"
    part = await get(stack.url("9"), {"Range": "bytes=0-2097151"})
    assert (part.status, len(part.body)) == (206, 2 * MIB)
    stack.kill_all()

    source.faults.clear()
    stack.release = None
    await stack.up()
    await all_hits("1", "2", "3")
    assert (await get(stack.url("1"), method="HEAD")).headers["etag"] == etag
    assert (await operator.query("cache/2"))["pinned"]
    await fetch("9", "4")
    begun, *resumed = source.requests.of("9", "GET")
    assert "range" not in begun.headers
    assert any("range" in one.headers for one in resumed)
    server = Redis.from_url(stack.environment["DISTRIBUTOR_STATE_STORE__URL"])
    usage = f"{stack.environment['DISTRIBUTOR_STATE_STORE__PREFIX']}usage"
    assert await server.hget(usage, "format") == str(FORMAT).encode()
    await server.aclose()
    for process in stack.running():
        assert await process.stop() == 0, process.tail()

    stack.release = former
    await stack.up()
    await all_hits("1", "2", "3", "4", "9")
    assert (await operator.query("cache/2"))["pinned"]
    await fetch("5")
    stack.kill_all()
    assert {len(source.requests.of(object_id, "GET")) for object_id in "12345"} == {1}
    logs = stack.logs()
    for complaint in ("Traceback", "index_records_dropped", "object_damaged"):
        assert complaint not in logs


@pytest.mark.slow
@pytest.mark.servers
@pytest.mark.skipif(FORMER is None, reason="needs git and the history of this checkout")
@pytest.mark.parametrize("older", ["api", "fetcher", "evictor"])
async def test_two_versions_work_side_by_side(harness: Harness, former: Path, older: str) -> None:
    """During a rolling update jobs, claims and records of one version are another's."""
    stack, source = harness.stack, harness.first
    objects = [generated_object(str(number), 3 * MIB) for number in range(1, 4)]
    harness.publish(objects)
    for kind in ("evictor", "fetcher", "api"):
        stack.release = former if kind == older else None
        stack.add(kind)
    await stack.ready()
    for item in objects:
        first = await get(stack.url(item.object_id))
        assert_whole(first, item)
        assert (first.headers["x-cache"], first.headers["x-data-source"]) == ("miss", "local")
        await stack.until_hit(item.object_id)
        assert_whole(await get(stack.url(item.object_id)), item)
        assert len(source.requests.of(item.object_id, "GET")) == 1
    assert (await stack.status())["objectsInCache"] == len(objects)
    for process in stack.running():
        assert await process.stop() == 0, process.tail()
    assert "Traceback" not in stack.logs()
