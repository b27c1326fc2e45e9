"""The node as a shared HTTP cache in front of a scripted origin (RFC 9111, RFC 5861, RFC 9211)."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

from distributor_node.services.demo.faults import Fault, Match
from distributor_node.services.demo.objects import GeneratedContent, origin_object
from distributor_node.services.demo.storage_node import StorageNode
from tests.end_to_end.client import Answer
from tests.end_to_end.operator_client import OperatorClient
from tests.end_to_end.stack import Stack
from tests.end_to_end.test_versions import Site
from tests.servers.redis_server import free_port
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(120)

SIZE = 300_000
OLD, NEW = GeneratedContent(1, SIZE).read(0, SIZE), GeneratedContent(2, SIZE).read(0, SIZE)
GETS = Match(endpoint="files", method="GET")


def put(
    site: Site,
    data: bytes = OLD,
    etag: str = '"v1"',
    control: str | None = "max-age=60",
    *,
    modified_at: int | None = None,
) -> None:
    site.put(origin_object("1", data, etag, modified_at, cache_control=control))


def gets(site: Site) -> int:
    return len(site.origin.requests.of("1", "GET"))


def conditional(site: Site) -> int:
    """How often the origin was asked whether the object is current."""
    asked = site.origin.requests.of("1", "GET")
    return sum("if-none-match" in one.headers or "if-modified-since" in one.headers for one in asked)


def is_hit(answer: Answer) -> bool:
    return answer.headers.get("x-cache") == "hit"


def ttl(answer: Answer) -> int:
    before, _, value = answer.headers["cache-status"].partition("ttl=")
    assert before == "distributor; hit; "
    return int(value)


async def until(site: Site, holds: Callable[[Answer], bool]) -> Answer:
    """Ask until the answer is as expected; that answer."""
    async with asyncio.timeout(30):
        while not holds(answer := await site.get()):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        return answer


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    stack = Stack(tmp_path, "memory://", "memory://", "alone")
    async with StorageNode([]).run() as origin:
        stack.environment |= {
            "DISTRIBUTOR_CATALOG__KIND": "origin",
            "DISTRIBUTOR_CATALOG__ORIGIN": origin.object_url("{id}"),
            "DISTRIBUTOR_ORIGIN__STALE_WHILE_REVALIDATE": "0",
        }
        await stack.add("standalone").healthy()
        try:
            yield Site(stack, origin)
        finally:
            stack.kill_all()


# A request waits until its object is validated, however slow the machine is.
PATIENT = {"DISTRIBUTOR_PUBLIC_API__FIRST_BYTE_WAIT": "30", "DISTRIBUTOR_FETCH__FIRST_BYTE_TIMEOUT": "30"}


async def restarted(site: Site, **environment: str) -> None:
    """Return when the new node knows what is on its volume: before, it may drop claims, and proxy what they are for."""
    site.stack.kill_all()
    node = site.stack.add("standalone", **environment)
    await node.healthy()
    await eventually(lambda: "reconciliation_finished" in node.log.read_text(errors="replace"))


# What is stored, and what clients are told.


async def test_a_fresh_object_is_sent_with_what_the_origin_said(site: Site) -> None:
    put(site, control="public, max-age=60", modified_at=1_000_000_000)
    await site.until_hit()
    asked = gets(site)
    hit = await site.get()
    assert (hit.body, hit.headers["cache-control"], hit.headers["etag"]) == (
        OLD,
        "public, max-age=60",
        '"v1"',
    )
    assert hit.headers["last-modified"] == "Sun, 09 Sep 2001 01:46:40 GMT"
    assert 0 <= int(hit.headers["age"]) < 60
    assert ttl(hit) == 60 - int(hit.headers["age"])
    assert "age" in hit.headers["access-control-expose-headers"].lower()
    part = await site.get({"Range": "bytes=5-9"})
    assert (part.status, part.body, ttl(part) > 0) == (206, OLD[5:10], True)
    known = await site.get({"If-None-Match": '"v1"'})
    assert (known.status, known.headers["cache-control"]) == (304, "public, max-age=60")
    assert gets(site) == asked


async def test_the_age_rises_on_the_fast_path(site: Site) -> None:
    put(site)
    first = int((await site.until_hit()).headers["age"])
    await asyncio.sleep(2.1)
    second = await site.get()
    assert int(second.headers["age"]) >= first + 2
    assert int(second.headers["age"]) + ttl(second) == 60


@pytest.mark.parametrize(
    ("control", "modified_at", "expected"),
    [
        ("max-age=60, immutable", None, "max-age=60, immutable"),
        (None, None, "max-age=60"),
        (None, 1_000_000_000, "max-age=604800"),
    ],
    ids=["immutable", "nothing", "date"],
)
async def test_a_year_and_immutable_only_if_the_origin_says_so(
    site: Site, control: str | None, modified_at: int | None, expected: str
) -> None:
    put(site, control=control, modified_at=modified_at)
    assert (await site.until_hit()).headers["cache-control"] == expected


NOT_STORED = [
    ({"Cache-Control": "no-store"}, "no-store"),
    ({"Cache-Control": "private, max-age=60"}, "private, max-age=60"),
    ({"Set-Cookie": "a=b", "Cache-Control": "max-age=60"}, "max-age=60"),
    ({"Vary": "*", "Cache-Control": "max-age=60"}, "max-age=60"),
    ({"Vary": "Accept-Language", "Cache-Control": None}, "no-store"),
    ({"Cache-Control": "no-cache", "ETag": None}, "no-cache"),
    ({"Cache-Control": "max-age=0", "ETag": None}, "max-age=0"),
]


@pytest.mark.parametrize("match", [Match(endpoint="files"), GETS], ids=["HEAD and GET", "GET"])
@pytest.mark.parametrize(("headers", "passed"), NOT_STORED, ids=lambda row: json.dumps(row)[:40])
async def test_what_must_not_be_stored(
    site: Site, headers: dict[str, str | None], passed: str, match: Match
) -> None:
    put(site, control=None)
    site.origin.faults.add(Fault(headers=tuple(headers.items())), match)
    for _ in range(4):
        answer = await site.get()
        assert (answer.status, answer.complete, answer.body) == (200, True, OLD)
        assert (answer.headers["x-cache"], answer.headers["cache-control"]) == ("miss", passed)
        assert answer.headers.get("vary") == headers.get("Vary")
        assert "set-cookie" not in answer.headers
    assert site.stored() is None
    # At most one fetch was started: its answer is remembered.
    assert gets(site) <= 5


# Stale objects.


async def test_a_stale_object_is_refreshed_by_a_304(site: Site) -> None:
    put(site, control="max-age=2")
    await site.until_hit()
    await asyncio.sleep(2.2)
    answer = await site.get()
    assert (answer.status, answer.body, is_hit(answer)) == (200, OLD, True)
    assert answer.headers["cache-status"] == "distributor; fwd=stale; fwd-status=304"
    assert int(answer.headers["age"]) < 2
    assert conditional(site) == 1
    assert ttl(await site.get()) > 0
    assert (gets(site), conditional(site)) == (2, 1)


@pytest.mark.parametrize("etag", ['"v2"', 'W/"v2"', ""])
async def test_an_object_that_the_origin_has_replaced(site: Site, etag: str) -> None:
    put(site, control="max-age=2", etag='"v1"' if etag == '"v2"' else etag.replace("2", "1"))
    await site.until_hit()
    put(site, NEW, etag)
    await asyncio.sleep(2.2)
    answer = await site.get()
    assert (answer.status, answer.complete, answer.body) == (200, True, NEW)
    assert answer.headers.get("etag", "") == etag
    hit = await site.until_hit()
    assert (hit.body, site.stored()) == (NEW, NEW)


@pytest.mark.parametrize("status", [404, 410, 403])
async def test_an_object_that_the_origin_has_deleted(site: Site, status: int) -> None:
    put(site, control="max-age=2")
    await site.until_hit()
    site.origin.faults.add(Fault(status=status))
    await asyncio.sleep(2.2)
    assert (await site.get()).status == 404
    assert site.stored() is None


async def test_a_stale_object_is_sent_at_once_while_it_is_validated(site: Site) -> None:
    put(site, control="max-age=2, stale-while-revalidate=60")
    await site.until_hit()
    # The time that the 304 takes counts as age: with the former lifetime it would be stale again at once.
    put(site, control="max-age=60, stale-while-revalidate=60")
    site.origin.faults.add(Fault(latency_before_headers=1.5), GETS)
    await asyncio.sleep(2.2)
    answers = await asyncio.gather(*(site.get() for _ in range(10)))
    # None waited for the origin. On a busy machine the last ones come after it has answered, and are fresh.
    assert all(answer.headers["cache-status"].startswith("distributor; hit") for answer in answers)
    assert all(answer.body == OLD for answer in answers)
    assert any(ttl(answer) <= 0 for answer in answers)
    await eventually(lambda: conditional(site) == 1)

    await until(site, lambda answer: ttl(answer) > 0)
    assert conditional(site) == 1


async def test_an_origin_that_is_down(site: Site) -> None:
    put(site, control="max-age=2")
    await site.until_hit()
    site.origin.faults.add(Fault(status=503))
    before = gets(site)
    await asyncio.sleep(2.2)
    answers = []
    for _ in range(60):
        answers.append(await site.get())
        await asyncio.sleep(0.05)
    assert all(answer.status == 200 and answer.body == OLD for answer in answers)
    assert all(is_hit(answer) and ttl(answer) <= 0 for answer in answers)
    assert not any("warning" in answer.headers for answer in answers)
    assert gets(site) - before <= 5
    site.origin.faults.clear()
    await until(site, lambda answer: "fwd-status=304" in answer.headers["cache-status"])


async def test_an_origin_that_forbids_stale_answers_and_is_down(site: Site) -> None:
    put(site, control="max-age=2, must-revalidate")
    await site.until_hit()
    site.origin.faults.add(Fault(status=503))
    await asyncio.sleep(2.2)
    answer = await site.get()
    assert answer.status == 504
    assert answer.headers["cache-control"] == "no-store"


async def test_a_reader_of_the_old_version_finishes_while_others_get_the_new_one(site: Site) -> None:
    large = GeneratedContent(3, 30_000_000).read(0, 30_000_000)
    put(site, large, control="max-age=3")
    await until(site, is_hit)
    request = b"GET /api/v1/assets/1 HTTP/1.1\r\nHost: node\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", site.stack.port, limit=1 << 16)
    try:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        received = await reader.readexactly(1_000_000)
        assert b"x-cache: hit" in head.lower()
        put(site, NEW, '"v2"', "max-age=60")
        await asyncio.sleep(3.2)
        assert (await site.get()).body == NEW
        hit = await until(site, is_hit)
        assert (hit.body, hit.headers["etag"]) == (NEW, '"v2"')
        status = await site.stack.status()
        assert status["storageUsed"] >= len(large) + SIZE, "the old version counts while it is read"
        received += await reader.readexactly(len(large) - len(received))
        assert received == large
    finally:
        writer.transport.abort()

    async def freed() -> bool:
        return bool((await site.stack.status())["storageUsed"] < len(large))

    await eventually(freed)


async def test_a_purge_forgets_the_look_up(site: Site) -> None:
    operator = OperatorClient(free_port())
    await restarted(site, **operator.environment)
    put(site)
    await site.until_hit()
    looked_up = len(site.origin.requests.of("1", "HEAD"))
    put(site, NEW + OLD, '"v2"')
    await operator.command("purge", {"ids": ["1"]})
    answer = await until(site, lambda answer: not is_hit(answer))
    assert (answer.status, answer.body, answer.headers["etag"]) == (200, NEW + OLD, '"v2"')
    assert (await site.until_hit()).body == NEW + OLD
    whole = [one for one in site.origin.requests.of("1", "GET") if one.range is None]
    assert len(site.origin.requests.of("1", "HEAD")) > looked_up
    assert len(whole) == 2, "no fetch began with the old description"


# Directives of requests.


async def test_only_if_cached(site: Site) -> None:
    put(site, control="max-age=2")
    wanted = {"Cache-Control": "only-if-cached"}
    missing = await site.get(wanted)
    assert (missing.status, missing.json()["type"]) == (504, "not_cached")
    assert not site.origin.requests.of("1")
    await site.until_hit()
    assert is_hit(await site.get(wanted))
    await asyncio.sleep(2.2)
    assert (await site.get(wanted)).status == 504
    assert conditional(site) == 0


async def test_no_cache_of_clients_is_ignored_unless_it_is_honoured(site: Site) -> None:
    put(site)
    await site.until_hit()
    assert ttl(await site.get({"Cache-Control": "no-cache"})) > 0
    assert conditional(site) == 0
    await restarted(site, DISTRIBUTOR_ORIGIN__HONOUR_CLIENT_NO_CACHE="true", **PATIENT)
    answer = await site.get({"Cache-Control": "no-cache"})
    assert answer.headers["cache-status"] == "distributor; fwd=stale; fwd-status=304"
    assert conditional(site) == 1


async def test_a_record_of_an_earlier_release_is_validated(site: Site) -> None:
    put(site)
    await site.until_hit()
    site.stack.kill_all()
    (path,) = (site.stack.volume / "records").rglob("1")
    fields = json.loads(path.read_text())
    path.write_text(
        json.dumps({name: fields[name] for name in fields if name not in ("fresh", "cache_control")})
    )
    await restarted(site, **PATIENT)
    answer = await site.get()
    assert (answer.body, answer.headers["cache-status"]) == (OLD, "distributor; fwd=stale; fwd-status=304")
    assert answer.headers["cache-control"] == "max-age=60"


# Responses without a length, and with a coding.

# A range would tell the length, too.
LENGTHLESS = [Fault(chunked=True, ignore_range=True), Fault(omit_content_length=True, ignore_range=True)]


@pytest.mark.parametrize("fault", LENGTHLESS, ids=["chunked", "until close"])
@pytest.mark.parametrize("method", [None, "HEAD"], ids=["always", "HEAD"])
async def test_a_body_without_a_length_is_stored(site: Site, fault: Fault, method: str | None) -> None:
    put(site)
    site.origin.faults.add(fault, Match(endpoint="files", method=method))
    answer = await site.get()
    assert (answer.status, answer.complete, answer.body) == (200, True, OLD)
    assert (answer.headers["x-cache"], answer.headers["etag"]) == ("miss", '"v1"')
    hit = await site.until_hit()
    assert (hit.body, hit.headers["content-length"]) == (OLD, str(SIZE))
    part = await site.get({"Range": "bytes=0-1"})
    assert (part.status, part.body) == (206, OLD[:2])
    assert part.headers["content-range"] == f"bytes 0-1/{SIZE}"


async def test_followers_of_a_body_without_a_length(site: Site) -> None:
    put(site)
    site.origin.faults.add(Fault(chunked=True, ignore_range=True, bytes_per_second=200_000))
    answers = await asyncio.gather(*(site.get() for _ in range(8)))
    assert all((answer.status, answer.complete, answer.body) == (200, True, OLD) for answer in answers)
    assert all(answer.headers["transfer-encoding"] == "chunked" for answer in answers)
    assert {answer.headers["x-data-source"] for answer in answers} == {"local"}
    whole = [one for one in site.origin.requests.of("1", "GET") if one.range is None]
    assert len(whole) <= 2, "a look-up and a fetch"


async def test_a_body_without_a_length_that_breaks_off(site: Site) -> None:
    put(site)
    site.origin.faults.add(
        Fault(chunked=True, ignore_range=True, cut_after=100_000),
        Match(endpoint="files", method="GET", first=2),
    )
    site.origin.faults.add(Fault(chunked=True, ignore_range=True))
    answer = await site.get()
    assert answer.body == OLD[: len(answer.body)]
    assert not answer.complete or answer.body == OLD
    assert (await site.until_hit()).body == OLD


async def test_a_body_that_turns_out_to_be_too_large(site: Site) -> None:
    await restarted(site, DISTRIBUTOR_STORAGE__MAX_CACHED_ITEM="5M")
    large = GeneratedContent(3, 9_000_000).read(0, 9_000_000)
    put(site, large)
    site.origin.faults.add(Fault(chunked=True, ignore_range=True))
    first = await site.get()
    assert first.body == large[: len(first.body)]
    assert not first.complete or first.body == large
    for _ in range(2):
        answer = await site.get()
        assert (answer.status, answer.complete, answer.body == large) == (200, True, True)
        assert answer.headers["x-data-source"] == "external"
    assert site.stored() is None


async def test_a_range_of_an_unknown_total(site: Site) -> None:
    put(site)
    whole, part = (("Content-Range", "bytes 0-0/*"),), (("Content-Range", "bytes 10-19/*"),)
    site.origin.faults.add(Fault(status=405), Match(endpoint="files", method="HEAD"))
    site.origin.faults.add(Fault(headers=whole), Match(endpoint="files", method="GET", ranged=True, first=1))
    site.origin.faults.add(Fault(headers=part), Match(endpoint="files", method="GET", ranged=True))
    assert (await site.get()).body == OLD
    assert (await site.until_hit()).body == OLD
    await restarted(site, DISTRIBUTOR_STORAGE__MAX_CACHED_ITEM="100000")
    site.stack.kill_all()
    for path in (site.stack.volume / "objects").rglob("1"):
        path.unlink()
    site.origin.faults.clear()
    site.origin.faults.add(Fault(headers=part), Match(endpoint="files", method="GET", ranged=True))
    await restarted(site, DISTRIBUTOR_STORAGE__MAX_CACHED_ITEM="200k")
    answer = await site.get({"Range": "bytes=10-19"})
    assert (answer.status, answer.body) == (206, OLD[10:20])
    assert answer.headers["content-range"] == f"bytes 10-19/{SIZE}"


@pytest.mark.parametrize("method", [None, "GET"], ids=["HEAD and GET", "GET"])
async def test_an_origin_that_always_compresses(site: Site, method: str | None) -> None:
    put(site, control="public, max-age=60")
    site.origin.faults.add(Fault(gzip=True), Match(endpoint="files", method=method))
    for _ in range(2):
        answer = await site.get({"Accept-Encoding": "br;q=0.5, GZIP"})
        assert (answer.status, answer.complete, answer.headers["content-encoding"]) == (200, True, "gzip")
        assert gzip.decompress(answer.body) == OLD
        assert answer.headers["vary"] == "Accept-Encoding"
    for headers in ({}, {"Accept-Encoding": "gzip;q=0"}, {"Accept-Encoding": "br"}):
        refused = await site.get(headers)
        assert (refused.status, refused.json()["type"]) == (502, "encoded")
        assert "Content-Encoding gzip" in refused.json()["message"]
    assert site.stored() is None


async def test_a_site_is_fronted_without_a_file(tmp_path: Path) -> None:
    stack = Stack(tmp_path, "memory://", "memory://", "alone")
    async with StorageNode([]).run() as origin:
        process = stack.add("standalone")
        process.kill()
        process.arguments = ["standalone", "--origin", origin.object_url("{id}")]
        process.start()
        try:
            await process.healthy()
            site = Site(stack, origin)
            put(site)
            assert (await site.get()).body == OLD
            assert ttl(await site.until_hit()) > 0
        finally:
            stack.kill_all()


# Many at once, on real servers.


@pytest.fixture
async def cluster(tmp_path: Path, redis_url: str, amqp_url: str) -> AsyncIterator[Site]:
    stack = Stack(tmp_path, redis_url, amqp_url, f"e2e-{uuid.uuid4().hex[:8]}")
    async with StorageNode([]).run() as origin:
        stack.environment |= {
            "DISTRIBUTOR_CATALOG__KIND": "origin",
            "DISTRIBUTOR_CATALOG__ORIGIN": origin.object_url("{id}"),
            "DISTRIBUTOR_ORIGIN__STALE_WHILE_REVALIDATE": "0",
        }
        try:
            yield Site(stack, origin)
        finally:
            stack.kill_all()


async def test_fifty_clients_of_a_stale_object_make_one_conditional_request(cluster: Site) -> None:
    put(cluster, control="max-age=4")
    cluster.origin.faults.add(Fault(latency_before_headers=0.5), GETS)
    await cluster.stack.up(fetchers=2, workers=2)
    await cluster.until_hit()
    await asyncio.sleep(4.5)
    answers = await asyncio.gather(*(cluster.get() for _ in range(50)))
    assert all((answer.status, answer.body) == (200, OLD) for answer in answers)
    assert conditional(cluster) == 1
    assert gets(cluster) == 2


async def read_while_replaced(site: Site, *, readers: int, versions: int, every: float) -> Sequence[Answer]:
    """Replace the object again and again while clients read it; their answers."""
    answers: list[Answer] = []
    done = asyncio.Event()

    async def read() -> None:
        while not done.is_set():
            answers.append(await site.get())

    put(site, version(0), tag(version(0)), "max-age=0")
    reading = [asyncio.create_task(read()) for _ in range(readers)]
    for number in range(1, versions):
        await asyncio.sleep(every)
        put(site, version(number), tag(version(number)), "max-age=0")
    done.set()
    await asyncio.gather(*reading)
    return answers


def version(number: int) -> bytes:
    return GeneratedContent(100 + number, SIZE).read(0, SIZE)


def tag(data: bytes) -> str:
    return f'"{hashlib.sha256(data).hexdigest()[:16]}"'


async def test_an_object_that_is_replaced_while_it_is_read(cluster: Site) -> None:
    put(cluster, OLD, tag(OLD), "max-age=0")
    await cluster.stack.up(workers=2)
    answers = await read_while_replaced(cluster, readers=8, versions=8, every=0.5)
    assert len(answers) > 20
    for answer in answers:
        assert answer.status == 200 or not answer.complete
        if answer.complete:
            assert answer.headers["etag"] == tag(answer.body), "an answer of two versions"
    assert len({answer.headers["etag"] for answer in answers if answer.complete}) > 2
    put(cluster, NEW, '"last"', "max-age=60")
    assert (await until(cluster, lambda answer: answer.body == NEW)).headers["etag"] == '"last"'
