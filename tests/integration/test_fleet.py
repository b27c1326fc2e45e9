"""Three standalone nodes in one process that act as one cache, and peers that are scripted storage nodes."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import yaml

from distributor_node.services.demo.faults import Fault, Match
from distributor_node.services.demo.objects import MIB, DemoObject, generated_object
from distributor_node.services.demo.storage_node import StorageNode
from distributor_node.shared.domain.peers import Ring, sign_hop
from distributor_node.shared.observability.metrics import counted_here
from tests.counters import counted
from tests.end_to_end.client import Answer, get
from tests.integration.fleet_harness import PATIENT, Fleet, as_peer, fleet_of, is_whole, start_all
from tests.preloaded import run_preloaded
from tests.servers.operator_token import SECRET
from tests.servers.redis_server import free_port
from tests.servers.tcp_relay import TcpRelay
from tests.waiting import eventually


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    """Three nodes, not started."""
    async with fleet_of(3, tmp_path) as made:
        yield made


async def test_first_requests_at_all_nodes_are_one_download(fleet: Fleet) -> None:
    """The far source is slower to begin than a peer's time for its first byte: the home says that it is fetching."""
    item = generated_object("1", 6 * MIB)
    fleet.publish(item)
    fleet.far.faults.add(Fault(latency_before_headers=1.0))
    await start_all(fleet, first_byte_wait=0.7)
    answers = await asyncio.gather(*(fleet.get(base, "1") for base in fleet.bases for _ in range(8)))
    assert all(is_whole(answer, item) for answer in answers)
    assert fleet.far_gets("1") == 1


async def test_a_large_object_is_kept_by_its_home_alone_until_it_is_hot(fleet: Fleet) -> None:
    item = fleet.homed_at(fleet.bases[0], 3 * MIB)
    fleet.publish(item)
    await start_all(fleet, hot_views=2.5)
    home, other, third = fleet.in_order(item.object_id)
    first = await fleet.get(other, item.object_id)
    assert is_whole(first, item)
    assert first.headers["x-data-source"] == "external"
    await eventually(lambda: fleet.stored(home, item.object_id))
    assert is_whole(await fleet.get(other, item.object_id), item)
    assert not fleet.stored(other, item.object_id)
    assert is_whole(await fleet.get(other, item.object_id), item)  # the third view
    await eventually(lambda: fleet.stored(other, item.object_id))
    assert not fleet.stored(third, item.object_id)
    assert fleet.far_gets(item.object_id) == 1


async def test_a_small_object_is_kept_by_each_node_that_serves_it(fleet: Fleet) -> None:
    item = fleet.homed_at(fleet.bases[0], 300_000)
    fleet.publish(item)
    await start_all(fleet, keep_below=MIB)
    for base in fleet.bases[1:]:
        assert is_whole(await fleet.get(base, item.object_id), item)
    for base in fleet.bases:
        await eventually(lambda base=base: fleet.stored(base, item.object_id))  # type: ignore[misc]
    assert fleet.far_gets(item.object_id) == 1


async def test_ranges_of_an_object_that_is_passed_on(fleet: Fleet) -> None:
    item = fleet.homed_at(fleet.bases[0], 9 * MIB)
    fleet.publish(item)
    await start_all(fleet, hot_views=1000)
    assert is_whole(await fleet.get(fleet.bases[0], item.object_id), item)
    await eventually(lambda: fleet.stored(fleet.bases[0], item.object_id))
    for first, last in ((0, 0), (5, 99_999), (4 * MIB, 9 * MIB - 1), (9 * MIB - 70_000, 9 * MIB - 1)):
        answer = await fleet.get(fleet.bases[1], item.object_id, Range=f"bytes={first}-{last}")
        assert (answer.status, answer.complete) == (206, True)
        assert answer.body == item.content.read(first, last - first + 1)
        assert answer.headers["content-range"] == f"bytes {first}-{last}/{item.size}"
    assert fleet.far_gets(item.object_id) == 1


async def test_without_its_home_an_object_comes_from_a_second_home_or_the_source(fleet: Fleet) -> None:
    item = fleet.homed_at(fleet.bases[0], 2 * MIB)
    kept = fleet.homed_at(fleet.bases[0], 2 * MIB, range(1000, 2000))
    fleet.publish(item, kept)
    await start_all(fleet, hot_views=1, probe_interval=3600, handover=0)
    home, second, third = fleet.in_order(kept.object_id)
    assert is_whole(await fleet.get(second, kept.object_id), kept)
    await eventually(lambda: fleet.stored(second, kept.object_id))
    await fleet.stop(home)
    assert is_whole(await fleet.get(third, kept.object_id), kept)
    assert fleet.far_gets(kept.object_id) == 1
    assert is_whole(await fleet.get(fleet.in_order(item.object_id)[1], item.object_id), item)
    assert fleet.far_gets(item.object_id) == 1


