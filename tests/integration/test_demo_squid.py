"""The test squid: over HTTP, and as a process."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from distributor_node.services.demo.objects import bytes_object
from distributor_node.services.demo.squid import SquidFaults, TestSquid
from tests.waiting import eventually

ROOT = Path(__file__).parents[2]
QUESTION = {
    "operationName": "Q",
    "query": 'query Q { storageDataObjectById(id: "1") { size storageBag { id objects { id } } } }',
}


async def ask(client: httpx.AsyncClient, url: str, question: dict[str, Any]) -> Any:
    return (await client.post(url, json=question)).json()


async def test_queries_are_answered_and_logged() -> None:
    async with TestSquid([bytes_object("1", b"abc")]).run() as squid, httpx.AsyncClient() as client:
        answer = await ask(client, squid.url, QUESTION | {"variables": {"a": 1}})
        bag = {"id": "dynamic:channel:0010", "objects": [{"id": "1"}]}
        assert answer == {"data": {"storageDataObjectById": {"size": "3", "storageBag": bag}}}
        told = (await client.get(squid.url.replace("/graphql", "/requests"))).json()
        assert [(record["operation"], record["variables"]) for record in told["requests"]] == [
            ("Q", {"a": 1})
        ]
        assert (told["inFlight"], told["maxInFlight"]) == (0, 1)


@pytest.mark.parametrize("text", ["query Q { nonsense }", "query Q {", ""])
async def test_an_invalid_query_is_an_error_in_a_200_response(text: str) -> None:
    async with TestSquid([]).run() as squid, httpx.AsyncClient() as client:
        answer = await client.post(squid.url, json={"operationName": "Q", "query": text})
        assert (answer.status_code, list(answer.json())) == (200, ["errors"])


async def test_an_outage_fault_ends_by_itself() -> None:
    async with TestSquid([bytes_object("1", b"abc")]).run() as squid, httpx.AsyncClient() as client:
        faults = squid.url.replace("/graphql", "/faults")
        assert (await client.put(faults, json={"outage_seconds": 2})).json()["outage_seconds"] == 2

        async def answers() -> bool:
            try:
                told = await ask(client, squid.url, QUESTION)
            except httpx.TransportError:
                return False
            return bool(told["data"]["storageDataObjectById"]["size"] == "3")

        async def is_down() -> bool:
            return not await answers()

        await eventually(is_down)
        await eventually(answers)


async def test_faults_apply_to_the_named_operations_and_spare_the_first() -> None:
    async with TestSquid([bytes_object("1", b"abc")]).run() as squid, httpx.AsyncClient() as client:
        squid.faults = SquidFaults(status=500, operations=("Q",), spare=1)
        other = QUESTION | {"operationName": "R", "query": "query R { squidVersion { version } }"}
        statuses = [
            (await client.post(squid.url, json=question)).status_code
            for question in (other, QUESTION, QUESTION, other)
        ]
        assert statuses == [200, 200, 500, 200]


async def test_the_squid_as_a_process() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "distributor_node.services.demo.squid",
        *("--port", "0", "--worker", "7=0:1", "--node", "http://127.0.0.1:3390", "--print-port"),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(60):
            port, chain_port = (await process.stdout.readline()).split()
        async with httpx.AsyncClient() as client:
            url = f"http://127.0.0.1:{int(port)}/graphql"
            question = {
                "operationName": "B",
                "query": "query B { distributionBuckets { id operators { workerId } } }",
            }
            answer = await ask(client, url, question)
            assert {"id": "0:1", "operators": [{"workerId": 7}, {"workerId": 990}]} in answer["data"][
                "distributionBuckets"
            ]
            call = {"jsonrpc": "2.0", "id": 1, "method": "chain_getHeader", "params": []}
            header = await ask(client, url.replace("/graphql", "/chain"), call)
            assert int(header["result"]["number"], 16) == 1_000_002
        assert int(chain_port) > 0
        process.terminate()
        async with asyncio.timeout(60):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
