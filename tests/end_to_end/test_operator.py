"""The operator API of a whole node with two API workers, on real Redis and RabbitMQ."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distributor_node.services.demo.faults import Fault, Match
from distributor_node.services.demo.objects import MIB, generated_object
from tests.end_to_end.client import get
from tests.end_to_end.conftest import Harness
from tests.end_to_end.operator_client import (
    OperatorClient,
    accepts_connections,
    refuses_connections,
)
from tests.servers.operator_token import sign
from tests.servers.redis_server import free_port
from tests.waiting import eventually


async def started(harness: Harness, *, workers: int = 2, **settings: str) -> OperatorClient:
    """A node with an operator; its storage limit leaves room for a few MiB of warming."""
    operator = OperatorClient(free_port())
    harness.stack.environment.update(operator.environment)
    harness.stack.environment.update(settings)
    await harness.stack.up(workers=workers)
    await eventually(lambda: all_listen(operator, workers))
    return operator


async def all_listen(operator: OperatorClient, workers: int) -> bool:
    """Whether every worker takes orders: each has a socket of its own at the port (SO_REUSEPORT)."""
    sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [
        local.endswith(f":{operator.port:04X}") and state == "0A" for _, local, _, state, *_ in sockets
    ].count(True) == workers


def worker_processes(harness: Harness) -> list[int]:
    """The API's workers: children of its supervisor."""
    [api] = harness.stack.of("api")
    assert api.process is not None
    children = Path(f"/proc/{api.process.pid}/task/{api.process.pid}/children").read_text()
    return [int(child) for child in children.split()]


async def all_gone(processes: Iterable[int]) -> bool:
    return not any(Path(f"/proc/{process}").exists() for process in processes)


async def killed_and_started_again(harness: Harness) -> None:
    """`kill -9` for the supervisor; its workers notice, and leave the port."""
    [api] = harness.stack.of("api")
    api.kill()
    await eventually(lambda: refuses_connections(harness.stack.port))
    api.start()
    await api.healthy()


async def buckets_everywhere(harness: Harness) -> set[str]:
    """What /buckets says on twenty connections: both workers are asked."""
    url = f"http://127.0.0.1:{harness.stack.port}/api/v1/buckets"
    return {json.dumps((await get(url)).json()) for _ in range(20)}


async def test_the_table_of_statuses(harness: Harness) -> None:
    harness.publish([generated_object("1", 1000)])
    operator = await started(harness)
    url = "/api/v1/stop-api"
    for name, token in {
        "forged": sign(url, secret="not-the-secret-of-this-node-at-all!"),
        "expired": sign(url, iat=1_700_000_000),
        "future": sign(url, iat=4_000_000_000),
        "wrong URL": sign("/api/v1/start-api"),
        "wrong body": sign(url, {"more": 1}),
        "garbage": "a.b.c",
    }.items():
        answer = await operator.ask("POST", "stop-api", token=token)
        assert (answer.status, answer.json()["type"]) == (401, "not_authorised"), name
    # A token used once is used up, whichever process is asked.
    used = sign("/api/v1/orders")
    statuses = [(await operator.ask("GET", "orders", token=used)).status for _ in range(12)]
    assert statuses == [200] + [401] * 11

    async def status(path: str, body: Any = None) -> int:
        return (await operator.ask("POST", path, body)).status

    assert await status("start-api") == 409
    assert await status("stop-api") == 200
    assert await status("stop-api") == 409
    assert await status("start-api") == 200
    malformed: dict[str, list[Any]] = {
        "stop-api": [{"now": True}, []],
        "set-worker": [{}, {"workerId": "7"}, {"workerId": -1}, {"workerId": True}],
        "set-buckets": [{"buckets": []}, {"buckets": ["x"]}, {"buckets": "0:1"}, 7],
        "drain": [{}, {"on": 1}],
        "pin": [{}, {"ids": []}, {"ids": ["../x"]}, {"ids": [1]}],
        "purge": [{}, {"all": False}, {"all": True, "ids": ["1"]}],
        "warm": [{}, {"bucket": "x"}],
    }
    for path, bodies in malformed.items():
        for body in bodies:
            assert await status(path, body) == 400, (path, body)
    assert (await operator.ask("GET", "cache?limit=0")).status == 400
    assert (await operator.ask("GET", "unknown")).status == 404
    assert "the-operators-secret" not in harness.stack.logs()
    assert "eyJ" not in harness.stack.logs()


