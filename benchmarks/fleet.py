"""How a fleet of nodes caches, by simulation: `python -m benchmarks.fleet [--views N] [--nodes 1,4,…] [--copies]`.

The traffic is that of `benchmarks.traces`; each view arrives at a node by chance. Nodes decide as the node does: ring,
hot objects and eviction are its own code. The sum of the limits is the same for every number of nodes. `--copies` tells
what second copies cost, and what they save when a node fails, for several sums of the limits. Columns:

- space: the sum of the limits, as a share of the bytes of all objects
- source: bytes from far sources per byte sent to clients
- hit: share of the requests that no far source was needed for
- between: bytes between nodes per byte sent to clients
- busiest: bytes that the busiest node sent, to clients and other nodes, as a multiple of the mean
- lost: with `fail`, of the bytes that the failed node alone had and that were asked for afterwards, the share that came
  from far sources again; what is not asked for again costs nothing
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from random import Random

from benchmarks.traces import DAY, MB, START, Parameters, Trace
from distributor_node.shared.domain.eviction import make_policy
from distributor_node.shared.domain.eviction.simulator import Request, Rules, Simulation
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.peers import FleetRules, HotObjects, Ring

NODES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
HOT = ObjectId("hot")
"""With `hot`: an object of 20 MB that is asked for as often as all others together."""
_RULES = FleetRules(own="")
RATE = 1000.0
"""Views a second of all nodes together, for which an object is hot or not. The trace has fewer, over days: each of its
views stands for many."""


@dataclass(frozen=True)
class Case:
    """One fleet.

    `mode`: `apart` (no peers), `home` (every object at its home alone), `fleet` (as the node does), `copies` (as the
    node does with `peers.copies: 2`) or `at once` (the same, but a copy is made with the first view).
    """

    nodes: int
    mode: str
    views: int
    share: float = 0.05  # the sum of the limits, of the bytes of all objects
    event: str = ""  # "", fail, join, drift, hot


@dataclass
class Counts:
    """Sums of bytes and requests."""

    requests: int = 0
    hits: int = 0
    sent: int = 0
    from_sources: int = 0
    between: int = 0
    had: int = 0  # bytes of objects that the failed node had and that were asked for since
    lost: int = 0  # of these, from sources


class Node:
    """The cache of one node, and what it has sent."""

    def __init__(self, limit: int, half_life: float) -> None:
        self._policy = make_policy("gdsf")
        self._cache = Simulation(self._policy, Rules.of(limit))
        self.hot = HotObjects(_RULES.hot_views, half_life)
        self.sent = 0

    def has(self, object_id: ObjectId) -> bool:
        return object_id in self._policy

    def ids(self) -> set[ObjectId]:
        return set(self._policy.ids())

    def copy(self, request: Request) -> int:
        """Store a second copy. Returns the bytes that had to be got for it."""
        sent = self.sent
        missing = self.serve(request._replace(sent=0))
        self.sent = sent
        return missing

    def serve(self, request: Request) -> int:
        """Send the object; returns the bytes that this node had to get for it."""
        before = self._cache.outcome.bytes_from_sources
        self._cache.process(request)
        self.sent += request.sent
        return self._cache.outcome.bytes_from_sources - before


class Fleet:
    """The nodes by name, those alive in the ring."""

    def __init__(self, case: Case, total: int, seconds: float) -> None:
        """`total`: bytes of all limits together. `seconds`: length of the trace."""
        self._case, self._limit = case, max(1, total // case.nodes)
        self._half_life = _RULES.hot_half_life * RATE * seconds / case.views
        self.nodes = {
            f"http://node-{number}": Node(self._limit, self._half_life) for number in range(case.nodes)
        }
        self.counts = Counts()
        self._failed_had: set[ObjectId] = set()
        self.rebuild(self.nodes)

    def rebuild(self, names: Sequence[str] | dict[str, Node]) -> None:
        self.alive = list(names)
        self.ring = Ring(dict.fromkeys(self.alive, 1.0))
        self._former: Ring | None = getattr(self, "_current", None)
        self._current = self.ring
        self._ranked: dict[ObjectId, tuple[str, ...]] = {}

    def fail(self) -> None:
        """The first node leaves, with what it has."""
        self._failed_had = self.nodes[self.alive[0]].ids()
        self.rebuild(self.alive[1:])

    def add(self) -> None:
        self.nodes[f"http://node-{len(self.nodes)}"] = Node(self._limit, self._half_life)
        self.rebuild([*self.alive, f"http://node-{len(self.nodes) - 1}"])

    def ask(self, request: Request, name: str) -> None:
        """One client's request at one node."""
        counts, node = self.counts, self.nodes[name]
        counts.requests += 1
        counts.sent += request.sent
        before = counts.from_sources
        if self._case.mode == "apart":
            counts.from_sources += node.serve(request)
        else:
            self._ask_fleet(request, name, node)
        missed = counts.from_sources - before
        counts.hits += not missed
        if request.object_id in self._failed_had:
            self._failed_had.remove(request.object_id)
            counts.had += request.size
            counts.lost += missed

    def _ask_fleet(self, request: Request, name: str, node: Node) -> None:
        object_id = request.object_id
        ranked = self._ranked.get(object_id)
        if ranked is None:
            ranked = self._ranked[object_id] = self.ring.ranked(object_id)
        home = ranked[0]
        if name == home or node.has(object_id):
            self._fetch(request, name, node)
            return
        kept = self._case.mode != "home" and (
            request.size <= _RULES.keep_below
            or node.hot.count(object_id, request.size, 1.0, ranked.index(name), len(ranked), request.at)
        )
        missing = node.serve(request) if kept else request.sent
        if not kept:
            node.sent += request.sent
        self.counts.between += missing
        self._fetch(request._replace(sent=missing), home, self.nodes[home])

    def _fetch(self, request: Request, name: str, node: Node) -> None:
        """Serve from this node; what it lacks comes from the former home if that has it, else from a source."""
        had = node.has(request.object_id)
        missing = node.serve(request)
        if had or self._case.mode == "at once":
            self._offer(request, name)
        if missing and not had and self._former is not None:
            former = self._former.home(request.object_id)
            if former != name and former in self.alive and self.nodes[former].has(request.object_id):
                self.nodes[former].sent += missing
                self.counts.between += missing
                return
        self.counts.from_sources += missing

    def _offer(self, request: Request, name: str) -> None:
        """Have the second home copy the object, if this node is its home."""
        ranked = self._ranked.get(request.object_id) or self.ring.ranked(request.object_id)
        if self._case.mode not in ("copies", "at once") or ranked[0] != name or len(ranked) < 2:
            return
        if request.size > _RULES.keep_below:
            copied = self.nodes[ranked[1]].copy(request)  # an access, if it is there
            self.nodes[name].sent += copied
            self.counts.between += copied


