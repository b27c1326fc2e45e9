"""How the sources do: what all processes have seen, as far as that is shared, and what this one has seen since."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

from shared.domain.objects import ObjectId, source_name
from shared.domain.source_order import SourceHealth, SourceNews, order
from shared.ports.source_memory import CorruptedCopy, SharedSources

_SOURCES_KEPT = 1_000
_CORRUPTED_KEPT = 2_000
_NOTHING_SEEN = SourceHealth()
_Copy = tuple[str, str]


class HealthBook:
    """Health by source name (`host:port`). `clock`: seconds, never backwards.

    Where nobody hands the news over (or the state store is down), this process goes by what it sees itself.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, corrupted_memory: float = 600.0) -> None:
        """`corrupted_memory`: seconds that a source is not asked for an object of which it gave wrong bytes."""
        self.clock = clock
        self._corrupted_memory = corrupted_memory
        self._shared: Mapping[str, SourceHealth] = {}
        self._handed: Mapping[str, SourceNews] = {}
        self._news: OrderedDict[str, SourceNews] = OrderedDict()
        # When to forget them; those met here, and those of all processes
        self._corrupted: OrderedDict[_Copy, float] = OrderedDict()
        self._corrupted_shared: Mapping[_Copy, float] = {}
        self._corrupted_handed: list[_Copy] = []
        self._corrupted_news: list[_Copy] = []

    def best_first(self, sources: Sequence[str], object_id: ObjectId | None = None) -> tuple[str, ...]:
        """The URLs in the order to ask them in; without those that hold a corrupted copy of the object."""
        usable = [url for url in sources if object_id is None or not self._is_corrupted(object_id, url)]
        names = {source_name(url) for url in usable}
        return order(usable, {name: self.health_of(name) for name in names}, self.clock())

    def health_of(self, name: str) -> SourceHealth:
        """Of the source `host:port`."""
        health = self._shared.get(name, _NOTHING_SEEN)
        for later in (self._handed, self._news):
            if name in later:
                health = later[name].after(health)
        return health

    def names(self) -> frozenset[str]:
        """All sources of which something is known."""
        return frozenset((*self._shared, *self._handed, *self._news))

    def record_first_byte(self, url: str, seconds: float) -> None:
        """The source answered, its first byte so long after the request."""
        self._add(url, SourceNews(SourceHealth(first_bytes=(seconds,))))

    def record_success(self, url: str) -> None:
        """The source gave all that was asked of it."""
        health = self.health_of(source_name(url))
        if health.failures or health.unreachable_at is not None:
            self._add(url, SourceNews(forgiven=True, reached=True))

    def record_failure(self, url: str) -> None:
        """The source failed in a way that says something of its other objects too."""
        self._add(url, SourceNews(SourceHealth(failures=1, last_failure_at=self.clock())))

    def record_probe(self, url: str, seconds: float | None) -> None:
        """A probe was answered after so many seconds; None: it was not. Says nothing of failed downloads."""
        if seconds is None:
            self._add(url, SourceNews(SourceHealth(unreachable_at=self.clock())))
        else:
            self._add(url, SourceNews(SourceHealth(first_bytes=(seconds,)), reached=True))

    def record_corrupted(self, object_id: ObjectId, url: str) -> None:
        """The source, and no other, gave the wrong bytes for this object: it is not asked for it for a while."""
        copy = (object_id, source_name(url))
        self._corrupted[copy] = self.clock() + self._corrupted_memory
        self._corrupted.move_to_end(copy)
        if len(self._corrupted) > _CORRUPTED_KEPT:
            self._corrupted.popitem(last=False)
        if len(self._corrupted_news) < _CORRUPTED_KEPT:
            self._corrupted_news.append(copy)

    def take_news(self) -> tuple[Mapping[str, SourceNews], Sequence[CorruptedCopy]]:
        """What to hand over; to be followed by `learn` or `put_back`."""
        self._handed, self._news = self._news, OrderedDict()
        self._corrupted_handed, self._corrupted_news = self._corrupted_news, []
        now = self.clock()
        left = {copy: self._corrupted.get(copy, now) - now for copy in self._corrupted_handed}
        return self._handed, [
            CorruptedCopy(ObjectId(object_id), name, seconds)
            for (object_id, name), seconds in left.items()
            if seconds > 0
        ]

    def learn(self, shared: SharedSources) -> None:
        """What was handed over is a part of what all know now."""
        now = self.clock()
        self._shared, self._handed = shared.health, {}
        self._corrupted_shared = {
            (copy.object_id, copy.source): now + copy.seconds_left for copy in shared.corrupted
        }
        self._corrupted_handed = []

    def put_back(self) -> None:
        """What was taken could not be handed over: it is kept for the next time."""
        newer, self._news = self._news, OrderedDict(self._handed)
        self._handed = {}
        self._corrupted_news = (self._corrupted_handed + self._corrupted_news)[:_CORRUPTED_KEPT]
        self._corrupted_handed = []
        for name, news in newer.items():
            self._put(name, news)

    def _is_corrupted(self, object_id: ObjectId, url: str) -> bool:
        copy, now = (object_id, source_name(url)), self.clock()
        return max(self._corrupted.get(copy, now), self._corrupted_shared.get(copy, now)) > now

    def _add(self, url: str, news: SourceNews) -> None:
        self._put(source_name(url), news)

    def _put(self, name: str, news: SourceNews) -> None:
        earlier = self._news.get(name)
        self._news[name] = news if earlier is None else earlier.then(news)
        self._news.move_to_end(name)
        if len(self._news) > _SOURCES_KEPT:
            self._news.popitem(last=False)
