"""The console command against a standalone node: the volume keeps the operator state."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from distributor_node.services.demo.objects import MIB, generated_object
from tests.end_to_end.client import get
from tests.end_to_end.conftest import Harness
from tests.end_to_end.operator_client import OperatorClient, command, refuses_connections
from tests.end_to_end.stack import ServiceProcess
from tests.servers.operator_token import SECRET
from tests.servers.redis_server import free_port
from tests.waiting import eventually


@pytest.fixture
def operated(alone: Harness) -> tuple[Harness, OperatorClient]:
    """A standalone node to be, and the client of its operator API."""
    operator = OperatorClient(free_port())
    alone.stack.environment.update(operator.environment)
    return alone, operator


async def ordered(operator: OperatorClient, *arguments: str) -> Any:
    done = await command(operator, *arguments)
    assert done.returncode == 0, done
    return json.loads(done.stdout)


async def kept(harness: Harness, says: Sequence[str]) -> None:
    """Until the copy on the volume says all of this."""

    async def written() -> bool:
        file = harness.stack.volume / "operator.json"
        return file.exists() and all(text in file.read_text() for text in says)

    await eventually(written)


async def again(node: ServiceProcess) -> None:
    node.kill()
    node.start()
    await node.healthy()


async def test_operator_state_survives_sigkill(operated: tuple[Harness, OperatorClient]) -> None:
    harness, operator = operated
    harness.publish([generated_object("1", 1000)])
    node = harness.stack.add("standalone")
    await node.healthy()
    refused = await command(operator, "set-buckets", "0:1", "5:5")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == (
        "distributor: 409 buckets: expected buckets of the catalog (0:1), got 5:5. --force sets it all the same\n"
    )
    assert (await ordered(operator, "set-buckets", "0:1"))["checked"]
    assert (await ordered(operator, "reset-assignment"))["buckets"] is None
    forced = await ordered(operator, "set-buckets", "5:5", "6:6", "--force")
    assert forced["buckets"] == ["5:5", "6:6"]
    assert (await ordered(operator, "set-worker", "7", "--force"))["workerId"] == 7
    assert (await ordered(operator, "pin", "1", "2"))["pinned"] == 2
    await kept(harness, ['"worker_id": 7', '"2"'])
    await again(node)
    assert (await get(harness.stack.url("1"), method="HEAD")).status == 421
    assert (await ordered(operator, "orders"))["workerId"] == 7
    assert (await ordered(operator, "unpin", "1"))["pinned"] == 1
    await ordered(operator, "stop-api")
    await eventually(lambda: refuses_connections(harness.stack.port))
    await kept(harness, ['"stopped": true'])
    node.kill()
    node.start()

    async def answers() -> bool:
        return (await command(operator, "orders")).returncode == 0

    await eventually(answers)
    assert await refuses_connections(harness.stack.port)
    # A liveness probe must not end a node that was stopped on purpose: it could never be started again
    assert (await get(f"{node.health_url}/healthz")).status == 200
    readiness = await get(f"{node.health_url}/readyz")
    assert (readiness.status, readiness.json()["problems"]) == (503, ["stopped by an operator"])
    await ordered(operator, "start-api")
    await node.healthy()
    assert (await command(operator, "start-api")).stderr == (
        "distributor: 409 The public API is already running\n"
    )
    assert (await ordered(operator, "shutdown"))["shuttingDown"]
    assert node.process is not None
    assert await asyncio.to_thread(node.process.wait, 60) == 0


async def test_warm_with_a_progress_bar_then_list_and_purge(operated: tuple[Harness, OperatorClient]) -> None:
    harness, operator = operated
    items = [generated_object(str(number), MIB) for number in range(1, 6)]
    harness.publish(items)
    await harness.stack.add("standalone").healthy()
    done = await command(operator, "warm", "--all")
    assert done.returncode == 0, done
    assert "5 done" in done.stderr
    assert json.loads(done.stdout)["state"] == "finished"
    listing = await command(operator, "cache", "--limit", "2")
    entries = [json.loads(line) for line in listing.stdout.splitlines()]
    assert [entry["id"] for entry in entries] == ["1", "2", "3", "4", "5"]
    assert {entry["size"] for entry in entries} == {MIB}
    explained = await ordered(operator, "explain", "3")
    assert (explained["id"], explained["state"], explained["size"]) == ("3", "stored", MIB)
    assert (await ordered(operator, "explain", "nowhere"))["state"] == "unknown"
    refused = await command(operator, "explain", "../3")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith(
        "distributor: malformed object id: expected no control characters and no dot"
    )
    done = await command(operator, "purge", "-", stdin="1\n2\n\n")
    stored = [{"id": name, "path": None, "state": "stored"} for name in ("1", "2")]
    assert json.loads(done.stdout) == {"purging": 2, "objects": stored}

    async def purged() -> bool:
        return len((await command(operator, "cache")).stdout.splitlines()) == 3

    await eventually(purged)
    assert (await ordered(operator, "warm", "1", "3", "--no-wait"))["state"] == "waiting"
    done = await command(operator, "warming")
    assert json.loads(done.stdout) | {"reason": ""} == {
        "state": "finished", "total": 2, "done": 1, "skipped": 1, "failed": 0, "reason": "",
        "skippedFor": {"stored": 1}, "notWarmed": [],
    }  # fmt: skip
    assert (await ordered(operator, "purge", "--all"))["purging"] == 4
    assert (await ordered(operator, "drain"))["draining"]
    assert not (await ordered(operator, "drain", "--off"))["draining"]
    assert (await command(operator, "downloads")).stdout == ""


async def test_errors_are_reported_in_words(operated: tuple[Harness, OperatorClient], tmp_path: Path) -> None:
    harness, operator = operated
    harness.publish([generated_object("1", 1000)])
    stopped = await command(operator, "orders")
    assert (stopped.returncode, stopped.stdout) == (1, "")
    assert "cannot be reached" in stopped.stderr
    await harness.stack.add("standalone").healthy()
    wrong = await command(operator, "orders", DISTRIBUTOR_OPERATOR_API__SECRET="x" * 32)
    assert (wrong.returncode, wrong.stderr) == (1, "distributor: 401 Not authorised\n")
    none = await command(operator, "orders", DISTRIBUTOR_OPERATOR_API__SECRET="")
    assert none.returncode == 2
    assert "no secret" in none.stderr
    file = tmp_path / "secret"
    file.write_text(SECRET + "\n")
    right = await command(operator, "--secret-file", str(file), "orders", DISTRIBUTOR_OPERATOR_API__SECRET="")
    assert right.returncode == 0
    assert SECRET not in harness.stack.logs()
