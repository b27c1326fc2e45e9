"""Clients that disconnect, read slowly, flood or send garbage: other clients are unaffected, resources are
released."""

from __future__ import annotations

import asyncio
import contextlib
import random
import resource
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from distributor_node.services.demo.objects import MIB, generated_object
from tests.chaos.figures import record_result
from tests.chaos.harness import ChaosHarness
from tests.chaos.http import cache_all, get_correct
from tests.chaos.invariants import check_logs, wait_until_settled
from tests.chaos.latency import measure_hits
from tests.chaos.watchers import open_descriptors, resident_bytes
from tests.end_to_end.client import read_answer
from tests.waiting import eventually

SMALL = [generated_object(str(number), 40_000) for number in range(1, 5)]
LARGE = [generated_object(str(number), 24 * MIB) for number in range(11, 15)]


DESCRIPTOR_SLACK = 40
"""Descriptors by which the API may stand above where it was, such as hot objects and idle connections to sources."""


@asynccontextmanager
async def assert_no_leaks(chaos: ChaosHarness, name: str, *, slack: int = 64 * MIB) -> AsyncIterator[None]:
    """Other clients are served. Afterwards the API has as many descriptors as before, and at most `slack` bytes more
    memory, which its allocator keeps."""
    await chaos.up([*SMALL, *LARGE], 400 * MIB)
    await cache_all(chaos, SMALL)
    await cache_all(chaos, LARGE[:1])
    urls = [chaos.stack.url(item.object_id) for item in SMALL]
    api = chaos.only("api").process
    assert api is not None
    async with measure_hits(urls, SMALL) as before:
        await asyncio.sleep(4)
    descriptors, memory = open_descriptors(api.pid), resident_bytes(api.pid)
    async with measure_hits(urls, SMALL) as during:
        yield
        await asyncio.sleep(1)
    await eventually(lambda: open_descriptors(api.pid) <= descriptors + DESCRIPTOR_SLACK, 30, pause=0.2)
    async with measure_hits(urls, SMALL) as after:
        await asyncio.sleep(4)
    for hits in (before, during, after):
        assert not hits.errors, hits.errors[:5]
    left = resident_bytes(api.pid) - memory
    assert left < slack, f"{left} bytes more than before"
    check_logs(chaos)
    record_result(
        f"clients_{name}", hits=len(during.samples), hit_p99=during.p99, undisturbed_p99=before.p99, failed=0,
        memory_left=left, descriptors_left=open_descriptors(api.pid) - descriptors,
    )  # fmt: skip


