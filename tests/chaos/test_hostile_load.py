"""Hits of an undisturbed object while sources and clients do their worst: no error, and as quick as before."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest

from distributor_node.services.demo.manifest import content_hash
from distributor_node.services.demo.objects import MIB, DemoObject, generated_object
from distributor_node.services.demo.storage_node import StorageNode
from distributor_node.shared.runtime.process import MIN_DESCRIPTORS
from tests.chaos.figures import record_result
from tests.end_to_end.client import get, read_answer
from tests.end_to_end.stack import Stack

pytestmark = [pytest.mark.chaos, pytest.mark.alone, pytest.mark.timeout(180)]

QUIET_SECONDS, DISTURBED_SECONDS = 5.0, 10.0
P99_FLOOR = 0.005
HIT = generated_object("1", 20_000)
LARGE = generated_object("2", 16 * MIB)
TINY, INTERIM = generated_object("8", 600_000), generated_object("9", 600_000)

SOURCE = """
import socket, sys, threading
head = b"HTTP/1.1 200 OK\\r\\nContent-Type: video/mp4\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n"
def serve(connection):
    try:
        asked = connection.recv(65536)
        if b"/8 " in asked:
            connection.sendall(head)
            for _ in range(300):
                connection.sendall(b"1\\r\\n \\r\\n" * 2000)
        else:
            while True:
                connection.sendall(b"HTTP/1.1 103 Early Hints\\r\\n\\r\\n" * 500)
    except OSError:
        pass
    finally:
        connection.close()
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""


@asynccontextmanager
async def hostile_source() -> AsyncIterator[str]:
    """A source in a process of its own: object 8 in chunks of one byte, all others as interim responses for ever."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SOURCE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(await process.stdout.readline())}/files/"
    finally:
        process.kill()
        await process.wait()


class Hits:
    """Asks for the object on one connection, again and again."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.errors: list[str] = []

    async def measure(self, seconds: float) -> float:
        """Return the p99 in seconds."""
        body, taken = HIT.content.read(0, HIT.size), []
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            began = time.monotonic()
            writer.write(b"GET /api/v1/assets/1 HTTP/1.1\r\nHost: x\r\n\r\n")
            async with asyncio.timeout(30):
                answer = await read_answer(reader, began)
            taken.append(time.monotonic() - began)
            if (answer.status, answer.headers.get("x-cache"), answer.body) != (200, "hit", body):
                self.errors.append(f"{answer.status} {answer.headers}")
                break
            await asyncio.sleep(0.004)
        writer.close()
        return sorted(taken)[int(len(taken) * 0.99)]


def asking(stack: Stack, object_id: str) -> Callable[[ExitStack], None]:
    """Requests for an object of the hostile source, one after the other."""

    async def ask() -> None:
        while True:
            with suppress(OSError, TimeoutError):
                await get(stack.url(object_id), timeout=30)
            await asyncio.sleep(0.05)

    def begin(opened: ExitStack) -> None:
        for _ in range(4):
            opened.callback(asyncio.create_task(ask()).cancel)

    return begin


def connecting(stack: Stack, number: int, request: bytes) -> Callable[[ExitStack], None]:
    """Clients that connect, send this and read nothing."""

    def begin(opened: ExitStack) -> None:
        for _ in range(number):
            one = opened.enter_context(socket.socket())
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", stack.port))
            try:
                one.send(request)
            except BlockingIOError:
                continue  # not connected yet: it waits to be accepted

    return begin


def entry(item: DemoObject, base: str) -> dict[str, object]:
    return {
        "id": item.object_id,
        "size": item.size,
        "hash": content_hash(item.content),
        "urls": [base + item.object_id],
    }


@pytest.mark.parametrize("load", ["one-byte chunks", "interim responses", "slow readers", "connections"])
async def test_hits_while_others_do_their_worst(tmp_path: Path, load: str) -> None:
    async with AsyncExitStack() as resources:
        node = await resources.enter_async_context(StorageNode([HIT, LARGE]).run())
        hostile = await resources.enter_async_context(hostile_source())
        stack = Stack(tmp_path, "memory://", "memory://", "hostile")
        resources.callback(stack.kill_all)
        own = f"{node.api_url}/files/"
        objects = [entry(HIT, own), entry(LARGE, own), entry(TINY, hostile), entry(INTERIM, hostile)]
        stack.manifest.write_text(json.dumps({"version": 1, "objects": objects}))
        process = stack.add(
            "standalone",
            DISTRIBUTOR_STORAGE__MAX_CACHED_ITEM="1M",
            DISTRIBUTOR_JOB_QUEUE__RETRY_DELAYS="[0.2, 0.2]",
            DISTRIBUTOR_FETCH__FAILURE_MEMORY="0.2",
        )
        assert process.process is not None
        resource.prlimit(process.process.pid, resource.RLIMIT_NOFILE, (MIN_DESCRIPTORS, MIN_DESCRIPTORS))
        await process.healthy()
        await get(stack.url("1"))
        await stack.until_hit("1")
        begin = {
            "one-byte chunks": asking(stack, "8"),
            "interim responses": asking(stack, "9"),
            "slow readers": connecting(stack, 200, b"GET /api/v1/assets/2 HTTP/1.1\r\nHost: x\r\n\r\n"),
            "connections": connecting(stack, MIN_DESCRIPTORS, b""),
        }[load]
        hits = Hits(stack.port)
        quiet = await hits.measure(QUIET_SECONDS)
        with ExitStack() as opened:
            disturbed = asyncio.create_task(
                hits.measure(DISTURBED_SECONDS)
            )  # it has a connection before the load
            await asyncio.sleep(0.2)
            begin(opened)
            p99 = await disturbed
        assert not hits.errors
        ratio = max(p99, P99_FLOOR) / max(quiet, P99_FLOOR)
        record_result(f"hostile_{load}", p99_quiet=quiet, p99_disturbed=p99, p99_ratio=ratio)
        assert ratio <= 3, f"p99 {quiet * 1000:.1f} ms, under load {p99 * 1000:.1f} ms"
