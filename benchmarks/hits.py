"""Measures hits: all contenders hold all objects and are measured in turn, round by round."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import uvloop

from benchmarks.accounting import Cost, cost_of, pin
from benchmarks.cases import HitCase, RequestKind, check_bytes, conditional_ids, requests_for
from benchmarks.client import LoadStats, head_request, run_all
from benchmarks.dataset import Group
from benchmarks.figures import Measurement, percentile, rotated
from benchmarks.load import Load, LoadResult, run_wrk
from benchmarks.peers import VARNISH, Peer, Watched

_WARM_CONNECTIONS = 8


@dataclass(frozen=True, slots=True)
class Conditions:
    """The same for all: seconds of one measurement, rounds, and which CPUs are whose (None: the kernel decides)."""

    seconds: float
    rounds: int
    server_cpus: frozenset[int] | None
    load_cpus: frozenset[int] | None


def warm(peer: Peer, groups: Sequence[Group]) -> None:
    """Ask for everything once: caches are filled, pages are in memory. RuntimeError if an answer is not whole."""
    for group in groups:
        path = urlsplit(peer.url).path
        paths = [path + object_id for object_id in group.ids]
        stats = uvloop.run(run_all(peer.url, paths, _WARM_CONNECTIONS))
        if stats.errors or stats.received != group.size * group.count:
            raise RuntimeError(
                f"{peer.name}: {stats.errors} errors, {stats.received} bytes of {group.size * group.count}"
            )
        head = head_request(peer.url + group.ids[0])
        if head.headers.get("x-cache", "hit").lower() != "hit":
            raise RuntimeError(f"{peer.name} does not cache: {head}")


def measure_case(
    case: HitCase, group: Group, peers: Sequence[Peer], conditions: Conditions
) -> Iterator[Measurement]:
    """Every peer once in each round; which one is first changes from round to round."""
    if case.kind is RequestKind.COLD:  # varnish serves from its own memory, which is never cold
        peers = [peer for peer in peers if peer.name != VARNISH]
    tags = {peer.name: _tags(peer, group) if case.kind is RequestKind.NOT_MODIFIED else {} for peer in peers}
    for number in range(conditions.rounds):
        for peer in rotated(peers, number):
            if not case.workers:
                pin(peer.pids, conditions.server_cpus)
            try:
                with peer.measured(conditions.load_cpus) if isinstance(peer, Watched) else nullcontext():
                    figures = _measure(case, group, peer, conditions, tags[peer.name], number)
            except RuntimeError as error:
                raise RuntimeError(f"{peer.name}: {error}") from error
            yield Measurement(case.name, peer.name, number, figures)


def _measure(
    case: HitCase, group: Group, peer: Peer, conditions: Conditions, tags: dict[str, str], number: int
) -> dict[str, float]:
    cpus = None if case.workers else conditions.load_cpus
    if case.kind in (RequestKind.HEAD, RequestKind.COLD):
        if case.kind is RequestKind.COLD:
            drop_from_memory(peer.files([group]))
        before = cost_of(peer.pids)
        with on_cpus(cpus):
            stats = uvloop.run(_run_python_client(case, group, peer, conditions.seconds))
        check_bytes(case, group, len(stats.latencies), stats.received)
        return _stats_figures(stats, before, cost_of(peer.pids))
    specs = requests_for(case, group, urlsplit(peer.url).path, tags)
    threads = len(os.sched_getaffinity(0)) if case.workers else 1
    load = Load(case.connections, conditions.seconds, threads, cpus, seed=number + 1)
    before = cost_of(peer.pids)
    result = run_wrk(peer.url, specs, load)
    figures = _load_figures(result, before, cost_of(peer.pids))
    check_bytes(case, group, result.requests, result.received)
    return figures


async def _run_python_client(case: HitCase, group: Group, peer: Peer, seconds: float) -> LoadStats:
    path = urlsplit(peer.url).path
    if case.kind is RequestKind.COLD:
        ids = group.ids
        random.Random(2).shuffle(ids)
        return await run_all(peer.url, [path + object_id for object_id in ids], case.connections)
    return await run_all(peer.url, _paths_for(path, group, seconds), case.connections, "HEAD")


def _paths_for(path: str, group: Group, seconds: float) -> Iterator[str]:
    ids, rng, deadline = group.ids, random.Random(3), time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        yield path + rng.choice(ids)


def _load_figures(result: LoadResult, before: Cost, after: Cost) -> dict[str, float]:
    return {
        "requests_per_second": result.requests_per_second,
        "megabytes_per_second": result.megabytes_per_second,
        "p50_ms": result.p50,
        "p99_ms": result.p99,
        "cpu_us_per_request": _cpu_per_request(before, after, result.requests),
        "rss_mb": after.rss_bytes / 1e6,
        "errors": result.errors,
    }


def _stats_figures(stats: LoadStats, before: Cost, after: Cost) -> dict[str, float]:
    answers = len(stats.latencies)
    return {
        "requests_per_second": answers / stats.seconds,
        "megabytes_per_second": stats.received / stats.seconds / 1e6,
        "p50_ms": percentile(stats.latencies, 0.5) * 1e3,
        "p99_ms": percentile(stats.latencies, 0.99) * 1e3,
        "cpu_us_per_request": _cpu_per_request(before, after, answers),
        "rss_mb": after.rss_bytes / 1e6,
        "errors": stats.errors,
    }


def _cpu_per_request(before: Cost, after: Cost, answers: int) -> float:
    return (after.cpu_seconds - before.cpu_seconds) / max(1, answers) * 1e6


def _tags(peer: Peer, group: Group) -> dict[str, str]:
    """Entity tags by id; RuntimeError if there is none."""
    found = {}
    for object_id in conditional_ids(group):
        head = head_request(peer.url + object_id)
        if "etag" not in head.headers:
            raise RuntimeError(f"{peer.name} gave {object_id} no entity tag: {head}")
        found[object_id] = head.headers["etag"]
    return found


def drop_from_memory(files: Sequence[Path]) -> None:
    """Out of the page cache; what is not on disk yet is written first, or it would stay."""
    os.sync()
    for path in files:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def on_cpus(cpus: frozenset[int] | None) -> Iterator[None]:
    """The calling thread on these CPUs for a while."""
    if cpus is None:
        yield
        return
    usual = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, usual)