COPIES: dict[str, Any] = {"copies": 2, "copy_after": 0, "hot_views": 1000}


async def test_a_second_home_keeps_a_copy_and_serves_it_while_the_home_is_away(fleet: Fleet) -> None:
    item = fleet.homed_at(fleet.bases[0], 2 * MIB)
    fleet.publish(item)
    await start_all(fleet, **COPIES, probe_interval=3600, handover=0)
    home, second, third = fleet.in_order(item.object_id)
    assert is_whole(await fleet.get(third, item.object_id), item)
    await eventually(lambda: fleet.stored(home, item.object_id))

    async def copied() -> bool:
        assert is_whole(await fleet.get(third, item.object_id), item)  # a view; the home counts it
        await asyncio.sleep(0.2)
        return fleet.stored(second, item.object_id)

    await eventually(copied)
    assert not fleet.stored(third, item.object_id)
    await fleet.stop(home)
    assert is_whole(await fleet.get(third, item.object_id), item)
    assert (await fleet.get(second, item.object_id)).headers["x-cache"] == "hit"
    assert fleet.far_gets(item.object_id) == 1


async def test_a_second_copy_never_comes_from_the_source(fleet: Fleet) -> None:
    item = fleet.homed_at(fleet.bases[0], 2 * MIB)
    fleet.publish(item)
    await start_all(fleet, **COPIES)
    _, second, third = fleet.in_order(item.object_id)
    offer = {"X-Distributor-Hop": "copy", "Cache-Control": "only-if-cached", "Range": "bytes=0-0"}
    for base in (second, third):
        assert (await fleet.hop(base, item.object_id, **offer))[0] == 504  # the home has nothing to copy
    await asyncio.sleep(1)
    assert fleet.far_gets(item.object_id) == 0
    # A request during the copy or after it is answered as if there had been no offer.
    assert is_whole(await fleet.get(second, item.object_id), item)
    assert fleet.far_gets(item.object_id) == 1
    assert not fleet.stored(third, item.object_id)


async def test_wrong_bytes_of_the_home_are_not_copied(fleet: Fleet) -> None:
    liar, item = await beside_a_liar(fleet, Fault(flip_byte_at=10), 1000, copies=2)
    offer = {"X-Distributor-Hop": "copy", "Cache-Control": "only-if-cached", "Range": "bytes=0-0"}
    assert (await fleet.hop(fleet.bases[0], item.object_id, **offer))[0] == 504
    await eventually(lambda: len(liar.requests) > 0)
    await asyncio.sleep(1)
    assert not fleet.stored(fleet.bases[0], item.object_id)
    assert fleet.far_gets(item.object_id) == 0
    assert is_whole(await fleet.get(fleet.bases[0], item.object_id), item)


async def test_a_release_without_copies_is_asked_for_one_byte_that_it_has(fleet: Fleet) -> None:
    """It takes the offer for a request of a peer. So an offer must not make it fetch, nor send much."""
    former = await fleet.stack.enter_async_context(StorageNode([]).run())
    own, other = fleet.bases[0], await fleet.stack.enter_async_context(as_peer(former))
    fleet.bases = [own, other]
    item = fleet.homed_at(own, 2 * MIB)
    fleet.publish(item)
    former.objects.update({item.object_id: item})
    await fleet.start(own, probe_interval=3600, handover=0, **COPIES)

    async def offered() -> bool:
        assert is_whole(await fleet.get(own, item.object_id), item)
        return len(former.requests.of(item.object_id, "GET")) > 0

    await eventually(offered)
    (request,) = former.requests.of(item.object_id, "GET")
    assert request.range == "bytes=0-0"


