"""Hits that nginx sends (X-Accel-Redirect): which ones are, and that they count as hits."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.counters import counted
from tests.integration.assets_harness import MIB, AssetsHarness, assets_harness
from tests.waiting import eventually

ACCEL_REDIRECT = {"X-Sendfile-Type": "X-Accel-Redirect"}
SIZE = 2 * MIB + 5


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[AssetsHarness]:
    async with assets_harness(tmp_path, accel_redirect_prefix="/_objects") as running:
        running.add("1", SIZE)
        running.store("1")
        yield running


def sent_locally() -> float:
    return counted("distributor_sent_bytes_total", source="local")


async def test_an_accel_redirect_offer_is_used_with_all_headers_but_the_bodys(harness: AssetsHarness) -> None:
    before = sent_locally()
    plain = await harness.get("1")
    expected = before + SIZE
    await eventually(lambda: sent_locally() == expected)  # the fast path buffers its metrics
    handed = await harness.get("1", ACCEL_REDIRECT)
    assert (handed.status, handed.body, handed.headers["content-length"]) == (200, b"", "0")
    place = handed.headers["x-accel-redirect"]
    assert place.startswith("/_objects/")
    file = harness.volume.root / "objects" / unquote(place.removeprefix("/_objects/"))
    assert file.read_bytes() == harness.data["1"]
    for name, value in plain.headers.items():
        if name not in {"content-length", "accept-ranges", "x-request-id", "connection", "date"}:
            assert handed.headers[name] == value, name
    assert sent_locally() == expected + SIZE


async def test_a_range_is_accel_redirected_as_a_range(harness: AssetsHarness) -> None:
    before = sent_locally()
    handed = await harness.get("1", {**ACCEL_REDIRECT, "Range": "bytes=1000-1999"})
    assert (handed.status, handed.body) == (206, b"")
    assert "x-accel-redirect" in handed.headers
    assert "content-range" not in handed.headers
    assert sent_locally() == before + 1000


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-Sendfile-Type": "X-Sendfile"},
        {**ACCEL_REDIRECT, "If-Match": "*"},
        {**ACCEL_REDIRECT, "If-None-Match": '"other"'},
        {**ACCEL_REDIRECT, "If-Modified-Since": "Thu, 01 Jan 1970 00:00:00 GMT"},
        {**ACCEL_REDIRECT, "If-Range": '"other"', "Range": "bytes=0-9"},
        {**ACCEL_REDIRECT, "Range": "bytes=0-1,5-6"},
        {**ACCEL_REDIRECT, "Range": "bytes=9-3"},
        {**ACCEL_REDIRECT, "Range": "lines=1-2"},
    ],
    ids=lambda headers: " ".join(headers) or "no offer",
)
async def test_paths_nginx_might_interpret_differently_are_answered_here(
    harness: AssetsHarness, headers: dict[str, str]
) -> None:
    answer = await harness.get("1", headers)
    assert (answer.status, answer.body) == (200, harness.data["1"])
    assert "x-accel-redirect" not in answer.headers


async def test_head_is_answered_here(harness: AssetsHarness) -> None:
    answer = await harness.get("1", ACCEL_REDIRECT, method="HEAD")
    assert answer.headers["content-length"] == str(SIZE)
    assert "x-accel-redirect" not in answer.headers


async def test_without_the_setting_an_offer_is_ignored(tmp_path: Path) -> None:
    async with assets_harness(tmp_path) as harness:
        harness.add("1", SIZE)
        harness.store("1")
        answer = await harness.get("1", ACCEL_REDIRECT)
    assert (answer.status, answer.body) == (200, harness.data["1"])


async def test_an_uncached_object_is_never_accel_redirected(harness: AssetsHarness) -> None:
    harness.add("2", SIZE)
    answer = await harness.get("2", ACCEL_REDIRECT)
    assert (answer.status, answer.body) == (200, harness.data["2"])
    assert "x-accel-redirect" not in answer.headers