async def test_stop_closes_the_public_port_in_all_workers_and_start_opens_it_again(harness: Harness) -> None:
    item = generated_object("1", 8 * MIB)
    harness.publish([item])
    operator = await started(harness)
    port = harness.stack.port
    await get(harness.stack.url("1"))
    await harness.stack.until_hit("1")
    # One answer is under way while the port is closed: it is sent to its end.
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=4096)
    writer.write(b"GET /api/v1/assets/1 HTTP/1.1\r\nHost: n\r\nConnection: close\r\n\r\n")
    head = await reader.readuntil(b"\r\n\r\n")
    assert b" 200 " in head
    await operator.command("stop-api")
    await eventually(lambda: refuses_connections(port))
    assert await reader.readexactly(item.size) == item.content.read(0, item.size)
    writer.close()
    # Killed workers come back, and stay closed.
    killed = worker_processes(harness)
    for process in killed:
        os.kill(process, signal.SIGKILL)
    await eventually(lambda: all_gone(killed))
    await eventually(lambda: all_listen(operator, 2))
    assert await refuses_connections(port)
    await operator.command("start-api")
    await eventually(lambda: accepts_connections(port))
    assert (await get(harness.stack.url("1"), method="HEAD")).headers["x-cache"] == "hit"
    assert len(harness.first.requests.of("1", "GET")) == 1


async def test_the_assignment_is_effective_in_every_process_and_survives_restarts(harness: Harness) -> None:
    harness.publish([generated_object("1", 1000)])
    operator = await started(harness)
    assert (await get(harness.stack.url("1"), method="HEAD")).status == 200

    async def moved() -> bool:
        return await buckets_everywhere(harness) == {'{"bucketIds": ["5:5"]}'}

    await operator.command("set-buckets", {"buckets": ["5:5"]})
    await eventually(moved)
    assert (await get(harness.stack.url("1"), method="HEAD")).status == 421
    assert (await operator.command("set-worker", {"workerId": 7}))["workerId"] == 7

    async def known() -> bool:
        return all([(await harness.stack.status()).get("workerId") == 7 for _ in range(10)])

    await eventually(known)
    await killed_and_started_again(harness)
    assert await moved()
    assert await known()
    [api] = harness.stack.of("api")
    assert await api.stop() == 0
    api.start()
    await api.healthy()
    assert await moved()
    await operator.command("set-buckets", {})

    async def by_worker() -> bool:
        return await buckets_everywhere(harness) == {'{"allByWorkerId": 7}'}

    await eventually(by_worker)


async def test_one_dead_worker_costs_nothing(harness: Harness) -> None:
    harness.publish([generated_object("1", 1000)])
    operator = await started(harness)
    victim = worker_processes(harness)[0]
    os.kill(victim, signal.SIGKILL)
    await eventually(lambda: all_gone([victim]))
    await operator.command("set-buckets", {"buckets": ["5:5"]})
    assert (await operator.query("orders"))["buckets"] == ["5:5"]


async def test_shutdown_ends_all_processes_with_code_0(harness: Harness) -> None:
    harness.publish([generated_object("1", 1000)])
    operator = await started(harness)
    workers = worker_processes(harness)
    assert (await operator.command("shutdown"))["shuttingDown"]
    [api] = harness.stack.of("api")
    assert api.process is not None
    assert await asyncio.to_thread(api.process.wait, 60) == 0
    assert not [process for process in workers if Path(f"/proc/{process}").exists()]
    # It is no lasting order: started again, it serves.
    api.start()
    await api.healthy()
    assert not (await operator.query("orders"))["shuttingDown"]