async def test_nodes_two_of_which_do_not_see_each_other_serve_from_each_side(fleet: Fleet) -> None:
    """The first and the third see the second alone, as after their probes of each other failed. It sees both."""
    first, second, third = fleet.bases
    items = [
        fleet.homed_at(base, 300_000, range(begin, 9000))
        for base in fleet.bases
        for begin in range(0, 4000, 1000)
    ]
    fleet.publish(*items)
    fleet.far.faults.add(Fault(latency_before_headers=0.2))
    # Longer than the test accepts: that a fetch is given up for its silence must not be what ends the wait.
    long = 90.0
    fleet.waits = {
        "public_api": {"first_byte_wait": long, "proxied_first_byte_wait": long},
        "fetch": {"first_byte_timeout": long},
    }
    for base, members in ((first, [first, second]), (second, fleet.bases), (third, [second, third])):
        await fleet.start(base, members, probe_interval=3600, first_byte_wait=long)
    for item in items:
        answers = await asyncio.gather(*(fleet.get(base, item.object_id) for base in fleet.bases * 2))
        assert all(is_whole(answer, item) for answer in answers)
        assert max(answer.took for answer in answers) < long / 2
    # Each of two nodes may take itself for the home, and the one between them a third time for a peer.
    assert max(fleet.far_gets(item.object_id) for item in items) <= 3
    asked = len(fleet.far.requests)
    for item in items:  # what was fetched is found again
        for base in fleet.bases:
            assert is_whole(await fleet.get(base, item.object_id), item)
    assert len(fleet.far.requests) - asked <= len(items)


async def test_probes_move_the_objects_of_a_lost_node_to_one_new_home_and_back(fleet: Fleet) -> None:
    item = fleet.homed_at(fleet.bases[0], 2 * MIB)
    fleet.publish(item)
    home, second, third = fleet.in_order(item.object_id)
    await fleet.start(second, probe_interval=0.2)
    await fleet.start(third, probe_interval=0.2)

    async def alive(base: str) -> list[str]:
        status = (await get(f"{base}/api/v1/status")).json()
        assert len(status["peers"]["known"]) == 2
        return list(status["peers"]["alive"])

    async def without_home() -> bool:
        return await alive(second) == [third] and await alive(third) == [second]

    await eventually(without_home)
    answers = await asyncio.gather(*(fleet.get(base, item.object_id) for base in (second, third) * 3))
    assert all(is_whole(answer, item) for answer in answers)
    assert fleet.far_gets(item.object_id) == 1
    await eventually(lambda: fleet.stored(second, item.object_id))
    await fleet.start(home, probe_interval=0.2)

    async def with_home() -> bool:
        return len(await alive(second)) == len(await alive(third)) == 2

    await eventually(with_home)
    assert is_whole(await fleet.get(home, item.object_id), item)
    await eventually(lambda: fleet.stored(home, item.object_id))
    assert (
        fleet.far_gets(item.object_id) == 1
    )  # the second in rank was asked for what it had fetched while the first was away


async def test_a_new_node_takes_its_objects_from_those_that_had_them(fleet: Fleet) -> None:
    old, new = fleet.bases[:2], fleet.bases[2]
    moved = [
        generated_object(str(number), 200_000)
        for number in range(60)
        if fleet.in_order(str(number))[0] == new
    ]
    fleet.publish(*moved)
    for base in old:
        await fleet.start(base, old)
    for item in moved:
        await asyncio.gather(*(fleet.get(base, item.object_id) for base in old))
        await eventually(lambda item=item: any(fleet.stored(base, item.object_id) for base in old))  # type: ignore[misc]
    for base in old:
        await fleet.stop(base)
    await start_all(fleet)
    for item in moved:
        # One of them has it still. The other asks the new node, which asks the one that has it.
        answers = [await fleet.get(base, item.object_id) for base in old]
        assert all(is_whole(answer, item) for answer in answers)
        assert sorted(answer.headers["x-cache"] for answer in answers) == ["hit", "miss"]
        await eventually(lambda item=item: fleet.stored(new, item.object_id))  # type: ignore[misc]
    assert sum(fleet.far_gets(item.object_id) for item in moved) == len(moved)


