"""The edge sends hits from the volume by itself (X-Accel-Redirect)."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import time

import pytest

from tests.docker.compose import samples
from tests.docker.edge import NAMES, REQUESTS, assert_same
from tests.docker.harness import NOTES, Harness
from tests.end_to_end.client import get

pytestmark = pytest.mark.docker

PREFIX = "/_volume/of-objects"
"""Any will do."""
ACCEL_REDIRECT = {"X-Sendfile-Type": "X-Accel-Redirect"}


@pytest.fixture(scope="module", autouse=True)
def _handing_over(harness: Harness) -> None:
    harness.stack.settings["ACCEL_REDIRECT_PREFIX"] = PREFIX
    harness.stack.up()


@pytest.mark.parametrize("headers", REQUESTS, ids=NAMES)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_an_accel_redirect_hit_is_identical(
    harness: Harness, method: str, headers: dict[str, str]
) -> None:
    await assert_same(harness, method, headers)


async def test_the_edge_sends_it_and_the_api_counts_it(harness: Harness) -> None:
    await harness.cached(["64"])
    offered = await get(harness.stack.url("64"), ACCEL_REDIRECT)
    assert (offered.status, offered.body) == (200, b"")
    assert offered.headers["x-accel-redirect"].startswith(f"{PREFIX}/")
    before = _sent(harness)
    began = time.monotonic()
    answer = await get(harness.stack.edge_url("/api/v1/assets/64"))
    NOTES.append(f"64 MiB handed over to the edge and sent in {time.monotonic() - began:.2f} s")
    assert harness.right(answer, "64")
    assert _sent(harness) - before == len(answer.body)


def _sent(harness: Harness) -> float:
    return samples(harness.stack.metrics("api"), "distributor_sent_bytes_total")['{source="local"}']


async def test_no_header_comes_twice_and_the_internal_path_is_hidden(harness: Harness) -> None:
    await harness.cached(["5"])

    def ask() -> list[str]:
        connection = http.client.HTTPConnection("127.0.0.1", harness.stack.ports["EDGE_PORT"], timeout=20)
        with contextlib.closing(connection):
            connection.request("GET", harness.stack.settings["EDGE_PREFIX"] + "/api/v1/assets/5")
            return [name.lower() for name, _ in connection.getresponse().getheaders()]

    names = await asyncio.to_thread(ask)
    assert len(set(names)) == len(names), names
    assert not [name for name in names if name.startswith("x-accel")]


async def test_the_internal_locations_cannot_be_requested(harness: Harness) -> None:
    await harness.cached(["5"])
    place = (await get(harness.stack.url("5"), ACCEL_REDIRECT)).headers["x-accel-redirect"]
    base = harness.stack.edge_url("").removesuffix(harness.stack.settings["EDGE_PREFIX"])
    for path in (place, f"{harness.stack.settings['EDGE_PREFIX']}{place}", f"{place}/../../5"):
        assert (await get(base + path)).status == 404, path
