"""Slow readers cannot keep places and space from others: they are ended when these are scarce."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack

from distributor_node.services.demo.objects import MIB, generated_object
from tests.end_to_end.client import get
from tests.end_to_end.conftest import Harness
from tests.end_to_end.stack import ServiceProcess, Stack
from tests.waiting import eventually

QUICK_CHECKS = {"DISTRIBUTOR_PUBLIC_API__REQUEST_TIMEOUT": "2"}


def readers(stack: Stack, objects: Sequence[str], opened: ExitStack) -> list[socket.socket]:
    """Clients that ask and then read nothing."""
    found = []
    for object_id in objects:
        one = opened.enter_context(socket.socket())
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.connect(("127.0.0.1", stack.port))
        one.sendall(f"GET /api/v1/assets/{object_id} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert one.recv(16, socket.MSG_PEEK).startswith(b"HTTP/1.1 200")
        found.append(one)
    return found


async def ended(node: ServiceProcess) -> int:
    text = (await get(f"{node.health_url}/metrics")).body.decode()
    name = 'distributor_aborted_responses_total{reason="client_too_slow"} '
    return sum(int(float(line.removeprefix(name))) for line in text.splitlines() if line.startswith(name))


async def test_slow_readers_give_their_proxied_places_to_others(alone: Harness) -> None:
    large, other = generated_object("1", 16 * MIB), generated_object("2", 16 * MIB)
    alone.publish([large, other])
    node = alone.stack.add(
        "standalone",
        DISTRIBUTOR_PUBLIC_API__MAX_PROXIED="3",
        DISTRIBUTOR_STORAGE__MAX_CACHED_ITEM="1M",
        **QUICK_CHECKS,
    )
    await node.healthy()
    with ExitStack() as opened:
        await asyncio.to_thread(readers, alone.stack, ["1"] * 3, opened)
        assert (await get(alone.stack.url("2"))).status == 503  # within the grace
        began = time.monotonic()

        async def served() -> bool:
            answer = await get(alone.stack.url("2"))
            assert answer.status in (200, 503)
            return answer.status == 200 and answer.complete

        await eventually(served, 60)
        assert time.monotonic() - began < 100  # of the 120 seconds that a client may read nothing
        assert await ended(node) == 1


async def test_slow_readers_do_not_keep_other_objects_out_of_the_cache(alone: Harness) -> None:
    held = [generated_object(str(number), 8 * MIB) for number in range(1, 4)]
    other = generated_object("9", 8 * MIB)
    alone.publish([*held, other])
    node = alone.stack.add(
        "standalone",
        DISTRIBUTOR_STORAGE__LIMIT="28M",
        DISTRIBUTOR_EVICTOR__MIN_IDLE="1",
        DISTRIBUTOR_FETCH__SPACE_WAIT="60",
        **QUICK_CHECKS,
    )
    await node.healthy()
    for item in held:
        await get(alone.stack.url(item.object_id))
        await alone.stack.until_hit(item.object_id)
    with ExitStack() as opened:
        await asyncio.to_thread(readers, alone.stack, [item.object_id for item in held], opened)
        await asyncio.sleep(15)
        assert await ended(node) == 0  # nothing is scarce
        assert (await get(alone.stack.url("9"))).status == 200
        await alone.stack.until_hit("9")
        assert 1 <= await ended(node) <= 3