async def test_nodes_that_take_each_other_for_the_home_do_not_wait_for_each_other(fleet: Fleet) -> None:
    """Each lists itself and the other under an address of its own: they disagree about the home of many objects."""
    first, second = fleet.bases[:2]
    relays = {base: base.replace("127.0.0.1", "localhost") for base in (first, second)}
    views = {first: (first, relays[second]), second: (second, relays[first])}
    mutual = [
        generated_object(str(number), MIB)
        for number in range(400)
        if all(Ring(dict.fromkeys(view, 1.0)).home(str(number)) != own for own, view in views.items())
    ][:8]
    assert len(mutual) == 8
    fleet.publish(*mutual)
    # Longer than the test accepts: that a fetch is given up for its silence must not be what ends the wait.
    long = 4 * PATIENT
    fleet.waits = {
        "public_api": {"first_byte_wait": long, "proxied_first_byte_wait": long},
        "fetch": {"first_byte_timeout": long},
    }
    fleet.far.faults.add(Fault(latency_before_headers=0.3))
    for base, view in views.items():
        await fleet.start(base, view, hot_views=1, probe_interval=3600)
    for item in mutual:
        answers = await asyncio.gather(*(fleet.get(base, item.object_id) for base in (first, second) * 4))
        assert all(is_whole(answer, item) for answer in answers)
        assert max(answer.took for answer in answers) < PATIENT


async def test_a_node_that_its_peers_cannot_reach_serves_and_they_do_without_it(fleet: Fleet) -> None:
    """What is sent to it is lost, and its connections stay open. It reaches the others."""
    relays, ports = [], [free_port() for _ in range(3)]
    for port in ports:
        relay = TcpRelay(port)
        await fleet.stack.enter_async_context(relay.running())
        relays.append(relay)
    fleet.bases = [f"http://127.0.0.1:{relay.port}" for relay in relays]
    items = [fleet.homed_at(fleet.bases[0], 2 * MIB, range(begin, 5000)) for begin in (1, 1000, 2000)]
    fleet.publish(*items)
    for base, port in zip(fleet.bases, ports, strict=True):
        await fleet.start(base, port=port, first_byte_wait=1.0, probe_interval=0.3)
    relays[0].unresponsive = True
    direct = [f"http://127.0.0.1:{port}" for port in ports]
    for base in direct[1:]:  # before the probes tell
        answer = await fleet.get(base, items[0].object_id)
        assert is_whole(answer, items[0])
        assert answer.took < 10

    async def without_it() -> bool:
        pages = [(await get(f"{base}/api/v1/status")).json()["peers"]["alive"] for base in direct]
        return [len(alive) for alive in pages] == [2, 1, 1]

    await eventually(without_it)
    answers = await asyncio.gather(*(fleet.get(base, items[1].object_id) for base in direct[1:] * 3))
    assert all(is_whole(answer, items[1]) for answer in answers)
    assert fleet.far_gets(items[1].object_id) == 1
    assert is_whole(await fleet.get(direct[0], items[2].object_id), items[2])
    relays[0].unresponsive = False

    async def with_it() -> bool:
        pages = [(await get(f"{base}/api/v1/status")).json()["peers"]["alive"] for base in direct]
        return [len(alive) for alive in pages] == [2, 2, 2]

    await eventually(with_it)


async def test_a_hit_at_a_node_of_a_fleet_calls_what_it_calls_at_a_node_by_itself(fleet: Fleet) -> None:
    item = fleet.homed_at(fleet.bases[0], 50_000)
    fleet.publish(item)
    await fleet.start(fleet.bases[0], probe_interval=3600, copies=2)
    await fleet.start(fleet.bases[1], urls=(), copies=1)  # in no fleet
    calls: list[Counter[str]] = []
    for base in fleet.bases[:2]:
        assert is_whole(await fleet.get(base, item.object_id), item)
        await eventually(lambda base=base: fleet.stored(base, item.object_id))  # type: ignore[misc]
        for _ in range(3):
            assert (await fleet.get(base, item.object_id)).headers["x-cache"] == "hit"
        calls.append(await calls_of(fleet.get(base, item.object_id)))
    assert calls[0] == calls[1]
    assert calls[0].total() > 5


_OF_THE_SWEEP = frozenset(f"OpenObjectCache.{name}" for name in ("run", "sweep", "_sweep", "_close_if_idle"))
"""What closes open files now and then, whatever is requested."""


async def calls_of(request: Awaitable[Answer]) -> Counter[str]:
    """The functions of the fast path and of the fleet that are called in this thread until the answer is there."""
    counted: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        ours = "/fast_path/" in code.co_filename or code.co_filename.endswith("/peers.py")
        if event == "call" and ours and code.co_qualname not in _OF_THE_SWEEP:
            counted[code.co_qualname] += 1

    sys.setprofile(count)
    try:
        assert (await request).headers["x-cache"] == "hit"
    finally:
        sys.setprofile(None)
    return counted


