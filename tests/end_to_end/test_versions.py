"""A node in front of an HTTP origin whose objects change: no client and no file gets bytes of two versions."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from distributor_node.services.demo.faults import Fault, Match
from distributor_node.services.demo.objects import MIB, DemoObject, GeneratedContent, origin_object
from distributor_node.services.demo.storage_node import StorageNode
from tests.end_to_end.client import Answer, get
from tests.end_to_end.stack import Stack

pytestmark = pytest.mark.timeout(120)

SIZE = 3 * MIB
CUT = 1 * MIB
OLD, NEW = GeneratedContent(1, SIZE).read(0, SIZE), GeneratedContent(2, SIZE).read(0, SIZE)
FILES = Match(endpoint="files", method="GET")


@dataclass(slots=True)
class Site:
    """The node, and the origin it fronts."""

    stack: Stack
    origin: StorageNode

    def put(self, item: DemoObject) -> None:
        self.origin.objects[item.object_id] = item

    async def get(self, headers: dict[str, str] | None = None, object_id: str = "1") -> Answer:
        return await get(self.stack.url(object_id), headers, timeout=40)

    async def until_hit(self) -> Answer:
        """Ask until the object is cached; the hit."""
        async with asyncio.timeout(30):
            while True:
                answer = await self.get()
                if answer.headers.get("x-cache") == "hit":
                    return answer
                await asyncio.sleep(0.05)

    def stored(self) -> bytes | None:
        for path in (self.stack.volume / "objects").rglob("1"):
            return path.read_bytes()
        return None


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    stack = Stack(tmp_path, "memory://", "memory://", "alone")
    async with StorageNode([]).run() as origin:
        stack.environment["DISTRIBUTOR_CATALOG__KIND"] = "origin"
        stack.environment["DISTRIBUTOR_CATALOG__ORIGIN"] = origin.object_url("{id}")
        await stack.add("standalone").healthy()
        try:
            yield Site(stack, origin)
        finally:
            stack.kill_all()


def assert_one_version(answer: Answer, versions: Sequence[bytes] = (OLD, NEW)) -> None:
    """What has arrived is the beginning of one version; all of it, if the answer is complete."""
    matching = [data for data in versions if data[: len(answer.body)] == answer.body]
    assert matching, "the bytes of two versions are mixed"
    if answer.complete:
        assert answer.body in versions


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (('"v1"', 1000), ('"v2"', 2000)),
        (('W/"v1"', 1000), ('W/"v2"', 2000)),
        (("", 1000), ("", 2000)),
        (("", None), ("", None)),
    ],
    ids=["strong", "weak", "date", "nothing"],
)
async def test_an_object_replaced_while_its_download_breaks_off(
    site: Site, old: tuple[str, int | None], new: tuple[str, int | None]
) -> None:
    site.put(origin_object("1", OLD, *old))
    site.origin.replacements["1"] = origin_object("1", NEW, *new)
    site.origin.faults.add(
        Fault(cut_after=CUT, replaces_object=True), Match(endpoint="files", method="GET", first=1)
    )
    first = await site.get()
    assert_one_version(first)
    hit = await site.until_hit()
    assert hit.body == NEW
    assert site.stored() == NEW
    assert hit.headers.get("etag", "") == new[0]
    assert "immutable" not in hit.headers["cache-control"]


async def test_an_object_that_was_replaced_after_the_look_up(site: Site) -> None:
    """The look-up is remembered for an hour; what the origin sends is stronger evidence."""
    site.put(origin_object("1", OLD, '"v1"'))
    assert (await get(site.stack.url("1"), method="HEAD")).headers["etag"] == '"v1"'
    site.put(origin_object("1", NEW, '"v2"'))
    answer = await site.get()
    assert (answer.status, answer.body, answer.headers["etag"]) == (200, NEW, '"v2"')
    hit = await site.until_hit()
    assert (hit.body, hit.headers["etag"]) == (NEW, '"v2"')


@pytest.mark.parametrize("etag", ['"v2"', ""])
async def test_an_object_that_has_another_size_than_the_look_up_said(site: Site, etag: str) -> None:
    site.put(origin_object("1", OLD, '"v1"' if etag else ""))
    await get(site.stack.url("1"), method="HEAD")
    longer = NEW + OLD[:1000]
    site.put(origin_object("1", longer, etag))
    answer = await site.get()
    assert (answer.status, answer.complete, answer.body) == (200, True, longer)
    assert (await site.until_hit()).body == longer


async def test_an_origin_that_never_states_its_size_correctly(site: Site) -> None:
    site.put(origin_object("1", OLD, '"v1"'))
    site.origin.faults.add(Fault(content_length_delta=-5), Match(method="HEAD"))
    answer = await site.get()
    assert (answer.status, answer.complete, answer.body) == (200, True, OLD)


async def test_an_origin_with_another_tag_in_each_answer(site: Site) -> None:
    """As behind a balancer whose servers do not agree."""
    site.put(origin_object("1", OLD, '"v1"'))
    site.origin.faults.add(Fault(headers=(("ETag", '"other"'),)), Match(method="HEAD"))
    answer = await site.get()
    assert (answer.status, answer.complete, answer.body) == (200, True, OLD)


async def test_a_proxied_object_is_never_resumed_with_another_version(site: Site) -> None:
    site.stack.kill_all()
    await site.stack.add("standalone", DISTRIBUTOR_STORAGE__MAX_CACHED_ITEM="1M").healthy()
    site.put(origin_object("1", OLD, '"v1"'))
    first = await site.get()
    assert (first.body, first.headers["etag"], first.headers["x-data-source"]) == (OLD, '"v1"', "external")
    part = await site.get({"Range": "bytes=1000000-", "If-Range": '"v1"'})
    assert (part.status, part.body, part.headers["etag"]) == (206, OLD[1000000:], '"v1"')
    site.put(origin_object("1", NEW, '"v2"'))
    resumed = await site.get({"Range": "bytes=1000000-", "If-Range": '"v1"'})
    assert (resumed.status, resumed.body, resumed.headers["etag"]) == (200, NEW, '"v2"')
    plain = await site.get({"Range": "bytes=1000000-"})
    assert (plain.status, plain.body, plain.headers["etag"]) == (206, NEW[1000000:], '"v2"')


async def test_a_head_that_says_zero_bytes(site: Site) -> None:
    site.put(origin_object("1", OLD, '"v1"'))
    site.origin.faults.add(Fault(headers=(("Content-Length", "0"),)), Match(method="HEAD"))
    answer = await site.get()
    assert (answer.status, answer.body) == (200, OLD)
    assert (await site.until_hit()).body == OLD


async def test_a_purged_object_that_has_changed(site: Site) -> None:
    """Purged behind the node's back: the file is gone, the look-up is remembered."""
    site.put(origin_object("1", OLD, '"v1"'))
    assert (await site.until_hit()).body == OLD
    site.put(origin_object("1", NEW, '"v2"'))
    for place in ("objects", "records"):
        for path in (site.stack.volume / place).rglob("1"):
            path.unlink()
    async with asyncio.timeout(10):
        while (await get(site.stack.url("1"), method="HEAD")).headers["x-cache"] == "hit":  # noqa: ASYNC110
            await asyncio.sleep(0.05)  # an open file is served for a moment
    answer = await site.get()
    assert (answer.status, answer.body, answer.headers["etag"]) == (200, NEW, '"v2"')
    hit = await site.until_hit()
    assert (hit.body, hit.headers["etag"]) == (NEW, '"v2"')