def run(case: Case) -> tuple[Case, Counts, float]:
    """Returns the counts of the second half of the trace, and the busiest node's multiple of the mean."""
    parameters = Parameters(views=case.views, holds=1.0 if case.event == "drift" else None)
    trace = Trace(parameters)
    fleet = Fleet(case, int(trace.footprint * case.share), parameters.days * DAY)
    random = Random(7)
    middle = START + parameters.days * DAY / 2
    counted = False
    for request in trace.views():
        if not counted and request.at >= middle:
            counted = True
            fleet.counts = Counts()
            for node in fleet.nodes.values():
                node.sent = 0
            if case.event == "fail":
                fleet.fail()
            elif case.event == "join":
                fleet.add()
        fleet.ask(request, random.choice(fleet.alive))
        if case.event == "hot":
            hot = Request(request.at, HOT, 20 * MB, 20 * MB)
            fleet.ask(hot, random.choice(fleet.alive))
    sent = [fleet.nodes[name].sent for name in fleet.alive]
    return case, fleet.counts, max(sent) * len(sent) / max(1, sum(sent))


def line(case: Case, counts: Counts, busiest: float) -> str:
    """One row of a Markdown table."""
    sent = max(1, counts.sent)
    lost = f"{counts.lost / counts.had:.3f}" if counts.had else "–"
    return (
        f"| {case.share:.2f} | {case.nodes} | {case.mode} | {case.event or '–'} | {counts.from_sources / sent:.3f} |"
        f" {counts.hits / max(1, counts.requests):.3f} | {counts.between / sent:.3f} | {busiest:.2f} | {lost} |"
    )


def cases(nodes: Sequence[int], views: int) -> list[Case]:
    """Every number of nodes in every mode; events for fleets of 4 and 32."""
    plain = [
        Case(count, mode, views)
        for count in nodes
        for mode in ("apart", "home", "fleet")
        if count > 1 or mode == "apart"
    ]
    events = [
        replace(Case(count, mode, views), event=event)
        for count in (4, 32)
        if count in nodes
        for event in ("fail", "join", "drift", "hot")
        for mode in ("home", "fleet")
    ]
    return plain + events


def cases_of_copies(views: int) -> list[Case]:
    """Four nodes, with one copy of a large object and with two."""
    return [
        Case(4, mode, views, share, event)
        for share in (0.05, 0.2, 0.5, 1.0)
        for event in ("", "fail")
        for mode in ("fleet", "copies", "at once")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--views", type=int, default=200_000)
    parser.add_argument("--nodes", default=",".join(map(str, NODES)))
    parser.add_argument("--copies", action="store_true")
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.copies:
        chosen = cases_of_copies(arguments.views)
    else:
        chosen = cases([int(count) for count in arguments.nodes.split(",")], arguments.views)
    columns = ("space", "nodes", "mode", "event", "source", "hit", "between", "busiest", "lost")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, mp_context=context) as pool:
        for result in pool.map(run, chosen):
            print(line(*result), flush=True)


if __name__ == "__main__":
    main()
