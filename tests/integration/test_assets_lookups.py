"""Look-ups that cannot be made, or not now, as clients and operators see them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from distributor_node.services.api.health import HealthChecks
from distributor_node.services.api.status import UsageReader
from distributor_node.shared.adapters.state_common import StateTimeouts
from distributor_node.shared.adapters.state_redis import RedisStateStore
from distributor_node.shared.domain.objects import Assignment, ObjectId
from distributor_node.shared.observability.probe_server import Readiness
from tests.integration.assets_harness import KIB, AssetsHarness, assets_harness
from tests.servers.redis_server import RedisServer


async def readiness(node: AssetsHarness) -> Readiness:
    return await HealthChecks(node.context, UsageReader(node.context), lambda: True).readiness()


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_an_id_that_the_catalog_cannot_have_is_400_without_a_query(tmp_path: Path, method: str) -> None:
    async with assets_harness(tmp_path) as node:
        node.catalog.impossible.add("xyzzy")
        answer = await node.get("xyzzy", method=method)
        assert (answer.status, node.catalog.asked) == (400, 0)
        if method == "GET":
            assert answer.json()["type"] == "malformed_id"
        assert answer.headers["cache-control"] == "no-store"


async def test_a_refused_lookup_is_503_and_makes_the_node_degraded(tmp_path: Path) -> None:
    async with assets_harness(tmp_path) as node:
        node.catalog.refuse = True
        answer = await node.get("1")
        assert (answer.status, answer.json()["type"]) == (503, "lookup_refused")
        assert answer.headers["retry-after"] == "2"
        ready = await readiness(node)
        assert ready.problems == ()
        assert "look-ups: some are refused, too many wait for the catalog" in ready.degraded


async def test_jobs_that_no_fetcher_takes_make_the_node_degraded(tmp_path: Path) -> None:
    async with assets_harness(tmp_path, first_byte_wait=0.2) as node:
        await node.context.fetch_capacity.refresh()  # a fetcher seems to be alive, with free slots
        node.add("1", KIB)
        assert not (await readiness(node)).degraded
        await asyncio.sleep(0.1)  # its heartbeat is older than the request
        assert (await node.get("1")).headers["x-data-source"] == "external"
        assert (await readiness(node)).degraded == ("job queue: not consumed",)
        node.context.fetch_capacity.record_begun(ObjectId("1"))
        assert not (await readiness(node)).degraded


@pytest.mark.servers
async def test_a_redis_that_became_a_read_only_replica_makes_the_node_degraded(
    tmp_path: Path, own_redis: RedisServer
) -> None:
    store = RedisStateStore(own_redis.url, "test:", 10**6, StateTimeouts(operation_timeout=5.0))
    async with assets_harness(tmp_path / "node", store=store) as node:
        assert not (await readiness(node)).degraded
        assert await own_redis.command("REPLICAOF", "127.0.0.1", "1") == "+OK"
        ready = await readiness(node)
        assert ready.problems == ()
        assert [text for text in ready.degraded if "writes are refused" in text]
        assert await own_redis.command("REPLICAOF", "NO", "ONE") == "+OK"
        assert not (await readiness(node)).degraded


async def test_an_unreachable_catalog_is_no_refusal(tmp_path: Path) -> None:
    async with assets_harness(tmp_path) as node:
        node.catalog.down = True
        answer = await node.get("1")
        assert (answer.status, answer.json()["type"]) == (503, "catalog_unavailable")
        assert not [text for text in (await readiness(node)).degraded if text.startswith("look-ups")]


@pytest.mark.parametrize(("trusted", "client"), [((), "127.0.0.1"), (("127.0.0.0/8",), "203.0.113.5")])
async def test_the_catalog_is_asked_in_the_name_of_the_client(
    tmp_path: Path, trusted: tuple[str, ...], client: str
) -> None:
    async with assets_harness(tmp_path, trusted_proxies=trusted) as node:
        node.add("1", KIB)
        forwarded = {"X-Forwarded-For": "6.6.6.6, 203.0.113.5"}
        assert (await node.get("1", forwarded, method="HEAD")).status == 200
        assert node.catalog.clients == [client]


async def test_a_squid_that_refuses_the_question_for_our_worker_makes_the_node_degraded(
    tmp_path: Path,
) -> None:
    message = "catalog: does not support a query that the node needs"
    async with assets_harness(tmp_path) as node:
        node.catalog.rejected_workers.add(7)
        assert message not in (await readiness(node)).degraded
        node.context.assignment.current = Assignment(worker_id=7)
        ready = await readiness(node)
        assert message in ready.degraded
        assert ready.problems == (), "hits are served"
        node.context.assignment.current = Assignment(frozenset({"0:1"}), 7)
        assert message not in (await readiness(node)).degraded, "the buckets decide"


async def test_failed_lookups_make_the_node_degraded_where_nothing_else_is_asked(tmp_path: Path) -> None:
    async with assets_harness(tmp_path) as node:
        node.catalog.fails = True
        ready = await readiness(node)
        assert "catalog: the last look-ups failed" in ready.degraded
        assert ready.problems == (), "hits are served"
        node.catalog.fails = False
        assert "catalog: the last look-ups failed" not in (await readiness(node)).degraded