async def test_a_hop_is_never_forwarded(fleet: Fleet) -> None:
    item = fleet.homed_at(fleet.bases[0], 2 * MIB)
    fleet.publish(item)
    await start_all(fleet)
    home, second, _ = fleet.in_order(item.object_id)
    assert await fleet.hop(second, item.object_id) == (200, item.content.read(0, item.size))
    await eventually(lambda: fleet.stored(second, item.object_id))  # as it was asked to
    assert not fleet.stored(home, item.object_id)


async def test_a_strangers_hop_is_not_forwarded_and_makes_no_other_node_keep_the_object(fleet: Fleet) -> None:
    item = fleet.homed_at(fleet.bases[0], 2 * MIB)
    fleet.publish(item)
    secret = fleet.folder / "secret"
    secret.write_text("the-secret-of-the-fleet\n")
    await start_all(fleet, secret_file=secret)
    home, second, third = fleet.in_order(item.object_id)
    for _ in range(6):
        answer = await fleet.hop(second, item.object_id, **{"X-Distributor-Hop-Auth": "1:x"})
        assert answer == (200, item.content.read(0, item.size))
    assert not fleet.stored(second, item.object_id)
    assert not fleet.stored(home, item.object_id)
    asked = fleet.far_gets(item.object_id)
    assert is_whole(await fleet.get(third, item.object_id), item)  # by a signed hop
    await eventually(lambda: fleet.stored(home, item.object_id))
    assert fleet.far_gets(item.object_id) == asked + 1


async def test_the_nodes_page_shows_the_ring_and_what_came_from_each_node(fleet: Fleet) -> None:
    own, other, gone = fleet.bases
    item = fleet.homed_at(other, 2 * MIB)
    fleet.publish(item)
    weights = {own: 1.0, other: 3.0}
    port = free_port()
    await fleet.start(other, weights=weights, probe_interval=0.2)
    fleet.waits["dashboard"] = {"port": port}
    await fleet.start(own, weights=weights, probe_interval=0.2, hot_views=1000)
    shown: dict[str, Any] = {}

    async def complete() -> bool:
        # On a busy machine a peer may be late, and the source is asked instead: so more than once.
        assert is_whole(await fleet.get(own, item.object_id), item)
        shown.update((await get(f"http://127.0.0.1:{port}/snapshot.json")).json())
        nodes = shown["fleet"]["nodes"]
        received: float = sum(node["bytes"] for node in nodes)
        return sum(node["alive"] for node in nodes) == 2 and received >= item.size

    await eventually(complete, pause=0.2)
    nodes = {f"http://{node['name']}": node for node in shown["fleet"]["nodes"]}
    assert {name: (node["own"], node["alive"], node["share"]) for name, node in nodes.items()} == {
        own: (True, True, 0.25),
        other: (False, True, 0.75),
        gone: (False, False, 0.0),
    }
    assert nodes[other]["bytes"] >= item.size > nodes[gone]["bytes"] == 0
    sources = {source["name"] for source in shown["sources"]}
    assert not sources & {node["name"] for node in shown["fleet"]["nodes"]}


async def test_metrics_tell_of_members_hops_and_bytes(fleet: Fleet) -> None:
    """The nodes of this process count together."""
    item = fleet.homed_at(fleet.bases[1], 2 * MIB)
    fleet.publish(item)
    await start_all(fleet, hot_views=1000, probe_interval=3600, handover=0)
    home, other, third = fleet.in_order(item.object_id)
    results = ("hit", "fetched", "absent", "failed")

    def hops() -> list[float]:
        return [counted("distributor_peer_requests_total", result=result) for result in results]

    before, peer = hops(), home.removeprefix("http://")
    received = counted("distributor_peer_bytes_total", peer=peer)
    waits = counted("distributor_peer_latency_seconds_count")
    asked = counted("distributor_peer_asked_total", sender="peer")
    assert is_whole(await fleet.get(other, item.object_id), item)
    await eventually(lambda: fleet.stored(home, item.object_id))
    await eventually(lambda: hops()[1] == before[1] + 1)
    assert is_whole(await fleet.get(third, item.object_id), item)
    await eventually(lambda: hops() == [before[0] + 1, before[1] + 1, *before[2:]])
    await eventually(lambda: counted("distributor_peer_bytes_total", peer=peer) >= received + 2 * item.size)
    assert counted("distributor_peer_latency_seconds_count") >= waits + 2
    assert counted("distributor_peer_asked_total", sender="peer") >= asked + 1
    assert counted("distributor_peers_alive") == 2
    assert counted("distributor_peers_not_alive") == 0


