"""One run: starts everything, measures the chosen cases, stops everything."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.accounting import pin
from benchmarks.cases import HIT_CASES, HitCase
from benchmarks.dataset import Group, aging_record_of, fill_volume, groups, write_manifest
from benchmarks.figures import Case, Measurement
from benchmarks.hits import Conditions, measure_case, warm
from benchmarks.hostile import HOSTILE_CASES, measure_hostile
from benchmarks.misses import (
    MISS_CASES,
    NEW_EACH_BURST,
    NEW_EACH_SAMPLE,
    MissBench,
    UnusedObjects,
    only_comparable,
)
from benchmarks.node import Node
from benchmarks.origin import Origin
from benchmarks.peers import (
    AGING,
    CACHE,
    OURS,
    PAGES,
    TRACED,
    UNWATCHED,
    WATCHED,
    NginxCache,
    NginxStatic,
    Ours,
    Peer,
    Varnish,
    Watched,
    varnish_program,
)
from benchmarks.report import Report
from benchmarks.throughput import FETCH_CASES, FetchBench, new_each_round
from benchmarks.tracing import (
    TRACED_MISSES,
    new_for_traced_misses,
    settings_for,
    start_collector,
    traced_misses,
)

HARNESS_CASES = tuple(case.name for case in HIT_CASES if not case.workers)
"""Those in which nginx can play our part."""
CASE_NAMES = (
    *(case.name for case in HIT_CASES),
    *MISS_CASES,
    TRACED_MISSES.name,
    *FETCH_CASES,
    *HOSTILE_CASES,
)
_NEW_GROUPS = {
    "miss-64k": "new-64k",
    TRACED_MISSES.name: "new-64k",
    "miss-64m": "new-64m",
    "crowd": "new-1m",
    "fetch": "new-1g",
    "fetch-three": "new-1g",
}
_MAX_FETCH_ROUNDS, _MAX_HOSTILE_ROUNDS = 5, 3


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure and how long: `seconds` and `rounds` for each contender, `samples` of each miss.

    `check_harness`: nginx static plays our part in the hit cases; ours ÷ nginx static must then be near 1.
    """

    cases: Sequence[str]
    rounds: int
    seconds: float
    samples: int
    quick: bool
    pinned: bool
    check_harness: bool

    @property
    def fetch_rounds(self) -> int:
        """Fewer: one takes a minute and writes some gigabytes."""
        return min(self.rounds, _MAX_FETCH_ROUNDS)

    def new_objects(self) -> dict[str, int]:
        """How many of each `new-…` group the chosen cases take."""
        taken = {
            "miss-64k": NEW_EACH_SAMPLE * (self.samples + 1),
            "miss-64m": NEW_EACH_SAMPLE * (self.samples + 1),
            TRACED_MISSES.name: new_for_traced_misses(self.rounds),
            "crowd": NEW_EACH_BURST * self.rounds,
            **{name: new_each_round(name) * self.fetch_rounds for name in FETCH_CASES},
        }
        needed = dict.fromkeys(_NEW_GROUPS.values(), 0)
        for case, group in _NEW_GROUPS.items():
            needed[group] += taken[case] if case in self.cases else 0
        return needed


@dataclass(frozen=True, slots=True)
class Environment:
    """What all contenders stand on: the source, our node (its API is a contender), a folder on disk."""

    folder: Path
    origin: Origin
    node: Node