def allow_descriptors(number: int) -> None:
    """To this process and those that it starts from here on. Skips the test where the hard limit is lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < number:
        pytest.skip(f"needs `ulimit -Hn` of {number}, which is {hard}")
    if soft != resource.RLIM_INFINITY and soft < number:
        resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))


async def connect(chaos: ChaosHarness) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", chaos.stack.port, limit=64 * 1024)


def head_of(object_id: str, more: str = "") -> bytes:
    return f"GET /api/v1/assets/{object_id} HTTP/1.1\r\nHost: node\r\n{more}\r\n".encode()


@pytest.mark.chaos
@pytest.mark.timeout(300)
async def test_a_thousand_clients_disconnect_mid_body(chaos: ChaosHarness) -> None:
    rng = random.Random(1)
    free = asyncio.Semaphore(50)

    async def leave(number: int) -> None:
        async with free:
            reader, writer = await connect(chaos)
            writer.write(head_of(LARGE[number % len(LARGE)].object_id))
            await reader.read(rng.randrange(1, 500_000))
            writer.transport.abort()

    async with assert_no_leaks(chaos, "disconnect_1000"):
        await asyncio.gather(*(leave(number) for number in range(1000)))
    await cache_all(chaos, LARGE)  # the fetches have gone on
    assert all(len(chaos.first.requests.of(item.object_id, "GET")) <= 3 for item in LARGE)
    await wait_until_settled(chaos, [*SMALL, *LARGE])


@pytest.mark.chaos
@pytest.mark.timeout(300)
async def test_five_hundred_clients_read_a_byte_a_second(chaos: ChaosHarness) -> None:
    """Of a cached object (250) and of one that is being fetched (250)."""

    async def read_slowly(number: int, over: asyncio.Event) -> None:
        reader, writer = await connect(chaos)
        writer.write(head_of(LARGE[number % 2].object_id))
        with contextlib.suppress(ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            while not over.is_set():
                await reader.read(1)
                await asyncio.sleep(1)
        writer.transport.abort()

    async def run_slow_readers() -> int:
        """Bytes in memory afterwards."""
        over = asyncio.Event()
        slow_readers = [asyncio.create_task(read_slowly(number, over)) for number in range(500)]
        await asyncio.sleep(10)
        await cache_all(chaos, LARGE[1:2])
        over.set()
        await asyncio.gather(*slow_readers)
        await asyncio.sleep(1)
        api = chaos.only("api").process
        assert api is not None
        return resident_bytes(api.pid)

    async with assert_no_leaks(chaos, "slow_500", slack=256 * MIB):
        first, second = await run_slow_readers(), await run_slow_readers()
    # What the allocator keeps of one rush serves the next: none is lost.
    assert second - first < 16 * MIB, f"{second - first} bytes more after a second rush"
    record_result("clients_slow_500_again", memory_left=second - first)
    await wait_until_settled(chaos, [*SMALL, *LARGE])


@pytest.mark.chaos
@pytest.mark.timeout(300)
async def test_five_thousand_idle_keep_alive_connections(chaos: ChaosHarness) -> None:
    allow_descriptors(11_000)
    async with assert_no_leaks(chaos, "idle_5000", slack=128 * MIB):
        held = []
        for _ in range(100):
            held += await asyncio.gather(*(connect(chaos) for _ in range(50)))
        for _, writer in held[::10]:
            writer.write(head_of("1"))
        answers = [await read_answer(reader, time.monotonic()) for reader, _ in held[::10]]
        assert all((answer.status, answer.complete) == (200, True) for answer in answers)
        await asyncio.sleep(5)
        for _, writer in held:
            writer.transport.abort()


@pytest.mark.chaos
@pytest.mark.timeout(120)
async def test_slowloris(chaos: ChaosHarness) -> None:
    chaos.stack.environment["DISTRIBUTOR_PUBLIC_API__REQUEST_TIMEOUT"] = "3"

    async def send_slowly() -> float:
        reader, writer = await connect(chaos)
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            for character in b"GET /api/v1/assets/1 HTTP/1.1\r\nX-Slow: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa":
                writer.write(bytes([character]))
                done, _ = await asyncio.wait({asyncio.ensure_future(reader.read(1))}, timeout=0.5)
                if done:
                    break
        writer.transport.abort()
        return time.monotonic() - began

    async with assert_no_leaks(chaos, "slowloris_200"):
        lasted = await asyncio.gather(*(send_slowly() for _ in range(200)))
        assert max(lasted) < 15


REFUSED = {
    "headers of 100 kB": (head_of("1", "X-Large: " + "a" * 100_000 + "\r\n"), {400, 413, 431}),
    "a thousand headers": (
        head_of("1", "".join(f"X-{n}: {'a' * 90}\r\n" for n in range(1000))),
        {400, 413, 431},
    ),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 50 + b"\r\n\r\n", {0, 400}),
    "half a request line": (b"GET\r\n\r\n", {0, 400}),
    "another version": (b"GET /api/v1/assets/1 HTTP/9.9\r\nHost: a\r\n\r\n", {0, 400, 505}),
    "a negative length": (head_of("1", "Content-Length: -5\r\n"), {0, 400}),
    "two lengths": (head_of("1", "Content-Length: 5\r\nContent-Length: 6\r\n") + b"hello", {0, 400}),
    "a header without a name": (head_of("1", ": nothing\r\n"), {0, 200, 400}),
    "a long path": (head_of("1" * 50_000), {400, 404, 413, 414, 431}),
    "a strange method": (b"BREW /api/v1/assets/1 HTTP/1.1\r\nHost: a\r\n\r\n", {400, 405, 501}),
}


@pytest.mark.timeout(120)
async def test_malformed_and_oversized_requests_are_refused(chaos: ChaosHarness) -> None:
    await chaos.up(SMALL, 100 * MIB)
    await cache_all(chaos, SMALL)
    for name, (request, expected) in REFUSED.items():
        reader, writer = await connect(chaos)
        writer.write(request)
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(10):
                answer = await read_answer(reader, time.monotonic())
            assert answer.status in expected, (name, answer.status)
        writer.transport.abort()
        await get_correct(chaos, SMALL[0])
    reader, writer = await connect(chaos)
    writer.write(head_of("1", "Content-Length: 5\r\n") + b"hello" + head_of("2"))
    for item in SMALL[:2]:
        answer = await read_answer(reader, time.monotonic())
        assert answer.status in (200, 400, 413), "a body on GET is read past, or refused"
        if answer.status != 200 or answer.headers.get("connection") == "close":
            break
        assert answer.body == item.content.read(0, item.size)
    writer.transport.abort()
    reader, writer = await connect(chaos)
    writer.write(b"".join(head_of(item.object_id) for item in SMALL) * 5)
    for _ in range(5):
        for item in SMALL:
            answer = await read_answer(reader, time.monotonic())
            assert (answer.status, answer.body) == (200, item.content.read(0, item.size))
    writer.transport.abort()
    check_logs(chaos)
    record_result("clients_malformed", requests=len(REFUSED) + 22, failed=0)