async def test_what_a_node_does_not_have_is_no_error_of_it(fleet: Fleet) -> None:
    """After a start, homes ask the former ones for what they have: a day of alerts otherwise."""
    item = fleet.homed_at(fleet.bases[0], 50_000)
    fleet.publish(item)
    await fleet.start(fleet.bases[0], probe_interval=3600)
    absent = counted("distributor_requests_total", method="GET", status="504", cache="absent")
    others = counted("distributor_requests_total", method="GET", status="504", cache="none")
    errors = counted_here()["requests"]["error"]
    status, _ = await fleet.hop(fleet.bases[0], item.object_id, **{"Cache-Control": "only-if-cached"})
    assert status == 504
    await eventually(
        lambda: (
            counted("distributor_requests_total", method="GET", status="504", cache="absent") == absent + 1
        )
    )
    assert counted("distributor_requests_total", method="GET", status="504", cache="none") == others
    assert counted_here()["requests"]["error"] == errors


def with_secret(fleet: Fleet) -> tuple[bytes, Path]:
    secret = b"the-secret-of-the-fleet"
    file = fleet.folder / "secret"
    file.write_bytes(secret)
    return secret, file


async def test_a_request_of_a_peer_that_is_repeated_at_another_node_is_a_strangers(fleet: Fleet) -> None:
    item = fleet.homed_at(fleet.bases[0], 2 * MIB)
    fleet.publish(item)
    secret, file = with_secret(fleet)
    await start_all(fleet, secret_file=file)
    _, second, third = fleet.in_order(item.object_id)
    path = f"/api/v1/assets/{item.object_id}"
    auth = sign_hop(secret, second, path, "1", time.time())
    expected = (200, item.content.read(0, item.size))
    assert await fleet.hop(third, item.object_id, **{"X-Distributor-Hop-Auth": auth}) == expected
    assert await fleet.hop(second, item.object_id, **{"X-Distributor-Hop-Auth": auth}) == expected
    await eventually(lambda: fleet.stored(second, item.object_id))  # what a peer asks for is kept
    assert not fleet.stored(third, item.object_id)


async def test_a_peer_of_the_release_before_is_a_peer(fleet: Fleet) -> None:
    item = fleet.homed_at(fleet.bases[0], 2 * MIB)
    fleet.publish(item)
    secret, file = with_secret(fleet)
    await start_all(fleet, secret_file=file)
    _, second, _ = fleet.in_order(item.object_id)
    at = int(time.time())
    mac = hmac.new(secret, f"/api/v1/assets/{item.object_id}\n{at}".encode(), hashlib.sha256).hexdigest()
    await fleet.hop(second, item.object_id, **{"X-Distributor-Hop-Auth": f"{at}:{mac}"})
    await eventually(lambda: fleet.stored(second, item.object_id))


async def test_a_peer_whose_clock_differs_gets_its_object_as_a_stranger_does(fleet: Fleet) -> None:
    item = fleet.homed_at(fleet.bases[0], 2 * MIB)
    fleet.publish(item)
    secret, file = with_secret(fleet)
    await start_all(fleet, secret_file=file)
    home, second, _ = fleet.in_order(item.object_id)
    path = f"/api/v1/assets/{item.object_id}"
    for base in (second, home):
        auth = sign_hop(secret, base, path, "1", time.time() - 600)
        answer = await fleet.hop(base, item.object_id, **{"X-Distributor-Hop-Auth": auth})
        assert answer == (200, item.content.read(0, item.size))
    await eventually(lambda: fleet.stored(home, item.object_id))  # its home keeps it for any request
    assert not fleet.stored(second, item.object_id)


async def knows_two(base: str) -> bool:
    """Whether the node has found both of the others alive: probes may be late on a busy machine."""
    return len((await get(f"{base}/api/v1/status")).json()["peers"]["alive"]) == 2


