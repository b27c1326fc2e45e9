"""`make bench-compare BASE=…`: this tree beside another commit, interleaved in one run.

BASE is a commit, or a folder that holds the package (`build/compiled`: this tree, compiled). A ratio is taken within
each round; below 1 this tree takes less time. Hits are those of standalone nodes, each on a volume of its own. For
misses and fetches each tree has API, fetcher and evictor as processes, on one Redis and one RabbitMQ.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks import history, load
from benchmarks.__main__ import exit_on_signal, log
from benchmarks.accounting import cpu_ms_of
from benchmarks.cases import HIT_CASES, HitCase
from benchmarks.client import fetch_once
from benchmarks.dataset import Group, file_on_volume, fill_volume, groups, write_manifest
from benchmarks.figures import Measurement, ratio_of, rotated
from benchmarks.hits import Conditions, measure_case, warm
from benchmarks.machine import describe
from benchmarks.misses import UnusedObjects, wait_for_hit
from benchmarks.node import Node, RunningService
from benchmarks.origin import Origin
from benchmarks.throughput import FIRST_BYTE
from tests.servers.rabbitmq_server import MISSING as RABBITMQ_MISSING
from tests.servers.rabbitmq_server import RabbitServer

ROOT = Path(__file__).resolve().parents[1]
THIS, BASE = "this", "base"
CASES = {case.name: case for case in HIT_CASES if not (case.workers or case.aging or case.traced)}
NEW_CASES = {"miss-64k": "new-64k", "miss-64m": "new-64m", "fetch": "new-1g"}
"""Each takes new objects of this group."""
_NEW_FIGURES = {
    "first_byte_ms": "first byte",
    "total_ms": "total",
    "fetcher_cpu_ms": "CPU of the fetcher",
    "api_cpu_ms": "CPU of the API",
}
_STORED_SECONDS = 120.0
_DEFAULT = ("hit-4k", "hit-64k", "range-1g", "not-modified", "head")
_HIT_FIGURES = {"cpu_us_per_request": "CPU a request", "requests_per_second": "requests/s", "p99_ms": "p99"}


class Standalone:
    """A standalone node that runs the package found in `code`."""

    def __init__(self, name: str, folder: Path, code: Path, held: Sequence[Group]) -> None:
        self.name = name
        folder.mkdir()
        self._held = held
        manifest = folder / "manifest.json"
        write_manifest(manifest, held, "http://127.0.0.1:9/")
        self._node = Node(
            folder,
            manifest,
            DISTRIBUTOR_STATE_STORE__URL="memory://",
            DISTRIBUTOR_JOB_QUEUE__URL="memory://",
            PYTHONPATH=str(code),
            PYTHONSAFEPATH="1",  # not the code in the working directory
        )
        self._service: RunningService | None = None

    @property
    def url(self) -> str:
        return self._running().assets_url

    @property
    def pids(self) -> Sequence[int]:
        return [self._running().pid]

    def files(self, chosen: Iterable[Group]) -> list[Path]:
        return [file_on_volume(self._node.volume, object_id) for group in chosen for object_id in group.ids]

    def start(self) -> None:
        fill_volume(self._node.volume, self._held)
        self._service = self._node.start("standalone")

    def stop(self) -> None:
        self._node.close()
        self._service = None

    def _running(self) -> RunningService:
        if self._service is None:
            raise RuntimeError(f"{self.name} is not running")
        return self._service


def check_out(commit: str, folder: Path) -> Path:
    """The package as of a commit. Raises CalledProcessError if there is no such commit."""
    archive = folder / "base.tar"
    with archive.open("wb") as file:
        subprocess.run(
            ["git", "-C", str(ROOT), "archive", commit, "distributor_node", "services", "shared"],
            stdout=file,
            check=True,
        )
    code = folder / "base-code"
    code.mkdir()
    subprocess.run(["tar", "-xf", str(archive), "-C", str(code)], check=True)
    return code


def compare(
    base: Path, cases: Sequence[HitCase], conditions: Conditions, folder: Path, tell: Callable[[str], None]
) -> list[Measurement]:
    all_groups = groups(quick=False, new={})
    held = [all_groups[name] for name in dict.fromkeys(case.group for case in cases)]
    found: list[Measurement] = []
    with ExitStack() as resources:
        peers = [Standalone(THIS, folder / "this", ROOT, held), Standalone(BASE, folder / "base", base, held)]
        for peer in peers:
            tell(f"starting {peer.name}")
            resources.callback(peer.stop)
            peer.start()
            warm(peer, held)
        for case in cases:
            measured = list(measure_case(case, all_groups[case.group], peers, conditions))
            found += measured
            tell(row(case.name, measured))
    return found


class Fetching:
    """API, fetcher and evictor that run the package found in `code`, on the servers of another node."""

    def __init__(self, name: str, servers: Node, code: Path) -> None:
        self.name = name
        folder = servers.folder / name
        folder.mkdir()
        self._node = servers.beside(folder, name, PYTHONPATH=str(code), PYTHONSAFEPATH="1")
        self._services: dict[str, RunningService] = {}

    def start(self) -> None:
        self._services = {kind: self._node.start(kind) for kind in ("evictor", "fetcher", "api")}

    def stop(self) -> None:
        self._node.close()

    def miss(self, case: str, object_id: str) -> dict[str, float]:
        """Request a new object and have it removed again once it is stored. A fetch is over then; else the answer is
        what counts."""
        api, fetcher = self._services["api"], self._services["fetcher"]
        before = {kind: cpu_ms_of(self._services[kind].pid) for kind in ("fetcher", "api")}
        began = time.perf_counter()
        timing = fetch_once(api.assets_url + object_id, FIRST_BYTE if case == "fetch" else "")
        file, deadline = file_on_volume(self._node.volume, object_id), time.monotonic() + _STORED_SECONDS
        while not file.exists():
            fetcher.process.check(deadline)
            time.sleep(0.002)
        seconds = time.perf_counter() - began if case == "fetch" else timing.total
        figures = {"first_byte_ms": timing.first_byte * 1e3, "total_ms": seconds * 1e3}
        for kind, spent in before.items():
            figures[f"{kind}_cpu_ms"] = cpu_ms_of(self._services[kind].pid) - spent
        wait_for_hit(api.assets_url + object_id)
        self._node.purge([object_id])
        return figures


def compare_misses(
    base: Path, cases: Sequence[str], rounds: int, folder: Path, tell: Callable[[str], None]
) -> list[Measurement]:
    """A first round, in which processes make their connections, does not count."""
    all_groups = groups(quick=False, new={NEW_CASES[case]: 2 * (rounds + 1) for case in cases})
    chosen = [all_groups[NEW_CASES[case]] for case in cases]
    found: list[Measurement] = []
    with ExitStack() as resources:
        origin = Origin(folder, chosen)
        resources.callback(origin.stop)
        origin.start()
        write_manifest(folder / "manifest.json", chosen, origin.files_url)
        servers = Node(folder, folder / "manifest.json")
        resources.callback(servers.close)
        servers.start_servers()
        nodes = [Fetching(THIS, servers, ROOT), Fetching(BASE, servers, base)]
        for node in nodes:
            tell(f"starting {node.name}")
            resources.callback(node.stop)
            node.start()
        for case in cases:
            unused = UnusedObjects.of(all_groups[NEW_CASES[case]])
            measured: list[Measurement] = []
            for number in range(-1, rounds):
                for node in rotated(nodes, number):
                    os.sync()
                    figures = node.miss(case, unused.take())
                    if number >= 0:
                        measured.append(Measurement(case, node.name, number, figures))
            found += measured
            tell(row(case, measured, _NEW_FIGURES))
    return found


def row(case: str, measured: Sequence[Measurement], figures: Mapping[str, str] = _HIT_FIGURES) -> str:
    parts = [f"{case}:"]
    for figure, title in figures.items():
        ratio = ratio_of(measured, figure, THIS, BASE)
        if ratio is not None:
            parts.append(f"{title} {ratio.median:.2f} ({ratio.least:.2f} to {ratio.greatest:.2f})")
    return " ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-compare BASE=… ARGS=…", description=__doc__)
    parser.add_argument("base", help="a commit, or a folder that holds the package")
    parser.add_argument(
        "--case", action="append", choices=[*CASES, *NEW_CASES], metavar="NAME",
        help=f"may be given again: {', '.join([*CASES, *NEW_CASES])}",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--history", action="store_true", help="add the ratios to benchmarks/history.jsonl")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, exit_on_signal)
    try:
        if not given.case or set(given.case) & CASES.keys():
            load.program()
        if not RabbitServer.is_installed() and set(given.case or ()) & NEW_CASES.keys():
            raise RuntimeError(RABBITMQ_MISSING)
    except RuntimeError as error:
        sys.exit(str(error))
    cpus = sorted(os.sched_getaffinity(0))
    apart = len(cpus) > 1
    conditions = Conditions(
        given.seconds,
        given.rounds,
        frozenset(cpus[:1]) if apart else None,
        frozenset(cpus[1:]) if apart else None,
    )
    with tempfile.TemporaryDirectory(prefix="compare-") as place:
        folder = Path(place)
        facts = describe(folder)
        for name, value in facts.items():
            log(f"{name}: {value}")
        base = Path(given.base)
        code = base.resolve() if base.is_dir() else check_out(given.base, folder)
        names = given.case or _DEFAULT
        hits = [CASES[name] for name in names if name in CASES]
        misses = [name for name in names if name in NEW_CASES]
        measured = compare(code, hits, conditions, folder, log) if hits else []
        if misses:
            (folder / "misses").mkdir()
            measured += compare_misses(code, misses, given.rounds, folder / "misses", log)
    if given.history:
        figures = [(figure, THIS, BASE) for figure in (*_HIT_FIGURES, *_NEW_FIGURES)]
        history.add(facts, given.base, measured, figures)


if __name__ == "__main__":
    main()