async def test_an_emptied_state_store_gets_the_operator_state_back(harness: Harness) -> None:
    harness.publish([generated_object("1", 1000)])
    operator = await started(harness)
    await operator.command("set-buckets", {"buckets": ["0:1", "5:5"]})
    await operator.command("pin", {"ids": ["1"]})

    async def kept() -> bool:
        file = harness.stack.volume / "operator.json"
        return file.exists() and bool(json.loads(file.read_text())["pinned"] == ["1"])

    await eventually(kept)
    await harness.empty_state_store()

    async def restored() -> bool:
        return bool((await operator.command("unpin", {"ids": ["9"]}))["pinned"] == 1)

    assert (await operator.query("orders"))["buckets"] == ["0:1", "5:5"]
    await eventually(restored)

    async def back_everywhere() -> bool:
        return await buckets_everywhere(harness) == {'{"bucketIds": ["0:1", "5:5"]}'}

    await eventually(back_everywhere)


async def test_purge_lets_readers_finish_and_objects_be_fetched_again(harness: Harness) -> None:
    item, other, slow = (generated_object(name, 8 * MIB) for name in "123")
    harness.publish([item, other, slow])
    operator = await started(harness)
    for name in "12":
        await get(harness.stack.url(name), keep_body=False)
        await harness.stack.until_hit(name)
    reader, writer = await asyncio.open_connection("127.0.0.1", harness.stack.port, limit=4096)
    writer.write(b"GET /api/v1/assets/1 HTTP/1.1\r\nHost: n\r\nConnection: close\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    harness.first.faults.add(Fault(bytes_per_second=6 * MIB), Match(object_id="3"))
    following = asyncio.create_task(get(harness.stack.url("3")))
    await harness.stack.until_on_volume(18 * MIB)
    await operator.command("pin", {"ids": ["2"]})
    assert (await operator.command("purge", {"all": True}))["purging"] == 3

    async def gone() -> bool:
        heads = [await get(harness.stack.url(name), method="HEAD") for name in "12"]
        return all(head.headers["x-cache"] != "hit" for head in heads)

    await eventually(gone)
    assert await reader.readexactly(item.size) == item.content.read(0, item.size)
    writer.close()
    # What was being fetched is sent to its end, and then leaves the cache too.
    assert (await following).body == slow.content.read(0, slow.size)

    async def emptied() -> bool:
        return (await operator.query("cache"))["total"] == 0 and harness.stack.bytes_on_volume() < MIB

    await eventually(emptied)
    harness.first.faults.clear()
    assert (await get(harness.stack.url("3"))).headers["x-cache"] == "miss"
    await harness.stack.until_hit("3")


async def test_warm_fetches_the_assignment_within_space_and_evicts_nothing(harness: Harness) -> None:
    items = [generated_object(str(number), 1 * MIB) for number in range(1, 13)]
    stranger = replace(generated_object("99", 1000), bucket="7:7")
    harness.publish([*items, stranger])
    operator = await started(
        harness, DISTRIBUTOR_STORAGE__LIMIT="10M", DISTRIBUTOR_BUCKETS='["0:1"]', workers=2
    )
    assert (await operator.query("warm"))["state"] == "none"
    await get(harness.stack.url("12"))
    await harness.stack.until_hit("12")
    await operator.command("warm", {"all": True})
    assert (await operator.ask("POST", "warm", {"all": True})).status in (409, 200)

    async def over() -> bool:
        return bool((await operator.query("warm"))["state"] == "finished")

    await eventually(over)
    warming = await operator.query("warm")
    # Low watermark 9 MiB, records included: 12 is there, seven more fit below it.
    assert (warming["total"], warming["failed"]) == (12, 0)
    assert 6 <= warming["done"] <= 8
    assert warming["done"] + warming["skipped"] == 12
    cached = await operator.query("cache?limit=100")
    assert cached["total"] == warming["done"] + 1
    assert "12" in {entry["id"] for entry in cached["objects"]}
    assert "99" not in {entry["id"] for entry in cached["objects"]}
    assert "object_evicted" not in harness.stack.logs()
    await operator.command("warm", {"ids": ["12", "nowhere", "99"]})
    await eventually(over)
    assert {**(await operator.query("warm")), "reason": ""} == {
        "state": "finished", "total": 3, "done": 0, "skipped": 3, "failed": 0, "reason": "",
        "skippedFor": {"stored": 1, "unknown": 1, "unassigned": 1},
        "notWarmed": [{"id": "nowhere", "reason": "unknown"}, {"id": "99", "reason": "unassigned"}],
    }  # fmt: skip


async def test_pinned_objects_are_not_evicted(harness: Harness) -> None:
    items = [generated_object(str(number), 1 * MIB) for number in range(1, 15)]
    harness.publish(items)
    operator = await started(harness, DISTRIBUTOR_STORAGE__LIMIT="8M", DISTRIBUTOR_EVICTOR__MIN_IDLE="1")
    for name in ("1", "2"):
        await get(harness.stack.url(name))
        await harness.stack.until_hit(name)
    assert await operator.command("pin", {"ids": ["1", "14", "1000"]}) == {
        "changed": 3,
        "pinned": 3,
        "objects": [
            {"id": "1", "path": None, "state": "stored", "changed": True},
            {"id": "14", "path": None, "state": "absent", "changed": True},
            {"id": "1000", "path": None, "state": "unknown", "changed": True},
        ],
    }
    await killed_and_started_again(harness)
    for number in range(3, 14):
        await get(harness.stack.url(str(number)))
        await harness.stack.until_hit(str(number))

    async def made_room() -> bool:
        return (await get(harness.stack.url("2"), method="HEAD")).headers["x-cache"] != "hit"

    await eventually(made_room)
    assert (await get(harness.stack.url("1"), method="HEAD")).headers["x-cache"] == "hit"
    cached = await operator.query("cache?limit=3")
    assert cached["pinned"] == 1
    assert cached["pinnedBytes"] == MIB
    listed = [entry["id"] for entry in cached["objects"]]
    while cached["next"]:
        cached = await operator.query(f"cache?limit=3&after={cached['next']}")
        listed += [entry["id"] for entry in cached["objects"]]
    assert listed == sorted(set(listed))
    assert len(listed) == cached["total"]
    unpinned = await operator.command("unpin", {"ids": ["1", "5"]})
    assert (unpinned["changed"], unpinned["pinned"]) == (1, 2)
    assert [one["changed"] for one in unpinned["objects"]] == [True, False]


async def test_drained_the_node_serves_hits_and_takes_no_fetches(harness: Harness) -> None:
    harness.publish([generated_object("1", 1000), generated_object("2", 1000)])
    operator = await started(harness)
    await get(harness.stack.url("1"))
    await harness.stack.until_hit("1")
    assert (await operator.command("drain", {"on": True}))["draining"]
    await asyncio.sleep(1.0)  # an order is in force everywhere within a second
    assert (await get(harness.stack.url("1"))).headers["x-cache"] == "hit"
    for _ in range(5):
        answer = await get(harness.stack.url("2"))
        assert (answer.status, answer.headers["x-data-source"]) == (200, "external")
    assert (await operator.query("downloads")) == {"downloads": []}
    assert (await get(harness.stack.url("2"), method="HEAD")).headers["x-cache"] == "miss"
    await operator.command("drain", {"on": False})
    await asyncio.sleep(1.0)
    await get(harness.stack.url("2"))
    await harness.stack.until_hit("2")


async def test_downloads_are_shown(harness: Harness) -> None:
    item = generated_object("1", 4 * MIB)
    harness.publish([item])
    operator = await started(harness)
    harness.first.faults.add(Fault(bytes_per_second=1 * MIB), Match(object_id="1"))
    following = asyncio.create_task(get(harness.stack.url("1")))

    async def growing() -> bool:
        shown = (await operator.query("downloads"))["downloads"]
        return bool(shown) and 0 < shown[0]["bytes"] < item.size and shown[0]["source"] is not None

    await eventually(growing)
    [shown] = (await operator.query("downloads"))["downloads"]
    assert (shown["id"], shown["phase"], shown["size"]) == ("1", "fetching", item.size)
    assert shown["source"] in harness.first.api_url
    assert (await following).complete


async def test_off_without_a_secret(harness: Harness) -> None:
    harness.publish([generated_object("1", 1000)])
    port = free_port()
    await harness.stack.up()
    with pytest.raises(ConnectionRefusedError):
        await OperatorClient(port).ask("GET", "orders")
