"""Traces of media views, made up: the parameters and their defaults are plausible for a video site's distributor.

A page shows dozens of thumbnails and some images (covers, avatars) for every video that is watched, so most views are
of small objects, and nearly all bytes are of videos. Within each kind popularity is Zipf-like.
`python -m benchmarks.traces` writes a trace as CSV (`time,id,size,sent,first`) for `distributor replay`.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, count, pairwise
from random import Random
from statistics import NormalDist

from distributor_node.shared.domain.eviction.simulator import Request
from distributor_node.shared.domain.objects import ObjectId

KB, MB, GB = 10**3, 10**6, 10**9
START = 1_700_000_000.0
DAY = 86_400.0
LOOPS = 6
"""How often a crawler asks for all objects."""
A_PRIME = 7919
GOLDEN_RATIO = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Kind:
    """`share` of all views. Sizes are log-normal: `median` bytes, `sigma` of the logarithm, cut at least and most.

    Popularity is Zipf-like among as many objects that there are `views_per_object` views for each; `strays` is the
    share of views of objects that are viewed only once (old uploads, crawlers).
    """

    name: str
    share: float
    median: int
    sigma: float
    least: int
    most: int
    views_per_object: float
    strays: float

    def sizes(self, random: Random) -> Iterator[int]:
        """From the most popular object on: evenly spread over the distribution whatever the seed, the first one near
        the median, so that a few objects at the top do not make one seed's trace another world than the next one's."""
        logarithm = NormalDist(math.log(self.median), self.sigma)
        low, high = logarithm.cdf(math.log(self.least)), logarithm.cdf(math.log(self.most))
        for number in count():
            spread = (0.5 + number * GOLDEN_RATIO + random.uniform(-0.02, 0.02)) % 1.0
            yield round(math.exp(logarithm.inv_cdf(low + (high - low) * spread)))


KINDS = (
    Kind("thumbnail", 0.80, 45 * KB, 0.4, 20 * KB, 400 * KB, 15.0, 0.04),
    Kind("image", 0.17, 500 * KB, 1.0, 20 * KB, 16 * MB, 15.0, 0.04),
    Kind("video", 0.03, 60 * MB, 1.1, 2 * MB, 2 * GB, 4.0, 0.08),
)


IMAGES = (Kind("image", 1.0, 22 * KB, 1.1, 1 * KB, 4 * MB, 12.0, 0.08),)
"""Mean 40 KB."""
SEGMENTS = (Kind("segment", 1.0, 60 * KB, 1.8, 2 * KB, 12 * MB, 8.0, 0.08),)
"""Parts of videos: mean 0.3 MB, the largest hundredth from about 4 MB on."""
DOWNLOADS = (Kind("download", 1.0, 200 * KB, 1.9, 1 * KB, 500 * MB, 6.0, 0.15),)
"""Mean about 1 MB, a few very large."""
MIXED = (
    Kind("image", 0.55, 22 * KB, 1.1, 1 * KB, 4 * MB, 12.0, 0.08),
    Kind("segment", 0.40, 60 * KB, 1.8, 2 * KB, 12 * MB, 8.0, 0.08),
    Kind("download", 0.05, 200 * KB, 1.9, 1 * KB, 500 * MB, 6.0, 0.15),
)


def flooded(kinds: tuple[Kind, ...]) -> tuple[Kind, ...]:
    """With 40 % of the views for objects that are never asked for again."""
    return tuple(replace(kind, strays=0.4) for kind in kinds)


@dataclass(frozen=True)
class ViewingCurve:
    """How much of a video is watched. `points`: (share of the viewers, share of the video that they watch at most),
    from (0, …) to (1, …), both rising; straight lines between them. See policy_windows.py for published ones."""

    points: tuple[tuple[float, float], ...]

    def share(self, viewer: float) -> float:
        """The share that a viewer watches. `viewer`: at least 0 and below 1, evenly distributed."""
        for (left, least), (right, most) in pairwise(self.points):
            if viewer < right:
                return least + (most - least) * (viewer - left) / (right - left)
        return self.points[-1][1]

    @property
    def mean(self) -> float:
        return sum(
            (right - left) * (least + most) / 2 for (left, least), (right, most) in pairwise(self.points)
        )


@dataclass(frozen=True)
class Parameters:
    """How people view.

    `zipf`: the popularity of rank r is r^-zipf. With the kinds above, 40 to 50 % of the objects seen at all are seen
    once. `fresh`: share of views that fall into the days after an object was published, `fresh_days` in the mean; the
    others come at any time.
    `watched`: mean share of a video that is watched, or how it is distributed (`viewing_curve`); players ask for
    `range_bytes` at a time, as fast as `bitrate` (bytes a second) needs it.
    """

    views: int = 1_000_000
    days: float = 14.0
    zipf: float = 0.9
    fresh: float = 0.15
    fresh_days: float = 1.0
    kinds: tuple[Kind, ...] = KINDS
    seed: int = 1
    watched: float = 0.6
    viewing_curve: ViewingCurve | None = None
    range_bytes: int = 4 * MB
    bitrate: int = 500 * KB
    holds: float | None = None  # days that one object has a place in the order of popularity; None: for ever
    loop: float = 0.0  # share of views by a crawler that asks for one object after the other, over and over


FAMILIES: Mapping[str, Parameters] = {
    "ours": Parameters(),
    "ours, drift": Parameters(holds=1.0),
    "images": Parameters(kinds=IMAGES),
    "images, drift": Parameters(kinds=IMAGES, holds=1.0),
    "images, flood": Parameters(kinds=flooded(IMAGES)),
    "segments": Parameters(kinds=SEGMENTS),
    "segments, drift": Parameters(kinds=SEGMENTS, holds=1.0),
    "segments, flood": Parameters(kinds=flooded(SEGMENTS)),
    "downloads": Parameters(kinds=DOWNLOADS),
    "downloads, drift": Parameters(kinds=DOWNLOADS, holds=1.0),
    "mixed": Parameters(kinds=MIXED),
    "mixed, drift": Parameters(kinds=MIXED, holds=0.5),
    "mixed, loop": Parameters(kinds=MIXED, loop=0.3),
}
"""Traces by name. `holds`: popularity moves; an object stays where it is in the order for so many days."""


class Trace:
    """Views in the order of time: `times[i]` (POSIX seconds) and `objects[i]`, an index of `ids` and `sizes`."""

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters
        self.ids: list[ObjectId] = []
        self.sizes: list[int] = []
        self.is_video = bytearray()
        random = Random(parameters.seed)
        viewed = [pair for kind in parameters.kinds for pair in self._draw(kind, random)]
        viewed.sort()
        self.times = array("d", [at for at, _ in viewed])
        self.objects = array("I", [number for _, number in viewed])

    def _draw(self, kind: Kind, random: Random) -> Iterator[tuple[float, int]]:
        """All views of one kind: when, and of which object."""
        parameters = self.parameters
        views = round(parameters.views * kind.share)
        strays = round(views * kind.strays)
        ranked = max(1, round((views - strays) / kind.views_per_object))
        first = len(self.ids)
        sizes = kind.sizes(random)
        for number in range(first, first + ranked + strays):
            self.ids.append(ObjectId(str(1_000_000 + number)))
            self.sizes.append(next(sizes))
            self.is_video.append(kind.name == "video")
        weights = list(accumulate(rank**-parameters.zipf for rank in range(1, ranked + 1)))
        drawn = random.choices(range(first, first + ranked), cum_weights=weights, k=views - strays)
        published = [random.random() for _ in range(ranked)]
        phases = [random.random() for _ in range(ranked)] if parameters.holds is not None else []
        duration = parameters.days * DAY
        for number in [*drawn, *range(first + ranked, first + ranked + strays)]:
            part = random.random()
            if number < first + ranked and random.random() < parameters.fresh:
                age = random.expovariate(parameters.days / parameters.fresh_days)
                part = (published[number - first] + age) % 1.0
            if number < first + ranked:
                number = first + self._moved(number - first, ranked, part, phases, random)  # noqa: PLW2901
            yield START + part * duration, number

    def _moved(self, rank: int, ranked: int, part: float, phases: list[float], random: Random) -> int:
        """The object that is asked for at this part of the time, in place of that of the same rank."""
        parameters = self.parameters
        if parameters.loop and random.random() < parameters.loop:
            return int(part * LOOPS * ranked) % ranked
        if parameters.holds is None:
            return rank
        held = int(part * parameters.days / parameters.holds + phases[rank])
        return (rank + held * A_PRIME) % ranked

    def views(self) -> Iterator[Request]:
        """One request for each view, for the whole object."""
        ids, sizes = self.ids, self.sizes
        for at, number in zip(self.times, self.objects, strict=True):
            yield Request(at, ids[number], sizes[number], sizes[number])

    def requests(self) -> Iterator[Request]:
        """As clients ask: a video by ranges over minutes, until the viewer leaves. In the order of time."""
        random = Random(self.parameters.seed + 1)
        asked: list[Request] = []
        for at, number in zip(self.times, self.objects, strict=True):
            if self.is_video[number]:
                asked.extend(self._session(at, number, random))
            else:
                asked.append(Request(at, self.ids[number], self.sizes[number], self.sizes[number]))
        asked.sort()
        return iter(asked)

    def _session(self, at: float, number: int, random: Random) -> Iterator[Request]:
        parameters, size = self.parameters, self.sizes[number]
        if parameters.viewing_curve is None:
            shape = parameters.watched / (1 - parameters.watched)
            watched = random.betavariate(shape, 1.0)
        else:
            watched = parameters.viewing_curve.share(random.random())
        end = max(1, int(size * watched))
        for first in range(0, end, parameters.range_bytes):
            sent = min(end - first, parameters.range_bytes)
            yield Request(at, self.ids[number], size, sent, first=first)
            at += sent / parameters.bitrate

    @property
    def footprint(self) -> int:
        """Bytes of all objects that are viewed at all."""
        return sum(self.sizes[number] for number in set(self.objects))

    @property
    def seen_once(self) -> float:
        """Share of the objects viewed at all that are viewed once."""
        counts = [0] * len(self.ids)
        for number in self.objects:
            counts[number] += 1
        return counts.count(1) / (len(counts) - counts.count(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--views", type=int, default=Parameters.views)
    parser.add_argument("--days", type=float, default=Parameters.days)
    parser.add_argument("--seed", type=int, default=Parameters.seed)
    parser.add_argument("--ranges", action="store_true", help="videos by range requests")
    arguments = parser.parse_args()
    trace = Trace(Parameters(views=arguments.views, days=arguments.days, seed=arguments.seed))
    writer = csv.writer(sys.stdout)
    writer.writerow(["time", "id", "size", "sent", "first"])
    for request in trace.requests() if arguments.ranges else trace.views():
        writer.writerow([f"{request.at:.3f}", request.object_id, request.size, request.sent, request.first])


if __name__ == "__main__":
    main()