async def test_peers_ask_at_a_port_of_their_own(fleet: Fleet) -> None:
    item = fleet.homed_at(fleet.bases[0], 2 * MIB)
    fleet.publish(item)
    public = {base: free_port() for base in fleet.bases}
    for base in fleet.bases:
        await fleet.start(base, port=public[base], peer_port=int(base.rpartition(":")[2]), probe_interval=0.3)
    home, second, third = fleet.in_order(item.object_id)
    clients = [f"http://127.0.0.1:{port}" for port in public.values()]
    answers = await asyncio.gather(*(fleet.get(base, item.object_id) for base in clients * 4))
    assert all(is_whole(answer, item) for answer in answers)
    assert fleet.far_gets(item.object_id) == 1

    async def kept() -> bool:
        return any((fleet.folder / f"volume-{public[home]}").glob(f"objects/*/{item.object_id}"))

    await eventually(kept)
    # At that port nothing is served but to peers, whether it is cached or not.
    for path in (f"assets/{item.object_id}", f"assets/{10**9}", "status", "buckets", "openapi.json"):
        assert (await get(f"{home}/api/v1/{path}")).status == 403
    assert (await get(f"{home}/healthz", {"X-Distributor-Hop": "1"})).status == 403
    assert (await get(f"{home}/api/v1/buckets", {"X-Distributor-Hop": "1"})).status == 403
    for base in clients:
        assert (await get(f"{base}/api/v1/buckets")).status == 200
        await eventually(lambda base=base: knows_two(base))  # type: ignore[misc]
    # At the public port a hop is a stranger's: it makes no node keep the object.
    await fleet.hop(f"http://127.0.0.1:{public[third]}", item.object_id)
    await fleet.hop(second, item.object_id)
    await eventually(
        lambda: any((fleet.folder / f"volume-{public[second]}").glob(f"objects/*/{item.object_id}"))
    )
    assert not any((fleet.folder / f"volume-{public[third]}").glob(f"objects/*/{item.object_id}"))


async def order(fleet: Fleet, *arguments: str) -> tuple[int, dict[str, Any]]:
    """`distributor operator … --fleet`: its exit code, and what it prints of each node, by its base URL."""
    config = fleet.folder / "node.yaml"
    urls = {f"http://127.0.0.1:{fleet.operators[base]}": base for base in fleet.bases}
    values = {"urls": fleet.bases, "own_url": fleet.bases[0], "operator_urls": list(urls)}
    config.write_text(yaml.safe_dump({"catalog": {"manifest": "unused"}, "peers": values}))
    done = await asyncio.to_thread(
        run_preloaded,
        ["operator", "--config", str(config), *arguments, "--fleet"],
        {**os.environ, "DISTRIBUTOR_OPERATOR_API__SECRET": SECRET},
    )
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    return done.returncode, {urls[line["node"]]: line for line in printed}


async def test_orders_reach_all_nodes_and_say_what_became_of_each(fleet: Fleet) -> None:
    items = [fleet.homed_at(base, 50_000) for base in fleet.bases]
    fleet.publish(*items)
    await start_all(fleet)
    code, results = await order(fleet, "warm", "--all")
    assert code == 0
    # Each node has fetched what it keeps: no object is there twice.
    assert {base: line["result"]["done"] for base, line in results.items()} == dict.fromkeys(fleet.bases, 1)
    for base, item in zip(fleet.bases, items, strict=True):
        assert [fleet.stored(each, item.object_id) for each in fleet.bases].count(True) == 1
        assert fleet.stored(base, item.object_id)
    code, results = await order(fleet, "purge", *(item.object_id for item in items))
    assert (code, {line["result"]["purging"] for line in results.values()}) == (0, {3})
    for base, item in zip(fleet.bases, items, strict=True):
        await eventually(lambda base=base, item=item: not fleet.stored(base, item.object_id))  # type: ignore[misc]
    await fleet.stop(fleet.bases[2])
    code, results = await order(fleet, "pin", "1")
    assert code == 1
    assert [line.get("result", {}).get("changed") for line in results.values()] == [1, 1, None]
    assert "cannot be reached" in results[fleet.bases[2]]["error"]


async def beside_a_liar(
    fleet: Fleet, lie: Fault, hot_views: float, **peers: Any
) -> tuple[StorageNode, DemoObject]:
    """Start the first node with a scripted peer, which is the home of the object that is returned."""
    liar = await fleet.stack.enter_async_context(StorageNode([]).run())
    honest, lying = fleet.bases[0], await fleet.stack.enter_async_context(as_peer(liar))
    fleet.bases = [honest, lying]
    item = fleet.homed_at(lying, 2 * MIB)
    fleet.publish(item)
    liar.objects.update({item.object_id: item})
    liar.faults.add(lie, Match(endpoint="files"))
    values = {"first_byte_wait": 1.0, "hot_views": hot_views, "probe_interval": 3600} | peers
    await fleet.start(honest, **values)
    return liar, item


