"""Hits of an undisturbed object while sources and clients do their worst: no error, and as quick as before."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.figures import record_result
from tests.chaos.hostile_load import Hits, loads, node_beside_hostile_source

pytestmark = [pytest.mark.chaos, pytest.mark.alone, pytest.mark.timeout(180)]

QUIET_SECONDS, DISTURBED_SECONDS = 5.0, 10.0
P99_FLOOR = 0.005
"""Seconds. Below it, the scheduler of a busy machine is what is measured."""


def p99(taken: list[float]) -> float:
    return sorted(taken)[int(len(taken) * 0.99)]


@pytest.mark.parametrize("load", ["one-byte chunks", "interim responses", "slow readers", "connections"])
async def test_hits_while_others_do_their_worst(tmp_path: Path, load: str) -> None:
    async with node_beside_hostile_source(tmp_path) as stack:
        hits = Hits(stack.port)
        quiet = p99(await hits.measure(QUIET_SECONDS))
        disturbed = p99(await hits.measure_under(loads(stack)[load], DISTURBED_SECONDS))
    assert not hits.errors
    ratio = max(disturbed, P99_FLOOR) / max(quiet, P99_FLOOR)
    record_result(f"hostile_{load}", p99_quiet=quiet, p99_disturbed=disturbed, p99_ratio=ratio)
    assert ratio <= 3, f"p99 {quiet * 1000:.1f} ms, under load {disturbed * 1000:.1f} ms"