async def test_one_refused_object_is_no_outage(site: Site) -> None:
    site.put(origin_object("1", OLD, '"v1"'))
    site.put(origin_object("2", NEW, '"v1"'))
    site.origin.faults.add(Fault(status=403), Match(object_id="1"))
    assert (await site.get()).status == 404
    assert (await site.get(object_id="2")).status == 200


@pytest.mark.parametrize("status", [404, 410, 403, 451])
async def test_an_object_that_is_gone_after_the_look_up(site: Site, status: int) -> None:
    site.put(origin_object("1", OLD, '"v1"'))
    await get(site.stack.url("1"), method="HEAD")
    site.origin.faults.add(Fault(status=status))
    assert (await site.get()).status == 404


@pytest.mark.parametrize("status", [301, 302, 307])
async def test_a_redirect_to_a_url_that_is_valid_for_a_moment(site: Site, status: int) -> None:
    async with StorageNode([]).run() as signed:
        signed.objects["1"] = origin_object("1", OLD, '"v1"')
        target = f"{signed.object_url('1')}?signature=first"
        site.origin.faults.add(Fault(redirect_to=target, status=status))
        assert (await get(site.stack.url("1"), method="HEAD")).headers["content-length"] == str(SIZE)
        site.origin.faults.clear()
        site.origin.faults.add(Fault(redirect_to=target.replace("first", "second"), status=status))
        answer = await site.get()
        assert (answer.status, answer.body) == (200, OLD)
        assert {record.path.rpartition("=")[2] for record in signed.requests if record.method == "GET"} == {
            "second"
        }


@pytest.mark.parametrize("etag", ['W/"v1"', ""])
async def test_clients_see_the_origins_own_validators(site: Site, etag: str) -> None:
    site.put(origin_object("1", OLD, etag, 1_000_000_000))
    miss, hit = await site.get(), await site.until_hit()
    for answer in (miss, hit):
        assert answer.headers.get("etag", "") == etag
        assert answer.headers["last-modified"] == "Sun, 09 Sep 2001 01:46:40 GMT"
    assert (await site.get({"Range": "bytes=0-9", "If-Range": etag or '"x"'})).status == 200


