"""A long bag is listed within bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

COUNT, FIRST = 30_000, 1_000_000
MIB = 1024 * 1024
MAX_GROWN = 30 * MIB
"""Read in one page, the list takes 43 MB; in pages it takes 15, ids included."""

LIST = """
import asyncio, json, resource, sys
from distributor_node.shared.adapters.catalogs.joystream import JoystreamCatalog, SquidLimits
from distributor_node.shared.domain.objects import Assignment, ObjectId

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

async def main():
    catalog = JoystreamCatalog(sys.argv[1], SquidLimits(timeout=60, list_pause=0), refuse_private=False)
    await catalog.open()
    await catalog.look_up(ObjectId("1"))
    before, ids, largest = peak(), set(), 0
    async for batch in catalog.list_objects(Assignment(worker_id=7)):
        largest = max(largest, len(batch))
        ids.update(item.object_id for item in batch if int(item.object_id) >= int(sys.argv[2]))
    await catalog.close()
    print(json.dumps({"listed": len(ids), "largest": largest, "grown": peak() - before}))

asyncio.run(main())
"""


@pytest.fixture
def squid_url(tmp_path: Path) -> Iterator[str]:
    """A test squid with one bag of COUNT objects, whose worker's id is a BigInt."""
    command = [sys.executable, "-m", "distributor_node.services.demo.squid", "--port", "0", "--print-port"]
    command += ["--objects", str(COUNT), str(FIRST), "--bags", "1", "--worker", "7=0:1", "--bigint-worker"]
    command += ["--slow-status", "600", "--media", str(tmp_path)]
    with (tmp_path / "log").open("wb") as log:
        squid = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    assert squid.stdout is not None
    try:
        yield f"http://127.0.0.1:{squid.stdout.readline().split()[0]}/graphql"
    finally:
        squid.kill()
        squid.wait()
        squid.stdout.close()


def test_a_bag_of_many_objects_is_read_in_pages(squid_url: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIST, squid_url, str(FIRST)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["listed"] == COUNT
    assert found["largest"] <= 5000
    assert found["grown"] < MAX_GROWN
