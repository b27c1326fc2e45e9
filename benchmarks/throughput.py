"""Throughput of fetchers, beside `curl` writing the same objects from the same source."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks.accounting import cost_of
from benchmarks.client import fetch_once
from benchmarks.dataset import file_on_volume
from benchmarks.figures import Case, Measurement, rotated
from benchmarks.misses import UnusedObjects, wait_for_hit
from benchmarks.node import Node
from benchmarks.origin import Origin
from benchmarks.peers import Peer

CURL, CURL_SYNCED = "curl -o", "curl -o, then sync"
ONE_FETCHER, THREE_FETCHERS, THREE_CURLS = "ours, 1 fetcher", "ours, 3 fetchers", "3 × curl -o, then sync"
FIRST_BYTE = "Range: bytes=0-0\r\n"
_STORED_SECONDS = 120.0

FETCH_CASES = {
    "fetch": Case("fetch", "one large object, verified and on disk", "megabytes_per_second", ONE_FETCHER),
    "fetch-three": Case(
        "fetch-three", "three large objects, three fetchers", "megabytes_per_second", THREE_FETCHERS
    ),
}


class Contender(NamedTuple):
    """`fetchers` of ours, or none and `curl`; each contender takes so many new objects at once."""

    name: str
    fetchers: int
    objects: int


CONTENDERS = {
    "fetch": (Contender(CURL, 0, 1), Contender(CURL_SYNCED, 0, 1), Contender(ONE_FETCHER, 1, 1)),
    "fetch-three": (
        Contender(ONE_FETCHER, 1, 1),
        Contender(THREE_FETCHERS, 3, 3),
        Contender(THREE_CURLS, 0, 3),
    ),
}


def new_each_round(case: str) -> int:
    """Objects that one round of this case takes."""
    return sum(contender.objects for contender in CONTENDERS[case])


class FetchBench:
    """Large objects, from asking for one byte until HEAD says hit: downloaded, hashed, synced, renamed, committed. They
    are removed once measured: the disk holds three at most."""

    def __init__(self, node: Node, api: Peer, origin: Origin, size: int, folder: Path) -> None:
        self._node, self._api, self._origin = node, api, origin
        self._size = size
        self._folder = folder

    def measure(self, case: Case, unused: UnusedObjects, rounds: int) -> Iterator[Measurement]:
        for number in range(rounds):
            for name, fetchers, objects in rotated(CONTENDERS[case.name], number):
                ids = [unused.take() for _ in range(objects)]
                os.sync()
                figures = self._ours(fetchers, ids) if fetchers else self._curl(ids, sync=name != CURL)
                yield Measurement(case.name, name, number, figures)

    def _ours(self, fetchers: int, ids: Sequence[str]) -> dict[str, float]:
        """The node's own fetcher is stopped: only those started here work, one object each at a time."""
        started = [self._node.start("fetcher", DISTRIBUTOR_FETCH__CONCURRENCY="1") for _ in range(fetchers)]
        try:
            pids = [fetcher.pid for fetcher in started]
            before, began = cost_of(pids), time.perf_counter()
            with ThreadPoolExecutor(len(ids)) as threads:
                list(threads.map(self._fetch, ids))
            seconds, after = time.perf_counter() - began, cost_of(pids)
        finally:
            for fetcher in started:
                fetcher.stop()
        self._node.purge(ids)
        figures = self._figures(seconds, len(ids))
        cpu = after.cpu_seconds - before.cpu_seconds
        return {
            **figures,
            "cpu_s_per_gb": cpu / (self._size * len(ids) / 1e9),
            "rss_mb": after.rss_bytes / 1e6,
        }

    def _fetch(self, object_id: str) -> None:
        """Requests for the whole time would take CPU time from the fetch: ask once the file is in its place."""
        fetch_once(self._api.url + object_id, FIRST_BYTE)
        stored, deadline = file_on_volume(self._node.volume, object_id), time.monotonic() + _STORED_SECONDS
        while not stored.exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        wait_for_hit(self._api.url + object_id)

    def _curl(self, ids: Sequence[str], *, sync: bool) -> dict[str, float]:
        targets = [self._folder / f"curl-{object_id}" for object_id in ids]
        began = time.perf_counter()
        try:
            with ThreadPoolExecutor(len(ids)) as threads:
                list(
                    threads.map(lambda each: self._curl_one(*each, sync=sync), zip(ids, targets, strict=True))
                )
            return self._figures(time.perf_counter() - began, len(ids))
        finally:
            for target in targets:
                target.unlink(missing_ok=True)

    def _curl_one(self, object_id: str, target: Path, *, sync: bool) -> None:
        command = ["curl", "--silent", "--fail", "--output", str(target), self._origin.files_url + object_id]
        subprocess.run(command, check=True, timeout=300)
        if sync:
            subprocess.run(["sync", str(target)], check=True, timeout=300)

    def _figures(self, seconds: float, objects: int) -> dict[str, float]:
        return {"megabytes_per_second": self._size * objects / seconds / 1e6, "seconds": seconds}