@pytest.mark.parametrize("hot_views", [1, 1000], ids=["kept", "passed on"])
@pytest.mark.parametrize(
    "lie",
    [
        Fault(endless_body=True, omit_content_length=True),
        Fault(content_length_delta=7, body_delta=7),
        Fault(omit_content_length=True, body_delta=-7),
        Fault(cut_after=700_000),
        Fault(hang_after=700_000),
        Fault(drip_after=700_000, drip_bytes_per_second=1000),
        Fault(hang_before_headers=True),
        Fault(status=500),
        Fault(status=404),
        Fault(redirect_to="http://127.0.0.1:1/"),
        Fault(gzip=True),
    ],
    ids=lambda lie: ",".join(name for name in lie.__slots__ if getattr(lie, name) != getattr(Fault(), name)),
)
async def test_a_lying_peer_costs_no_client_its_object(fleet: Fleet, lie: Fault, hot_views: int) -> None:
    liar, item = await beside_a_liar(fleet, lie, hot_views)
    answer = await fleet.get(fleet.bases[0], item.object_id)
    assert is_whole(answer, item)
    assert len(liar.requests) > 0


@pytest.mark.parametrize("hot_views", [1, 1000], ids=["kept", "passed on"])
@pytest.mark.parametrize("position", [10, 1_500_000])
async def test_wrong_bytes_of_a_peer_are_never_a_complete_answer(
    fleet: Fleet, position: int, hot_views: int
) -> None:
    """As with any source, all but the last bytes may have been sent before the hash tells: the answer is cut."""
    liar, item = await beside_a_liar(fleet, Fault(flip_byte_at=position), hot_views)
    answer = await fleet.get(fleet.bases[0], item.object_id)
    assert is_whole(answer, item) or not answer.complete
    asked = len(liar.requests)
    assert asked > 0
    await asyncio.sleep(2.5)  # it ranks behind the others for two seconds, whatever it is asked for
    assert is_whole(await fleet.get(fleet.bases[0], item.object_id), item)
    assert len(liar.requests) == asked  # not asked for this object again


@pytest.mark.parametrize("asked", ["bytes=-100", None])
async def test_a_source_is_not_blamed_for_what_a_peer_sent_before_it(fleet: Fleet, asked: str | None) -> None:
    """1. A peer sends wrong bytes and is cut. 2. The only source continues. 3. The hash is wrong."""
    size = 2 * MIB if asked else 60_000
    liar = await fleet.stack.enter_async_context(StorageNode([]).run())
    honest, lying = fleet.bases[0], await fleet.stack.enter_async_context(as_peer(liar))
    fleet.bases = [honest, lying]
    item = fleet.homed_at(lying, size)
    fleet.publish(item)
    liar.objects.update({item.object_id: item})
    liar.faults.add(Fault(flip_byte_at=10, cut_after=50_000), Match(endpoint="files"))
    await fleet.start(honest, first_byte_wait=1.0, hot_views=1000, probe_interval=3600)
    answer = await fleet.get(honest, item.object_id, **({"Range": asked} if asked else {}))
    assert (answer.status, answer.complete) == (206 if asked else 200, True)
    assert item.content.read(0, size).endswith(answer.body)
    assert len(liar.requests) == 1


@pytest.mark.parametrize("hot_views", [1, 1000], ids=["kept", "passed on"])
async def test_a_peer_that_sends_wrong_bytes_and_cuts_them_is_not_asked_again(
    fleet: Fleet, hot_views: int
) -> None:
    """It is never the only one whose bytes are wrong: a source has sent the rest each time."""
    liar, item = await beside_a_liar(fleet, Fault(flip_byte_at=10, cut_after=700_000), hot_views)
    answer = await fleet.get(fleet.bases[0], item.object_id)
    assert is_whole(answer, item) or not answer.complete
    assert len(liar.requests) == 1
    honest, lying = fleet.bases
    if hot_views == 1:
        await eventually(lambda: fleet.stored(honest, item.object_id))
        fleet.operators[lying] = free_port()  # where nothing listens
        await order(fleet, "purge", item.object_id)
        await eventually(lambda: not fleet.stored(honest, item.object_id))
    await asyncio.sleep(6)  # it ranks behind the others for four seconds, whatever it is asked for
    assert is_whole(await fleet.get(fleet.bases[0], item.object_id), item)
    assert len(liar.requests) == 1
