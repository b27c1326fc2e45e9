"""Headers of asset responses that existing clients rely on, case by case."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from email.utils import formatdate
from pathlib import Path

import pytest

from distributor_node.services.api.headers import PREFLIGHT
from distributor_node.services.demo.faults import Fault
from distributor_node.services.demo.objects import MODIFIED_AT
from distributor_node.shared.domain.objects import Assignment, DistributionBucket
from tests.end_to_end.client import Answer, get
from tests.integration.assets_harness import STORED_AT, AssetsHarness, assets_harness
from tests.waiting import eventually

SIZE = 5000
STORED, PENDING, MISSING = "1", "2", "3"
FOR_EVER, FOR_NOW = "public, max-age=31536000, immutable", "max-age=180, must-revalidate"
ALWAYS = {
    "access-control-allow-origin": "*",
    "timing-allow-origin": "*",
    "cross-origin-resource-policy": "cross-origin",
    "x-content-type-options": "nosniff",
}
CONTENT = {"accept-ranges": "bytes", "content-type": "image/png"}
EXPOSED = {"X-Cache", "X-Data-Source", "ETag", "Content-Length", "Content-Range", "Accept-Ranges", "Age"}
ERROR = {"content-type": "application/json", "cache-control": "no-store"}
NO_CONTENT_HERE = ("content-type", "content-range", "accept-ranges", "content-disposition")


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[AssetsHarness]:
    async with assets_harness(tmp_path, first_byte_wait=0.1, proxied_first_byte_wait=0.3) as running:
        for object_id in (STORED, PENDING, MISSING):
            running.add(object_id, SIZE)
        running.store(STORED)
        yield running


def assert_says(answer: Answer, status: int, said: Mapping[str, str], *unsaid: str) -> None:
    """Exactly these values, none of the headers `unsaid`, and what every asset answer has."""
    expected = {**ALWAYS, **said}
    assert (answer.status, {name: answer.headers.get(name) for name in expected}) == (status, expected)
    assert [name for name in unsaid if name in answer.headers] == []
    assert {name.strip() for name in answer.headers["access-control-expose-headers"].split(",")} >= EXPOSED
    assert_keeps_scripts_out(answer.headers["content-security-policy"])
    assert answer.headers["x-request-id"]


def assert_keeps_scripts_out(policy: str) -> None:
    """An HTML or SVG object runs nothing; images, audio and video on their own still play."""
    directives = {name: values for name, *values in (part.split() for part in policy.split(";"))}
    assert directives["sandbox"] == []
    assert directives["default-src"] == ["'none'"]
    assert not {"script-src", "script-src-elem", "object-src", "frame-src"} & set(directives)
    for name in ("img-src", "media-src"):
        assert "'self'" in directives[name]


def content(
    harness: AssetsHarness, object_id: str, cache: str, source: str | None, cache_status: str
) -> dict[str, str]:
    told = {"x-data-source": source} if source is not None else {}
    return {
        **CONTENT,
        **told,
        "x-cache": cache,
        "cache-control": FOR_EVER if cache == "hit" else FOR_NOW,
        "cache-status": cache_status,
        "etag": harness.catalog.objects[object_id].etag or "",
        "content-length": str(SIZE),
        "content-disposition": f'inline; filename="{object_id}.png"',
    }


def part(said: Mapping[str, str], first: int, last: int) -> dict[str, str]:
    length = str(last - first + 1)
    return {**said, "content-length": length, "content-range": f"bytes {first}-{last}/{SIZE}"}


async def test_a_hit(harness: AssetsHarness) -> None:
    dated = {"last-modified": formatdate(STORED_AT, usegmt=True)}
    said = content(harness, STORED, "hit", "local", "distributor; hit") | dated
    assert_says(await harness.get(STORED), 200, said, "content-range")
    assert_says(await harness.get(STORED, {"Range": "bytes=5-9"}), 206, part(said, 5, 9))
    said.pop("x-data-source")
    assert_says(await harness.get(STORED, method="HEAD"), 200, said, "x-data-source", "content-range")
    kept = {
        name: said[name] for name in ("x-cache", "cache-control", "cache-status", "etag", "last-modified")
    }
    for method in ("GET", "HEAD"):
        answer = await harness.get(STORED, {"If-None-Match": said["etag"]}, method=method)
        assert_says(answer, 304, kept, "x-data-source", "content-length", *NO_CONTENT_HERE)


async def test_streaming_while_it_is_fetched(harness: AssetsHarness) -> None:
    missed = asyncio.create_task(harness.get(MISSING))
    await eventually(harness.has_job)
    fetch = await harness.begin(MISSING, written=SIZE)
    fetch.verify()
    pending = await harness.get(MISSING)
    inner = await harness.get(MISSING, {"Range": "bytes=5-9"})
    head = await harness.get(MISSING, method="HEAD")
    current = await harness.get(MISSING, {"If-None-Match": "*"})
    said = content(harness, MISSING, "miss", "local", "distributor; fwd=uri-miss; stored")
    assert_says(await missed, 200, said, "content-range", "last-modified")
    said = content(harness, MISSING, "pending", "local", "distributor; fwd=uri-miss; stored; collapsed")
    assert_says(pending, 200, said, "content-range", "last-modified")
    assert_says(inner, 206, part(said, 5, 9), "last-modified")
    assert_says(head, 200, content(harness, MISSING, "pending", None, "distributor"), "x-data-source")
    kept = {name: said[name] for name in ("x-cache", "cache-control", "etag")} | {
        "cache-status": "distributor"
    }
    assert_says(current, 304, kept, "x-data-source", "content-length", *NO_CONTENT_HERE)
    await fetch.complete()


async def test_what_is_proxied(harness: AssetsHarness) -> None:
    said = content(harness, MISSING, "miss", None, "distributor")
    assert_says(await harness.get(MISSING, method="HEAD"), 200, said, "x-data-source", "last-modified")
    answer = await harness.get(MISSING, {"If-None-Match": said["etag"]})
    kept = {name: said[name] for name in ("x-cache", "cache-control", "cache-status", "etag")}
    assert_says(answer, 304, kept, "x-data-source", "content-length", *NO_CONTENT_HERE)
    assert await harness.jobs() == 0
    told = {"last-modified": formatdate(MODIFIED_AT, usegmt=True)}  # the source's
    said = content(harness, MISSING, "miss", "external", "distributor; fwd=uri-miss") | told
    assert_says(await harness.get(MISSING), 200, said, "content-range")
    said = content(harness, MISSING, "pending", "external", "distributor; fwd=uri-miss") | told
    assert_says(await harness.get(MISSING), 200, said, "content-range")
    assert_says(await harness.get(MISSING, {"Range": "bytes=5-"}), 206, part(said, 5, SIZE - 1))


async def test_what_is_not_cached(harness: AssetsHarness) -> None:
    harness.add(PENDING, SIZE, size=None)
    said = content(harness, PENDING, "miss", "external", "distributor; fwd=bypass")
    said["last-modified"] = formatdate(MODIFIED_AT, usegmt=True)
    assert_says(await harness.get(PENDING), 200, said, "content-range")


async def test_errors(harness: AssetsHarness) -> None:
    for node in (harness.node, harness.second):
        node.faults.add(Fault(status=500))
    harness.add("4", SIZE, buckets=(DistributionBucket("9:9"),))
    refused = {**ERROR, "x-cache": "hit"}
    unsaid = (
        "etag",
        "last-modified",
        "x-data-source",
        "cache-status",
        "accept-ranges",
        "content-disposition",
    )
    answer = await harness.get(STORED, {"Range": f"bytes={SIZE}-"})
    assert_says(answer, 416, {**refused, "content-range": f"bytes */{SIZE}"}, *unsaid)
    answer = await harness.get(STORED, {"If-Match": '"other"'})
    assert_says(answer, 412, refused, "content-range", *unsaid)
    assert_says(await harness.get(MISSING), 502, ERROR, "x-cache", *unsaid)
    for object_id, status in (("999", 404), ("%20", 404), ("%00", 400)):
        for method in ("GET", "HEAD"):
            assert_says(await harness.get(object_id, method=method), status, ERROR, "x-cache", *unsaid)
    harness.context.assignment.current = Assignment(bucket_ids=frozenset({"0:1"}))
    assert_says(await harness.get("4"), 421, ERROR, "x-cache", *unsaid)
    harness.catalog.down = True
    assert_says(await harness.get("5"), 503, {**ERROR, "retry-after": "5"}, "x-cache", *unsaid)


async def test_a_source_that_is_too_slow(harness: AssetsHarness) -> None:
    for node in (harness.node, harness.second):
        node.faults.add(Fault(hang_before_headers=True))
    assert_says(await harness.get(MISSING), 504, ERROR, "x-cache", "etag")


@pytest.mark.parametrize("object_id", [STORED, "999", "%20"])
async def test_a_preflight(harness: AssetsHarness, object_id: str) -> None:
    asked = {"Origin": "https://player.example", "Access-Control-Request-Method": "GET"}
    answer = await harness.get(object_id, asked, method="OPTIONS")
    assert_says(answer, 204, {"access-control-allow-methods": "GET, HEAD, OPTIONS"}, "content-type")
    allowed = {name.strip() for name in answer.headers["access-control-allow-headers"].split(",")}
    assert {"Range", "If-Range", "If-None-Match", "If-Modified-Since"} <= allowed
    assert int(answer.headers["access-control-max-age"]) > 0
    assert "access-control-allow-private-network" not in answer.headers


ASKED = "authorization,cmcd-object,cmcd-request,cmcd-session,content-type,pragma,priority,traceparent,x-requested-with"
USUAL = PREFLIGHT["Access-Control-Allow-Headers"]


@pytest.mark.parametrize(
    ("asked", "allowed"),
    [
        (ASKED, ASKED),
        (" CMCD-Object ,\tRange ", "CMCD-Object ,\tRange"),
        ("cmcd-object,,range", USUAL),
        ("cmcd object", USUAL),
        ("x-a: b", USUAL),
        ("x-\xe4", USUAL),
        (",", USUAL),
        (",".join(["x-header"] * 227), ",".join(["x-header"] * 227)),  # 2042 characters
        (",".join(["x-header"] * 228), USUAL),
    ],
)
@pytest.mark.parametrize("path", ["assets", "status"])
async def test_a_preflight_allows_the_headers_that_are_asked_for(
    harness: AssetsHarness, path: str, asked: str, allowed: str
) -> None:
    preflight = {
        "Origin": "https://player.example",
        "Access-Control-Request-Method": "GET",
        "Access-Control-Request-Headers": asked,
        "Access-Control-Request-Private-Network": "true",
    }
    base = f"http://127.0.0.1:{harness.port}/api/v1/"
    url = f"{base}assets/{STORED}" if path == "assets" else base + path
    answer = await get(url, preflight, method="OPTIONS")
    told = {
        "access-control-allow-headers": allowed,
        "access-control-allow-private-network": "true",
        "access-control-allow-origin": "*",
        "access-control-max-age": "86400",
    }
    assert (answer.status, {name: answer.headers.get(name) for name in told}) == (204, told)


async def test_a_head_of_a_miss_has_a_content_type_only_if_it_is_known(harness: AssetsHarness) -> None:
    """The GET finds another one than application/octet-stream: the source's, or what the first bytes say."""
    harness.add("4", SIZE, media_type=None)
    head = await harness.get("4", method="HEAD")
    assert (head.status, head.headers["content-length"]) == (200, str(SIZE))
    assert "content-type" not in head.headers
    assert (await harness.get("4")).headers["content-type"] == "video/mp4"
    assert (await harness.get(MISSING, method="HEAD")).headers["content-type"] == "image/png"
    harness.add("5", SIZE, media_type=None, size=None)
    head = await harness.get("5", method="HEAD")
    assert "content-type" not in head.headers


