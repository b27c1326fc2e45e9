"""Sources and clients that do their worst to a node, and the latency of hits of an undisturbed object beside them."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from pathlib import Path

from distributor_node.services.demo.manifest import content_hash
from distributor_node.services.demo.objects import MIB, DemoObject, generated_object
from distributor_node.services.demo.storage_node import StorageNode
from distributor_node.shared.runtime.process import MIN_DESCRIPTORS
from tests.end_to_end.client import get, read_answer
from tests.end_to_end.stack import Stack

Begin = Callable[[ExitStack], None]
"""Begins a load, which lasts until the stack is closed."""

HIT = generated_object("1", 20_000)
LARGE = generated_object("2", 16 * MIB)
TINY, INTERIM = generated_object("8", 600_000), generated_object("9", 600_000)
ROOT = Path(__file__).parents[2]
PAUSE = 0.004
"""Seconds between two hits."""

SOURCE = """# Object 8 in chunks of one byte, all others as interim responses for ever.
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
print(f"http://127.0.0.1:{listener.getsockname()[1]}/files/", flush=True)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""


@asynccontextmanager
async def _source(*arguments: str) -> AsyncIterator[str]:
    """A source in a process of its own, which must not delay what is measured. Yields the base URL of its files."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert process.stdout is not None
        yield (await process.stdout.readline()).decode().strip()
    finally:
        process.kill()
        await process.wait()


async def _serve() -> None:
    async with StorageNode([HIT, LARGE]).run() as node:
        sys.stdout.write(f"{node.api_url}/files/\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


@asynccontextmanager
async def node_beside_hostile_source(folder: Path) -> AsyncIterator[Stack]:
    """A standalone node with as few descriptors as it accepts. It has HIT; LARGE is too large for its cache."""
    async with AsyncExitStack() as resources:
        own = await resources.enter_async_context(_source("-m", "tests.chaos.hostile_load"))
        hostile = await resources.enter_async_context(_source("-c", SOURCE))
        stack = Stack(folder, "memory://", "memory://", "hostile")
        resources.callback(stack.kill_all)
        stack.executed = True
        objects = [_entry(HIT, own), _entry(LARGE, own), _entry(TINY, hostile), _entry(INTERIM, hostile)]
        stack.manifest.write_text(json.dumps({"version": 1, "objects": objects}))
        node = stack.add(
            "standalone",
            DISTRIBUTOR_STORAGE__MAX_CACHED_ITEM="1M",
            DISTRIBUTOR_JOB_QUEUE__RETRY_DELAYS="[0.2, 0.2]",
            DISTRIBUTOR_FETCH__FAILURE_MEMORY="0.2",
        )
        assert node.process is not None
        resource.prlimit(node.process.pid, resource.RLIMIT_NOFILE, (MIN_DESCRIPTORS, MIN_DESCRIPTORS))
        await node.healthy()
        await get(stack.url("1"))
        await stack.until_hit("1")
        yield stack


class Hits:
    """Asks for HIT on one connection, again and again."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.errors: list[str] = []

    async def measure(self, seconds: float) -> list[float]:
        """Return how many seconds each hit took. What is no right hit is in `errors`, and ends it."""
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
            await asyncio.sleep(PAUSE)
        writer.close()
        return taken

    async def measure_under(self, begin: Begin, seconds: float) -> list[float]:
        """Likewise, on a connection that is there before the load begins."""
        with ExitStack() as opened:
            measuring = asyncio.create_task(self.measure(seconds))
            await asyncio.sleep(0.2)
            begin(opened)
            return await measuring


def loads(stack: Stack) -> Mapping[str, Begin]:
    """What strangers do, by name."""
    return {
        "one-byte chunks": _asking(stack, "8"),
        "interim responses": _asking(stack, "9"),
        "slow readers": _connecting(stack, 200, b"GET /api/v1/assets/2 HTTP/1.1\r\nHost: x\r\n\r\n"),
        "connections": _connecting(stack, MIN_DESCRIPTORS, b""),
    }


def _asking(stack: Stack, object_id: str) -> Begin:
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


def _connecting(stack: Stack, number: int, request: bytes) -> Begin:
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


def _entry(item: DemoObject, base: str) -> dict[str, object]:
    return {
        "id": item.object_id,
        "size": item.size,
        "hash": content_hash(item.content),
        "urls": [base + item.object_id],
    }


if __name__ == "__main__":
    asyncio.run(_serve())
