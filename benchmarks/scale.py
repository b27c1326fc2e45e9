"""`make bench-scale`: what 10^4, 10^5 and 10^6 objects cost the node: time, memory, bytes in Redis.

The volume is real; its files are holes of 4 KiB with real records. The catalog is an origin that does not answer:
nothing here needs it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import signal
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from benchmarks.__main__ import RESULTS, exit_on_signal, log, missing_programs
from benchmarks.accounting import cost_of, peak_rss_of
from benchmarks.dataset import KIB, write_object
from benchmarks.figures import Case, Measurement, percentile
from benchmarks.load import Load, RequestSpec, run_wrk
from benchmarks.machine import describe
from benchmarks.node import Node, RunningService
from benchmarks.report import Report, write_results
from benchmarks.store_verbs import EvictionMonitor, StoreVerbs, redis_memory
from distributor_node.shared.adapters.volume import Volume
from distributor_node.shared.adapters.volume.layout import shard
from distributor_node.shared.domain.objects import ObjectId, StoredRecord, entity_tag
from distributor_node.shared.domain.space import footprint

SIZE = 4 * KIB
_RECONCILE_SECONDS = 1200.0
_LOOKUPS = 20_000
_STATUS_SECONDS = 5.0
_HIT_SECONDS = 5.0
_FIRST_ID = 1_000_000_000

STORE = Case("scale-store", "the state store's verbs", "", "")
EVICTOR = Case("scale-evictor", "the evictor", "", "")
API = Case("scale-api", "the API", "", "")


def write_volume(root: Path, count: int) -> None:
    """So many objects on a new volume."""
    volume = Volume(root)
    volume.prepare()
    volume.close()
    now = int(time.time())
    # Directory by directory, as file systems like it.
    for object_id in sorted((ObjectId(_FIRST_ID + number) for number in range(count)), key=shard):
        tag = entity_tag(None)
        write_object(root, StoredRecord(object_id, SIZE, tag, None, "application/octet-stream", now), ())


class Scale:
    """One size of volume; `measure` returns the figures of store, evictor and API."""

    def __init__(self, count: int, folder: Path, log: Callable[[str], None]) -> None:
        self._count, self._folder, self._log = count, folder, log
        limit = count * footprint(SIZE)
        origin = "http://127.0.0.1:9/{id}"  # the discard port: no server answers
        self._node = Node(
            folder,
            folder / "none",
            DISTRIBUTOR_CATALOG__KIND="origin",
            DISTRIBUTOR_CATALOG__ORIGIN=origin,
            DISTRIBUTOR_STORAGE__LIMIT=str(limit * 2),
        )
        self._limit = limit

    def measure(self) -> dict[str, dict[str, float]]:
        """By the name of the case."""
        try:
            return self._measure()
        finally:
            self._node.close()

    def _measure(self) -> dict[str, dict[str, float]]:
        self._log(f"laying out {self._count:,} objects")
        write_volume(self._node.volume, self._count)
        self._node.start_servers()
        empty = asyncio.run(redis_memory(self._node.redis_url))
        self._log("reconciling into an empty Redis")
        evictor = {f"adopting_{name}": value for name, value in self._reconcile().items()}
        held = asyncio.run(redis_memory(self._node.redis_url))
        self._log("reconciling once more")
        evictor |= {f"known_{name}": value for name, value in self._reconcile().items()}
        self._log("the API")
        api = self._api()
        self._log("the store's verbs")
        store = asyncio.run(StoreVerbs(self._node.redis_url, self._limit * 4).measure())
        store["redis_bytes_per_object"] = (held - empty) / self._count
        self._log("evicting a tenth")
        evictor |= self._evict()
        evictor["rss_peak_mb"] = max(value for name, value in evictor.items() if name.endswith("rss_peak_mb"))
        return {STORE.name: store, EVICTOR.name: evictor, API.name: api}

    def _reconcile(self) -> dict[str, float]:
        """From the evictor's start to its word that volume and index agree."""
        began = time.monotonic()
        evictor = self._node.launch("evictor")
        seconds = self._until_reconciled(evictor, began + _RECONCILE_SECONDS)
        total, cost = time.monotonic() - began, cost_of([evictor.pid])
        peak = peak_rss_of([evictor.pid]) / 1e6
        evictor.stop()
        return {
            "reconcile_s": seconds,
            "start_to_reconciled_s": total,
            "cpu_s": cost.cpu_seconds,
            "rss_mb": cost.rss_bytes / 1e6,
            "rss_peak_mb": peak,
        }

    def _until_reconciled(self, evictor: RunningService, deadline: float) -> float:
        while True:
            for line in evictor.process.log_text().splitlines():
                if '"reconciliation_finished"' in line:
                    return float(json.loads(line)["seconds"])
            evictor.process.check(deadline)
            time.sleep(0.2)

    def _api(self) -> dict[str, float]:
        """In quiet, then while an evictor starts and reconciles what the store knows."""
        began = time.monotonic()
        api = self._node.start("api")
        figures = {"start_s": time.monotonic() - began, **_status_times(api.status_url)}
        step = max(1, self._count // _LOOKUPS)
        specs = [
            RequestSpec(f"/api/v1/assets/{_FIRST_ID + number}") for number in range(0, self._count, step)
        ]
        run_wrk(api.assets_url, specs, Load(16, 2))
        result = run_wrk(api.assets_url, specs, Load(16, _HIT_SECONDS, seed=2))
        figures |= {"requests_per_second": result.requests_per_second}
        quiet = run_wrk(api.assets_url, specs, Load(1, _HIT_SECONDS, seed=3))
        evictor = self._node.launch("evictor")
        busy = run_wrk(api.assets_url, specs, Load(1, _HIT_SECONDS, seed=3))
        figures |= {"status_reconciling_p50_ms": _status_times(api.status_url)["status_p50_ms"]}
        self._until_reconciled(evictor, time.monotonic() + _RECONCILE_SECONDS)
        evictor.stop()
        figures |= {
            "hit_p50_ms": quiet.p50,
            "hit_p99_ms": quiet.p99,
            "hit_reconciling_p50_ms": busy.p50,
            "hit_reconciling_p99_ms": busy.p99,
            "hit_reconciling_ratio": busy.p50 / quiet.p50,
            "errors": result.errors + quiet.errors + busy.errors,
            "rss_mb": cost_of([api.pid]).rss_bytes / 1e6,
        }
        api.stop()
        return figures

    def _evict(self) -> dict[str, float]:
        """Under a limit that the volume fills: from the high watermark down to the low one."""
        limit = str(self._limit)
        evictor = self._node.launch(
            "evictor", DISTRIBUTOR_STORAGE__LIMIT=limit, DISTRIBUTOR_EVICTOR__MIN_IDLE="1"
        )
        try:
            watch = EvictionMonitor(self._node.redis_url, self._limit)
            rate = asyncio.run(watch.rate_until_below(0.9 * self._limit, _RECONCILE_SECONDS))
            return {
                "evictions_per_second": rate,
                "evicting_rss_peak_mb": peak_rss_of([evictor.pid]) / 1e6,
            }
        finally:
            evictor.stop()


def _status_times(url: str) -> dict[str, float]:
    """Milliseconds of /status, asked again and again for a few seconds (the usage behind it is read once a second)."""
    seen, deadline = [], time.monotonic() + _STATUS_SECONDS
    while time.monotonic() < deadline:
        began = time.perf_counter()
        with urllib.request.urlopen(url, timeout=10) as answer:
            answer.read()
        seen.append((time.perf_counter() - began) * 1e3)
        time.sleep(0.02)
    return {
        "first_status_ms": seen[0],
        "status_p50_ms": statistics.median(seen),
        "status_p99_ms": percentile(seen, 0.99),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-scale ARGS=…", description=__doc__)
    parser.add_argument("--objects", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, help="where the volume lies (default: a temporary folder)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    missing = missing_programs()
    if missing:
        raise SystemExit("\n".join(missing))
    signal.signal(signal.SIGTERM, exit_on_signal)
    report = Report(describe(given.folder or Path(tempfile.gettempdir())))
    for case in (STORE, EVICTOR, API):
        report.add(case, ())
    try:
        for count in given.objects:
            folder = Path(tempfile.mkdtemp(prefix="scale-", dir=given.folder))
            try:
                found = Scale(count, folder, log).measure()
            finally:
                log("removing the volume")
                shutil.rmtree(folder)
            for name, figures in found.items():
                report.measurements.append(Measurement(name, f"{count:,} objects", 0, figures))
            for case in report.cases:
                report.note_errors(case)
            log("\n\n".join(map(report.table, report.cases)))
    finally:
        log(report.goal_table())
        for path in write_results(report, given.results, "scale"):
            log(f"written: {path}")


if __name__ == "__main__":
    main()
