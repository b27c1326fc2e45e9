"""`make bench-compare BASE=…`: hits of this tree beside those of another commit, interleaved in one run.

BASE is a commit, or a folder that holds the package (`build/compiled`: this tree, compiled). Each of both is a
standalone node on a volume of its own. A ratio is taken within each round; below 1 this tree takes less CPU.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks import history, load
from benchmarks.__main__ import exit_on_signal, log
from benchmarks.cases import HIT_CASES, HitCase
from benchmarks.dataset import Group, file_on_volume, fill_volume, groups, write_manifest
from benchmarks.figures import Measurement, ratio_of
from benchmarks.hits import Conditions, measure_case, warm
from benchmarks.machine import describe
from benchmarks.node import Node, RunningService

ROOT = Path(__file__).resolve().parents[1]
THIS, BASE = "this", "base"
CASES = {case.name: case for case in HIT_CASES if not (case.workers or case.aging or case.traced)}
_DEFAULT = ("hit-4k", "hit-64k", "range-1g", "not-modified", "head")
_CPU = "cpu_us_per_request"


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


def row(case: str, measured: Sequence[Measurement]) -> str:
    parts = [f"{case}:"]
    for figure, title in ((_CPU, "CPU a request"), ("requests_per_second", "requests/s")):
        ratio = ratio_of(measured, figure, THIS, BASE)
        if ratio is not None:
            parts.append(f"{title} {ratio.median:.2f} ({ratio.least:.2f} to {ratio.greatest:.2f})")
    return " ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-compare BASE=… ARGS=…", description=__doc__)
    parser.add_argument("base", help="a commit, or a folder that holds the package")
    parser.add_argument("--case", action="append", choices=CASES, metavar="NAME", help="may be given again")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--history", action="store_true", help="add the ratios to benchmarks/history.jsonl")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, exit_on_signal)
    try:
        load.program()
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
        cases = [CASES[name] for name in given.case or _DEFAULT]
        measured = compare(code, cases, conditions, folder, log)
    if given.history:
        history.add(facts, given.base, measured, [(_CPU, THIS, BASE), ("requests_per_second", THIS, BASE)])


if __name__ == "__main__":
    main()