# With processes that are killed, on real Redis and RabbitMQ.


@pytest.fixture
async def cluster(tmp_path: Path, redis_url: str, amqp_url: str) -> AsyncIterator[Site]:
    stack = Stack(tmp_path, redis_url, amqp_url, f"e2e-{uuid.uuid4().hex[:8]}")
    stack.environment |= {
        "DISTRIBUTOR_CATALOG__KIND": "origin",
        "DISTRIBUTOR_FETCH__LEASE": "3",
        "DISTRIBUTOR_FETCH__LEASE_RENEWAL": "1",
    }
    async with StorageNode([]).run() as origin:
        stack.environment["DISTRIBUTOR_CATALOG__ORIGIN"] = origin.object_url("{id}")
        try:
            yield Site(stack, origin)
        finally:
            stack.kill_all()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (('"v1"', 1000), ('"v2"', 2000)),
        (('W/"v1"', 1000), ('W/"v1"', 1000)),
        (("", None), ("", None)),
    ],
    ids=["strong", "weak", "nothing"],
)
async def test_an_object_replaced_while_its_fetcher_is_dead(
    cluster: Site, old: tuple[str, int | None], new: tuple[str, int | None]
) -> None:
    cluster.put(origin_object("1", OLD, *old))
    cluster.origin.faults.add(Fault(bytes_per_second=1 * MIB), Match(endpoint="files", method="GET", first=1))
    await cluster.stack.up()
    (fetcher,) = cluster.stack.of("fetcher")
    following = asyncio.create_task(cluster.get())
    await cluster.stack.until_on_volume(CUT)
    fetcher.kill()
    cluster.put(origin_object("1", NEW, *new))
    cluster.stack.add("fetcher")
    assert_one_version(await following)
    hit = await cluster.until_hit()
    assert hit.body == NEW
    assert cluster.stored() == NEW


async def test_an_unchanged_object_with_a_strong_tag_is_resumed_by_another_fetcher(cluster: Site) -> None:
    cluster.put(origin_object("1", OLD, '"v1"', 1000))
    cluster.origin.faults.add(Fault(bytes_per_second=1 * MIB), Match(endpoint="files", method="GET", first=1))
    await cluster.stack.up()
    (fetcher,) = cluster.stack.of("fetcher")
    following = asyncio.create_task(cluster.get())
    await cluster.stack.until_on_volume(CUT)
    fetcher.kill()
    cluster.stack.add("fetcher")
    answer = await following
    assert (answer.complete, answer.body) == (True, OLD)
    assert (await cluster.until_hit()).body == OLD
    resumed = cluster.origin.requests.of("1", "GET")[-1]
    assert resumed.range is not None
    assert resumed.headers["if-range"] == '"v1"'


# Mirrors of a manifest without hashes.


@pytest.mark.parametrize(("first", "second"), [('"a"', '"b"'), ("", ""), ('W/"a"', 'W/"a"')])
async def test_mirrors_that_hold_different_bytes_are_never_joined(
    tmp_path: Path, first: str, second: str
) -> None:
    stack = Stack(tmp_path, "memory://", "memory://", "alone")
    async with (
        StorageNode([origin_object("1", OLD, first)]).run() as one,
        StorageNode([origin_object("1", NEW, second)]).run() as other,
    ):
        one.faults.add(Fault(cut_after=CUT), FILES)
        write_bare_manifest(stack.manifest, "1", SIZE, [one.object_url("1"), other.object_url("1")])
        try:
            await stack.add("standalone").healthy()
            site = Site(stack, one)
            assert_one_version(await site.get())
            assert (await site.until_hit()).body == NEW, "the first one always breaks off"
        finally:
            stack.kill_all()


@pytest.mark.parametrize("content_hash", [f"sha256:{'0' * 64}", None])
async def test_a_manifest_entry_of_size_zero_is_not_believed(
    tmp_path: Path, content_hash: str | None
) -> None:
    stack = Stack(tmp_path, "memory://", "memory://", "alone")
    async with StorageNode([origin_object("1", OLD)]).run() as origin:
        write_bare_manifest(stack.manifest, "1", 0, [origin.object_url("1")], content_hash)
        try:
            await stack.add("standalone").healthy()
            answer = await Site(stack, origin).get()
            assert (
                (answer.status, answer.body) == (200, OLD) if content_hash is None else answer.status == 502
            )
        finally:
            stack.kill_all()


def write_bare_manifest(
    path: Path, object_id: str, size: int, urls: Sequence[str], content_hash: str | None = None
) -> None:
    """One object of which the manifest says no more than this."""
    entry = {"id": object_id, "size": size, "urls": list(urls)}
    if content_hash is not None:
        entry["hash"] = content_hash
    path.write_text(json.dumps({"version": 1, "objects": [entry]}))
