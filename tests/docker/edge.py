"""Requests that the API and the edge in front of it must answer alike."""

from __future__ import annotations

from tests.docker.harness import Harness
from tests.end_to_end.client import Answer, get

REQUESTS: list[dict[str, str]] = [
    {},
    {"Range": "bytes=0-"},
    {"Range": "bytes=1000-1999"},
    {"Range": "bytes=-500"},
    {"Range": "bytes=5000000-"},
    {"Range": "bytes=0-0,5-6"},
    {"Range": "bytes=7-3"},
    {"Range": "octets=1-2"},
    {"Range": "bytes=0-99999999999"},
    {"If-None-Match": "ETAG"},
    {"If-None-Match": '"other"'},
    {"If-None-Match": "*"},
    {"If-Match": "ETAG"},
    {"If-Match": '"other"'},
    {"If-Modified-Since": "LAST-MODIFIED"},
    {"If-Modified-Since": "Thu, 01 Jan 1970 00:00:00 GMT"},
    {"If-Unmodified-Since": "Thu, 01 Jan 1970 00:00:00 GMT"},
    {"Range": "bytes=1000-1999", "If-Range": "ETAG"},
    {"Range": "bytes=1000-1999", "If-Range": '"other"'},
    {"Range": "bytes=1000-1999", "If-Range": "LAST-MODIFIED"},
    {"Accept-Encoding": "gzip, br"},
    {"Origin": "https://player.example"},
]
"""Header fields; ETAG and LAST-MODIFIED stand for what the object has."""
NAMES = [", ".join(f"{name}: {value}" for name, value in one.items()) or "plain" for one in REQUESTS]

# Of the connection, the moment and the request; everything else must be the same.
_OF_ITS_OWN = {"date", "server", "connection", "keep-alive", "x-request-id", "transfer-encoding"}


def told(answer: Answer) -> dict[str, str]:
    """The headers that say something of the object, or of the error."""
    return {name: value for name, value in answer.headers.items() if name not in _OF_ITS_OWN}


async def assert_same(harness: Harness, method: str, headers: dict[str, str], object_id: str = "5") -> None:
    """A hit is answered alike by both: status, headers, body."""
    await harness.cached([object_id])
    known = (await get(harness.stack.url(object_id), method="HEAD")).headers
    filled = {
        name: value.replace("ETAG", known["etag"]).replace("LAST-MODIFIED", known["last-modified"])
        for name, value in headers.items()
    }
    direct = await get(harness.stack.url(object_id), filled, method=method)
    through = await get(harness.stack.edge_url(f"/api/v1/assets/{object_id}"), filled, method=method)
    assert (through.status, through.complete) == (direct.status, direct.complete)
    assert through.body == direct.body
    assert told(through) == told(direct)
