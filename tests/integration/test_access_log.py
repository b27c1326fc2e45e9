"""The access log record is the same from both paths, with the size of the object whatever range was requested."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from distributor_node.services.replay.access_logs import parse_line
from tests.integration.assets_harness import KIB, assets_harness
from tests.waiting import eventually

SIZE = 40 * KIB
_OF_THE_MOMENT = {"request_id", "duration_ms"}
ASKED: tuple[tuple[str, Mapping[str, str]], ...] = (
    ("GET", {}),
    ("GET", {"Range": "bytes=100-299"}),
    ("HEAD", {}),
)


async def lines_of(root: Path, *, fast_lane: bool) -> list[Mapping[str, Any]]:
    """What is logged of some hits, a 304 and a miss that is proxied."""
    async with assets_harness(root, log_hits=True, fast_lane=fast_lane) as harness:
        for object_id in ("1", "2"):
            harness.add(object_id, SIZE)
        harness.store("1")
        with capture_logs() as logs:
            answers = [await harness.get("1", headers, method=method) for method, headers in ASKED]
            await harness.get("1", {"If-None-Match": answers[-1].headers["etag"]})
            await harness.get("2", {"Range": "bytes=0-9"})
            await eventually(lambda: len(_answers(logs)) == len(ASKED) + 2)
    return _answers(logs)


def _answers(logs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [line for line in logs if line["event"] == "request_answered"]


@pytest.fixture
async def by_lane(tmp_path: Path) -> Mapping[bool, list[Mapping[str, Any]]]:
    return {fast: await lines_of(tmp_path / str(fast), fast_lane=fast) for fast in (True, False)}


async def test_both_paths_log_alike_and_include_the_size(
    by_lane: Mapping[bool, list[Mapping[str, Any]]],
) -> None:
    lasting = [
        [{name: value for name, value in line.items() if name not in _OF_THE_MOMENT} for line in lines]
        for lines in by_lane.values()
    ]
    assert lasting[0] == lasting[1]
    fields = ("status", "bytes", "range_start", "size", "x_cache")
    assert [tuple(line[name] for name in fields) for line in by_lane[True]] == [
        (200, SIZE, None, SIZE, "hit"),
        (206, 200, 100, SIZE, "hit"),
        (200, 0, None, SIZE, "hit"),
        (304, 0, None, SIZE, "hit"),
        (206, 10, 0, SIZE, "miss"),
    ]


@pytest.mark.parametrize("fast_lane", [True, False])
async def test_the_clients_address_is_logged_where_it_is_asked_for(tmp_path: Path, fast_lane: bool) -> None:
    """Of a hit, a miss and an error; by what trusted proxies say."""
    options: dict[str, Any] = {"fast_lane": fast_lane, "log_hits": True, "trusted_proxies": ["127.0.0.1"]}
    forwarded = {"X-Forwarded-For": "198.51.100.7, 2001:db8:0:1::9"}
    for log_clients in (True, False):
        async with assets_harness(tmp_path / str(log_clients), log_clients=log_clients, **options) as harness:
            for object_id in ("1", "2"):
                harness.add(object_id, SIZE)
            harness.store("1")
            with capture_logs() as logs:
                for object_id in ("1", "2", "unknown"):
                    await harness.get(object_id, forwarded)
                await harness.get("1")
                await eventually(lambda: len(_answers(logs)) == 4)
        seen = [line.get("client") for line in _answers(logs)]
        assert seen == (["2001:db8:0:1::9"] * 3 + ["127.0.0.1"] if log_clients else [None] * 4)


async def test_a_replay_learns_the_size_and_the_first_byte_from_any_part(
    by_lane: Mapping[bool, list[Mapping[str, Any]]],
) -> None:
    read = [
        parse_line(json.dumps({**line, "timestamp": "2025-11-24T16:00:02.500000Z"})) for line in by_lane[True]
    ]
    assert [(line.sent, line.size, line.first) for line in read if line is not None] == [
        (SIZE, SIZE, 0), (200, SIZE, 100), (0, SIZE, None), (10, SIZE, 0),
    ]  # fmt: skip
