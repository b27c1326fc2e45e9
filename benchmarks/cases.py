"""The requests of each case, sent to all contenders once they hold the objects."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from benchmarks.dataset import KIB, Group
from benchmarks.figures import Case
from benchmarks.load import RequestSpec
from benchmarks.peers import AGING, OURS, TRACED, WATCHED

RANGE_BYTES = 64 * KIB
_RANGES = 4000
_CONDITIONAL_OBJECTS = 100
_HEAD_BYTES = 2 * KIB


class RequestKind(StrEnum):
    """Which requests are made of the group's objects."""

    RANDOM = "random"
    ONE = "one"
    RANGE = "range"
    NOT_MODIFIED = "not_modified"
    HEAD = "head"
    COLD = "cold"


@dataclass(frozen=True, slots=True)
class HitCase:
    """Requests for cached objects of one group, over `connections` kept-alive connections.

    `workers`: one and two workers side by side, the load on all CPUs; without it servers and load have a CPU each.
    `aging`: our node with fresh objects of an HTTP origin beside our node with immutable ones. `traced`: our node that
    traces every request beside our node that traces none. `pages`: our node with its page open in many browsers beside
    our node without its page.
    """

    name: str
    title: str
    group: str
    kind: RequestKind = RequestKind.RANDOM
    connections: int = 64
    workers: bool = False
    aging: bool = False
    traced: bool = False
    pages: bool = False
    headline: str = "requests_per_second"
    higher_is_better: bool = True

    @property
    def case(self) -> Case:
        subject = OURS
        for applies, name in (
            (self.workers, f"{OURS}, 2 workers"),
            (self.aging, AGING),
            (self.traced, TRACED),
            (self.pages, WATCHED),
        ):
            subject = name if applies else subject
        return Case(self.name, self.title, self.headline, subject, self.higher_is_better)


HIT_CASES = (
    HitCase("hit-4k", "random 4 KiB objects", "4k"),
    HitCase("hit-64k", "random 64 KiB objects", "64k"),
    HitCase("hit-1m", "random 1 MiB objects", "1m"),
    HitCase(
        "hit-64m", "64 MiB objects, 8 connections", "64m", connections=8, headline="megabytes_per_second"
    ),
    HitCase("hot-64k", "one hot 64 KiB object", "64k", RequestKind.ONE),
    HitCase("range-1g", "64 KiB ranges in a 1 GiB object", "1g", RequestKind.RANGE),
    HitCase("not-modified", "304 for 64 KiB objects", "64k", RequestKind.NOT_MODIFIED),
    HitCase(
        "head",
        "HEAD of 64 KiB objects",
        "64k",
        RequestKind.HEAD,
        headline="cpu_us_per_request",  # the client tires before the servers do
        higher_is_better=False,
    ),
    HitCase(
        "connections-1000",
        "64 KiB objects, 1,000 connections",
        "64k",
        connections=1000,
        headline="p99_ms",
        higher_is_better=False,
    ),
    HitCase("cold-64k", "64 KiB objects once each, none in memory", "64k", RequestKind.COLD, connections=16),
    HitCase(
        "cold-64m",
        "64 MiB objects once each, none in memory",
        "64m",
        RequestKind.COLD,
        8,
        headline="megabytes_per_second",
    ),
    HitCase("origin-4k", "random 4 KiB objects: of an HTTP origin, and immutable ones", "4k", aging=True),
    HitCase("traced-4k", "random 4 KiB objects, every request traced", "4k", traced=True),
    HitCase(
        "pages",
        "random 4 KiB objects: with 20 pages of the node open, and without its page",
        "4k",
        pages=True,
    ),
    HitCase("two-workers", "64 KiB objects, two workers against one, all CPUs", "64k", workers=True),
)


def requests_for(case: HitCase, group: Group, base_path: str, tags: dict[str, str]) -> list[RequestSpec]:
    """What wrk draws from. `tags`: entity tags by id, as the contender gives them."""
    rng = random.Random(1)
    match case.kind:
        case RequestKind.ONE:
            return [RequestSpec(base_path + group.ids[0])]
        case RequestKind.RANGE:
            starts = [rng.randrange(group.size - RANGE_BYTES) for _ in range(_RANGES)]
            path = base_path + group.ids[0]
            return [
                RequestSpec(path, ("Range", f"bytes={start}-{start + RANGE_BYTES - 1}")) for start in starts
            ]
        case RequestKind.NOT_MODIFIED:
            return [
                RequestSpec(base_path + object_id, ("If-None-Match", tag)) for object_id, tag in tags.items()
            ]
        case _:
            return [RequestSpec(base_path + object_id) for object_id in group.ids]


def conditional_ids(group: Group) -> Sequence[str]:
    """The objects whose entity tags are asked for first, for 304 answers."""
    return group.ids[:_CONDITIONAL_OBJECTS]


def body_size(case: HitCase, group: Group) -> int:
    """Bytes of each answer's body."""
    if case.kind in (RequestKind.NOT_MODIFIED, RequestKind.HEAD):
        return 0
    return RANGE_BYTES if case.kind is RequestKind.RANGE else group.size


def check_bytes(case: HitCase, group: Group, answers: int, received: int) -> None:
    """RuntimeError if so many answers cannot have been what was asked for: a whole object for a range or a 304, a short
    one. `received`: bytes, heads included or not; of the answers that were under way at the end, too."""
    size = body_size(case, group)
    most = (answers + case.connections) * (size + _HEAD_BYTES)
    if not (answers or received) or not answers * size <= received <= most:
        raise RuntimeError(f"{received} bytes in {answers} answers of {size} bytes")