async def test_a_trailing_slash_is_the_same_resource(harness: AssetsHarness) -> None:
    base = f"http://127.0.0.1:{harness.port}/api/v1/"
    for path in ("status", "buckets", "openapi.json", f"assets/{STORED}"):
        answer = await get(f"{base}{path}/")
        assert answer.status == 200, path
        assert answer.headers["content-type"] == (await get(base + path)).headers["content-type"]
    assert (await get(f"{base}assets/{STORED}/?x=1", method="HEAD")).headers["x-cache"] == "hit"
    assert (await get(f"{base}assets/{STORED}/", method="OPTIONS")).status == 204
    for path, status in (("status//", 404), ("assets/", 400), (f"assets/{STORED}//", 404), ("", 404)):
        assert (await get(base + path)).status == status, path


PNG = 'filename="1.png"'


@pytest.mark.parametrize(
    ("query", "disposition"),
    [
        ("", f"inline; {PNG}"),
        ("?other=1", f"inline; {PNG}"),
        ("?download", f"attachment; {PNG}"),
        ("?download=", f"attachment; {PNG}"),
        ("?a=b&download", f"attachment; {PNG}"),
        ("?download=my+cat%20(1).png", 'attachment; filename="my cat (1).png"'),
        ("?download=caf%C3%A9.png", "attachment; filename=\"caf_.png\"; filename*=UTF-8''caf%C3%A9.png"),
        ("?download=100%25.png", "attachment; filename=\"100_.png\"; filename*=UTF-8''100%25.png"),
        ("?download=..%2F..%2Fetc%2Fpasswd", 'attachment; filename="_.._etc_passwd"'),
        ("?download=a%22%3B%0D%0ASet-Cookie:x.png", 'attachment; filename="a_;Set-Cookie_x.png"'),
        ("?download=evil%E2%80%AEgpj.exe", 'attachment; filename="evilgpj.exe"'),
        ("?download=%2E%2E", f"attachment; {PNG}"),
        ("?download=" + "x" * 500, f'attachment; filename="{"x" * 150}"'),
        ("?" + "a&" * 200 + "download", f"inline; {PNG}"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_the_name_of_a_saved_file(
    harness: AssetsHarness, query: str, disposition: str, method: str
) -> None:
    answer = await harness.get(STORED + query, method=method)
    assert (answer.status, answer.headers["content-disposition"]) == (200, disposition)
    part_of_it = await harness.get(STORED + query, {"Range": "bytes=5-"}, method="GET")
    assert (part_of_it.status, part_of_it.headers["content-disposition"]) == (206, disposition)


async def test_the_catalogs_name_goes_with_the_object(harness: AssetsHarness) -> None:
    """Proxied, then a hit, which asks no catalog."""
    named = "inline; filename=\"4.png\"; filename*=UTF-8''Sunrise%E2%98%80%20_%20Day%202.png"
    harness.add("4", SIZE, name="Sunrise☀ / Day 2")
    assert (await harness.get("4", method="HEAD")).headers["content-disposition"] == named
    assert (await harness.get("4")).headers["content-disposition"] == named
    harness.store("4")
    hit = await harness.get("4")
    assert (hit.headers["x-cache"], hit.headers["content-disposition"]) == ("hit", named)
    saved = (await harness.get("4?download")).headers["content-disposition"]
    assert saved == named.replace("inline", "attachment")


@pytest.mark.parametrize(
    ("media_type", "kind", "extension"),
    [
        ("text/html; charset=utf-8", "attachment", ".html"), ("image/svg+xml", "attachment", ".svg"),
        ("application/xml", "attachment", ".xml"), ("application/pdf", "attachment", ".pdf"),
        ("application/rss+xml", "attachment", ""), ("Video/MP4", "inline", ".mp4"), ("text/vtt", "inline", ".vtt"),
        ("application/octet-stream", "inline", ""),
    ],
)  # fmt: skip
async def test_documents_are_saved_and_not_opened(
    harness: AssetsHarness, media_type: str, kind: str, extension: str
) -> None:
    harness.add("4", SIZE, media_type=media_type)
    answer = await harness.get("4", method="HEAD")
    assert answer.headers["content-disposition"] == f'{kind}; filename="4{extension}"'
