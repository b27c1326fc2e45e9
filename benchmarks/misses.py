"""Measures misses: the first byte, the last byte, and many clients for one object."""

from __future__ import annotations

import json
import os
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import uvloop

from benchmarks.client import fetch_once, head_request, run_all
from benchmarks.dataset import Group
from benchmarks.figures import Case, Measurement, percentile, rotated
from benchmarks.node import Node
from benchmarks.origin import Origin
from benchmarks.peers import CACHE, OURS, Peer

DIRECT = "the source itself"
_HIT_SECONDS = 120.0
_BURST = 50
NEW_EACH_SAMPLE = 3
"""Objects: one for the source itself, one for ours, one for nginx."""
NEW_EACH_BURST = 2

MISS_CASES = {
    "miss-64k": Case("miss-64k", "a miss of 64 KiB", "first_byte_ms", OURS, higher_is_better=False),
    "miss-64m": Case("miss-64m", "a miss of 64 MiB", "total_ms", OURS, higher_is_better=False),
    "crowd": Case(
        "crowd",
        f"{_BURST} clients for one new object of 1 MiB",
        "last_client_ms",
        OURS,
        higher_is_better=False,
    ),
}


@dataclass(frozen=True, slots=True)
class UnusedObjects:
    """Objects that have not been requested yet. Each is returned once."""

    ids: Iterator[str]

    @classmethod
    def of(cls, group: Group) -> UnusedObjects:
        return cls(iter(group.ids))

    def take(self) -> str:
        """RuntimeError if there are too few for so many rounds."""
        found = next(self.ids, None)
        if found is None:
            raise RuntimeError("too few new objects for so many rounds")
        return found


@dataclass(frozen=True, slots=True)
class MissBench:
    """Who has the misses, and of which source. What ours has stored is purged once it is measured: the disk does not
    fill up."""

    node: Node
    origin: Origin
    peers: Sequence[Peer]

    def misses(self, case: Case, unused: UnusedObjects, samples: int) -> Iterator[Measurement]:
        """One new object for each contender in each round, one after the other. A first round, in which our processes
        make their connections, does not count."""
        urls = [(DIRECT, self.origin.files_url), *((peer.name, peer.url) for peer in self.peers)]
        for number in range(-1, samples):
            for name, url in rotated(urls, number):
                object_id = unused.take()
                os.sync()  # so that a case does not pay for the writes of the one before
                timing = fetch_once(url + object_id)
                figures = {"first_byte_ms": timing.first_byte * 1e3, "total_ms": timing.total * 1e3}
                if number >= 0:
                    yield Measurement(case.name, name, number, figures)
                self._forget(name, url, object_id)

    def bursts(self, case: Case, unused: UnusedObjects, rounds: int) -> Iterator[Measurement]:
        """Many clients at once; `source_requests` are the GETs that reached the source."""
        for number in range(rounds):
            for peer in rotated(self.peers, number):
                object_id = unused.take()
                url = peer.url + object_id
                os.sync()
                forget_requests(self.origin)
                stats = uvloop.run(run_all(url, [urlsplit(url).path] * _BURST, _BURST))
                figures = {
                    "median_client_ms": percentile(stats.latencies, 0.5) * 1e3,
                    "last_client_ms": max(stats.latencies, default=0.0) * 1e3,
                    "source_requests": float(_requests_for(self.origin, object_id)),
                    "errors": float(stats.errors),
                }
                yield Measurement(case.name, peer.name, number, figures)
                self._forget(peer.name, peer.url, object_id)

    def _forget(self, name: str, url: str, object_id: str) -> None:
        if name == OURS:
            wait_for_hit(url + object_id)
            self.node.purge([object_id])


def forget_requests(origin: Origin) -> None:
    """Clear the source's log."""
    urllib.request.urlopen(urllib.request.Request(origin.log_url, method="DELETE"), timeout=10).close()


def _requests_for(origin: Origin, object_id: str) -> int:
    with urllib.request.urlopen(origin.log_url, timeout=10) as answer:
        seen = json.load(answer)["requests"]
    return sum(1 for each in seen if each["method"] == "GET" and each["path"].endswith(f"/files/{object_id}"))


def wait_for_hit(url: str) -> float:
    """Ask by HEAD until the object is on disk; seconds waited. RuntimeError if that takes too long."""
    began = time.perf_counter()
    while head_request(url).headers.get("x-cache") != "hit":
        if time.perf_counter() - began > _HIT_SECONDS:
            raise RuntimeError(f"{url} did not become a hit")
        time.sleep(0.01)
    return time.perf_counter() - began


def only_comparable(peers: Sequence[Peer]) -> list[Peer]:
    """Those that can have a miss, of one worker: ours and nginx `proxy_cache`."""
    return [peer for peer in peers if peer.name in (OURS, CACHE)]
