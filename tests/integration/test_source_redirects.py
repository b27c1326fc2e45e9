"""Redirects of storage nodes and origins: followed, each hop checked like an endpoint, and only so many."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from distributor_node.services.demo.faults import Fault, Match
from distributor_node.services.demo.objects import bytes_object
from distributor_node.services.demo.storage_node import StorageNode
from distributor_node.shared.adapters.sources import SourceClient, SourceLimits, SourceObservation
from distributor_node.shared.adapters.sources.health import SourceHealthRegistry, SourceProber
from distributor_node.shared.domain.conditionals import ByteRange
from distributor_node.shared.domain.errors import SourceError, SourceUnreachable, SourceWrong
from distributor_node.shared.domain.objects import source_name

DATA = bytes(range(256)) * 20


@pytest.fixture
async def nodes() -> AsyncIterator[list[StorageNode]]:
    """The second holds the object; the first is to redirect to it."""
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(StorageNode([bytes_object("1", b"other")]).run())
        second = await stack.enter_async_context(StorageNode([bytes_object("1", DATA)]).run())
        yield [first, second]


async def read(url: str, byte_range: ByteRange | None = None, limits: SourceLimits | None = None) -> bytes:
    async with SourceClient(limits or SourceLimits()) as client, client.get(url, byte_range) as response:
        return b"".join([chunk async for chunk in response.chunks])


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_followed(nodes: list[StorageNode], status: int) -> None:
    first, second = nodes
    first.faults.add(Fault(redirect_to=f"{second.object_url('1')}?signature=a%2Fb", status=status))
    assert await read(first.object_url("1")) == DATA
    assert await read(first.object_url("1"), ByteRange(10, 19)) == DATA[10:20]
    assert second.requests[0].path.endswith("?signature=a%2Fb")
    assert second.requests[1].range == "bytes=10-19"


async def test_a_relative_redirect_and_a_fragment(nodes: list[StorageNode]) -> None:
    second = nodes[1]
    second.faults.add(Fault(redirect_to="/api/v1/files/1#top"), Match(object_id="77"))
    assert await read(second.object_url("77")) == DATA


async def test_five_hops_and_no_more(nodes: list[StorageNode]) -> None:
    node = nodes[1]
    for hop in range(10, 15):
        target = "1" if hop == 14 else str(hop + 1)
        node.faults.add(Fault(redirect_to=node.object_url(target)), Match(object_id=str(hop)))
    assert await read(node.object_url("10")) == DATA
    node.faults.add(Fault(redirect_to=node.object_url("10")), Match(object_id="9"))
    with pytest.raises(SourceWrong, match="redirected more than 5 times"):
        await read(node.object_url("9"))


@pytest.mark.parametrize(
    "target",
    ["", "file:///etc/passwd", "http://user:password@127.0.0.1/", "ftp://127.0.0.1/1", "http://[/"],
)
async def test_a_redirect_to_what_is_no_endpoint(nodes: list[StorageNode], target: str) -> None:
    nodes[0].faults.add(Fault(redirect_to=target))
    with pytest.raises(SourceWrong, match="redirect not followed"):
        await read(nodes[0].object_url("1"))


async def test_each_hops_address_is_checked(nodes: list[StorageNode]) -> None:
    """The first hop is refused already: the second would be in the same way."""
    nodes[0].faults.add(Fault(redirect_to=nodes[1].object_url("1")))
    with pytest.raises(SourceUnreachable):
        await read(nodes[0].object_url("1"), limits=SourceLimits(refuse_private=True))
    assert not nodes[1].requests


async def test_other_hosts_can_be_forbidden(nodes: list[StorageNode]) -> None:
    first, second = nodes
    limits = SourceLimits(follow_to_other_hosts=False)
    first.faults.add(Fault(redirect_to=second.object_url("1").replace("127.0.0.1", "localhost")))
    with pytest.raises(SourceError, match="same host"):
        await read(first.object_url("1"), limits=limits)
    second.faults.add(Fault(redirect_to=second.object_url("1")), Match(object_id="2"))
    assert await read(second.object_url("2"), limits=limits) == DATA


async def test_metrics_name_the_host_that_was_asked_first(nodes: list[StorageNode]) -> None:
    first, second = nodes
    seen: list[SourceObservation] = []
    first.faults.add(Fault(redirect_to=second.object_url("1")))
    async with (
        SourceClient(SourceLimits(), seen.append) as client,
        client.get(first.object_url("1")) as response,
    ):
        assert b"".join([chunk async for chunk in response.chunks]) == DATA
    assert [observation.source for observation in seen] == [source_name(first.url)]


async def test_probes_follow_too(nodes: list[StorageNode]) -> None:
    first, second = nodes
    first.faults.add(Fault(redirect_to=f"{second.api_url}/version"))
    second.faults.add(Fault(latency_before_headers=0.05))
    registry = SourceHealthRegistry()
    prober = SourceProber(registry, timeout=2, concurrency=2)
    await prober.open()
    await prober.probe_all([f"{first.api_url}/"])
    await prober.close()
    assert len(second.requests) == 1
    assert registry.health_of(source_name(first.url)).first_bytes[0] >= 0.05
