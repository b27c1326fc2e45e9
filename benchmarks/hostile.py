"""Measures hits of an undisturbed object while strangers load the node: hostile sources, slow readers, connections."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

from benchmarks.figures import Case, Measurement, percentile
from tests.chaos.hostile_load import Hits, loads, node_beside_hostile_source

QUIET, LOADED = "quiet", "under the load"
_QUIET_SECONDS, _LOADED_SECONDS = 5.0, 10.0
_LOADS = {
    "hostile-chunks": ("one-byte chunks", "hits while a source sends 600 KB in chunks of one byte"),
    "hostile-interim": ("interim responses", "hits while a source sends 103 for ever"),
    "hostile-readers": ("slow readers", "hits beside 200 clients that read nothing of a proxied object"),
    "hostile-connections": ("connections", "hits while connections take all descriptors"),
}
HOSTILE_CASES = {
    name: Case(name, title, "p99_ms", LOADED, higher_is_better=False) for name, (_, title) in _LOADS.items()
}


def measure_hostile(case: Case, rounds: int, folder: Path) -> Iterator[Measurement]:
    """A new node in each round, measured in quiet and then under the load, from its first moment on.

    The contenders are the two phases. RuntimeError if an answer is no right hit.
    """
    for number in range(rounds):
        place = folder / f"{case.name}-{number}"
        place.mkdir(parents=True)
        for phase, taken in asyncio.run(_measure(_LOADS[case.name][0], place)).items():
            figures = {
                "p50_ms": percentile(taken, 0.5) * 1e3,
                "p99_ms": percentile(taken, 0.99) * 1e3,
                "slowest_ms": max(taken) * 1e3,
            }
            yield Measurement(case.name, phase, number, figures)


async def _measure(load: str, folder: Path) -> dict[str, list[float]]:
    async with node_beside_hostile_source(folder) as stack:
        hits = Hits(stack.port)
        taken = {
            QUIET: await hits.measure(_QUIET_SECONDS),
            LOADED: await hits.measure_under(loads(stack)[load], _LOADED_SECONDS),
        }
        if hits.errors:
            raise RuntimeError(f"no right hit: {hits.errors[0]}")
        return taken