class Run:
    """The contenders of one run. `log` is told what happens."""

    def __init__(self, options: Options, report: Report, log: Callable[[str], None]) -> None:
        self._options, self._report, self._log = options, report, log
        self._groups = groups(options.quick, options.new_objects())
        self._hits = [case for case in HIT_CASES if case.name in options.cases]
        self._unused = {
            name: UnusedObjects.of(self._groups[name])
            for name in dict.fromkeys(_NEW_GROUPS[name] for name in options.cases if name in _NEW_GROUPS)
        }
        self._held = [self._groups[name] for name in dict.fromkeys(case.group for case in self._hits)]

    def run(self, folder: Path) -> None:
        """Measure in this (empty) folder; whatever happens, nothing is left running."""
        if set(self._options.cases) - HOSTILE_CASES.keys():
            self._run_with_peers(folder)
        # Each round has a node of its own.
        for case in (case for name, case in HOSTILE_CASES.items() if name in self._options.cases):
            rounds = min(self._options.rounds, _MAX_HOSTILE_ROUNDS)
            self._record(case, measure_hostile(case, rounds, folder))

    def _run_with_peers(self, folder: Path) -> None:
        with ExitStack() as resources:
            environment = self._start_environment(folder, resources)
            peers = self._peers(environment)
            self._start(peers, self._held, resources)
            for case in self._hits:
                if not (case.workers or case.aging or case.traced or case.pages):
                    self._measure_hits(case, peers)
            self._measure_pairs(environment)
            self._measure_aging(environment)
            self._measure_traced(environment)
            self._measure_pages(environment)
            for peer in peers:
                pin(peer.pids, frozenset(os.sched_getaffinity(0)))
            self._measure_misses(environment, only_comparable(peers))
            self._measure_fetches(environment, peers[0])

    def _start_environment(self, folder: Path, resources: ExitStack) -> Environment:
        chosen = [*self._held, *(self._groups[name] for name in self._unused)]
        origin = Origin(folder, chosen)
        resources.callback(origin.stop)
        origin.start()
        self._log("laying out objects")
        write_manifest(folder / "manifest.json", chosen, origin.files_url)
        node = Node(folder, folder / "manifest.json")
        resources.callback(node.close)
        fill_volume(node.volume, self._held)
        if not self._options.check_harness:
            self._log("starting Redis, RabbitMQ and evictor")
            node.start_servers()
            node.start("evictor")
        return Environment(folder, origin, node)

    def _peers(self, environment: Environment) -> list[Peer]:
        """Ours comes first."""
        ours: Peer = Ours(environment.node)
        if self._options.check_harness:
            ours = NginxStatic(environment.folder, environment.node.volume, self._held, OURS)
        peers = [ours, NginxCache(environment.folder, environment.origin)]
        if self._held:
            peers.append(NginxStatic(environment.folder, environment.node.volume, self._held))
            if varnish_program() is not None:
                peers.append(Varnish(environment.folder, environment.origin))
        return peers

    def _start(self, peers: Iterable[Peer], held: Sequence[Group], resources: ExitStack) -> None:
        for peer in peers:
            self._log(f"starting {peer.name}")
            resources.callback(peer.stop)
            peer.start()
            warm(peer, held)
        os.sync()

    def _measure_hits(self, case: HitCase, peers: Sequence[Peer]) -> None:
        cpus = sorted(os.sched_getaffinity(0))
        apart = self._options.pinned and len(cpus) > 1 and not case.workers
        conditions = Conditions(
            seconds=self._options.seconds,
            rounds=self._options.rounds,
            server_cpus=frozenset(cpus[:1]) if apart else None,
            load_cpus=frozenset(cpus[1:]) if apart else None,
        )
        self._record(case.case, measure_case(case, self._groups[case.group], peers, conditions))

    def _measure_pairs(self, environment: Environment) -> None:
        """One and two workers of ours and of nginx, none of them pinned."""
        for case in self._hits:
            if case.workers and not self._options.check_harness:
                pairs: list[Peer] = [
                    Ours(environment.node, 1, OURS),
                    Ours(environment.node, 2, f"{OURS}, 2 workers"),
                    NginxCache(environment.folder / "pairs", environment.origin, 1, CACHE),
                    NginxCache(environment.folder / "pairs", environment.origin, 2, f"{CACHE}, 2 workers"),
                ]
                with ExitStack() as resources:
                    self._start(pairs, [self._groups[case.group]], resources)
                    self._measure_hits(case, pairs)

    def _measure_aging(self, environment: Environment) -> None:
        """Ours with immutable objects and with objects of an HTTP origin, on a volume of its own."""
        for case in self._hits:
            if not case.aging or self._options.check_harness:
                continue
            folder = environment.folder / "aging"
            folder.mkdir()
            node = environment.node.beside(
                folder,
                DISTRIBUTOR_CATALOG__KIND="origin",
                DISTRIBUTOR_CATALOG__ORIGIN=f"{environment.origin.files_url}{{id}}",
            )
            with ExitStack() as resources:
                resources.callback(node.close)
                fill_volume(node.volume, [self._groups[case.group]], aging_record_of)
                pair: list[Peer] = [Ours(node, 1, AGING), Ours(environment.node, 1, OURS)]
                self._start(pair, [self._groups[case.group]], resources)
                self._measure_hits(case, pair)

    def _measure_traced(self, environment: Environment) -> None:
        """Ours with every request traced, on a volume and with a fetcher of its own, and ours without."""
        hits = [case for case in self._hits if case.traced]
        misses = TRACED_MISSES.name in self._options.cases
        if not (hits or misses) or self._options.check_harness:
            return
        folder = environment.folder / "traced"
        folder.mkdir()
        with ExitStack() as resources:
            collector, port = start_collector(folder)
            resources.callback(collector.stop)
            node = environment.node.beside(folder, **settings_for(port))
            resources.callback(node.close)
            held = [self._groups[case.group] for case in hits]
            fill_volume(node.volume, held)
            pair: list[Peer] = [Ours(node, 1, TRACED), Ours(environment.node, 1, OURS)]
            self._start(pair, held, resources)
            for case in hits:
                self._measure_hits(case, pair)
            if misses:
                for peer in pair:
                    pin(peer.pids, frozenset(os.sched_getaffinity(0)))
                node.start("evictor")
                fetchers = [node.start("fetcher"), environment.node.start("fetcher")]
                unused = self._unused[_NEW_GROUPS[TRACED_MISSES.name]]
                self._record(TRACED_MISSES, traced_misses(pair, unused, self._options.rounds))
                for fetcher in fetchers:
                    fetcher.stop()

    def _measure_pages(self, environment: Environment) -> None:
        """Ours with its page open in many browsers, and without it."""
        for case in self._hits:
            if not case.pages or self._options.check_harness:
                continue
            pair: list[Peer] = [
                Watched(environment.node, WATCHED, PAGES),
                Watched(environment.node, UNWATCHED, 0),
            ]
            with ExitStack() as resources:
                self._start(pair, [self._groups[case.group]], resources)
                self._measure_hits(case, pair)

    def _measure_misses(self, environment: Environment, peers: Sequence[Peer]) -> None:
        chosen = [case for name, case in MISS_CASES.items() if name in self._options.cases]
        if not chosen:
            return
        fetcher = environment.node.start("fetcher")
        bench = MissBench(environment.node, environment.origin, peers)
        for case in chosen:
            unused = self._unused[_NEW_GROUPS[case.name]]
            if case.name == "crowd":
                self._record(case, bench.bursts(case, unused, self._options.rounds))
            else:
                self._record(case, bench.misses(case, unused, self._options.samples))
        fetcher.stop()

    def _measure_fetches(self, environment: Environment, ours: Peer) -> None:
        for case in (case for name, case in FETCH_CASES.items() if name in self._options.cases):
            group = _NEW_GROUPS[case.name]
            bench = FetchBench(
                environment.node, ours, environment.origin, self._groups[group].size, environment.folder
            )
            self._record(case, bench.measure(case, self._unused[group], self._options.fetch_rounds))

    def _record(self, case: Case, measured: Iterable[Measurement]) -> None:
        self._log(f"measuring {case.name}: {case.title}")
        self._report.add(case, measured)
        self._log(self._report.table(case))
