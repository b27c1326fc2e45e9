"""Eviction policies as in a textbook: every choice looks at every object. Ours must agree with them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection
from dataclasses import dataclass, field, replace

from distributor_node.shared.domain.eviction import PolicyEntry
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import footprint


@dataclass
class Textbook:
    """`next_victim(candidates, now)` names the first to go of a non-empty list."""

    entries: dict[ObjectId, PolicyEntry] = field(default_factory=dict)
    inflation: float = 0.0

    def worth(self, entry: PolicyEntry) -> float:
        return 0.0

    def next_victim(self, candidates: list[PolicyEntry], now: float) -> PolicyEntry:
        return min(candidates, key=lambda entry: (entry.priority, entry.last_access, entry.object_id))

    def add(self, entry: PolicyEntry) -> None:
        self.entries[entry.object_id] = replace(entry, priority=self.inflation + self.worth(entry))

    def store(self, object_id: ObjectId, size: int, now: float, *, begins_view: bool) -> None:
        self.add(PolicyEntry(object_id, size, 1, now))

    def access(self, object_id: ObjectId, views: int, now: float) -> None:
        if object_id in self.entries:
            old = self.entries[object_id]
            new = replace(old, frequency=old.frequency + views, last_access=max(old.last_access, now))
            priority = max(old.priority, self.inflation + self.worth(new))
            self.entries[object_id] = replace(new, priority=priority)

    def remove(self, object_id: ObjectId, *, evicted: bool) -> None:
        gone = self.entries.pop(object_id, None)
        if gone is not None and evicted:
            self.inflation = max(self.inflation, gone.priority)

    def victims(
        self, wanted: int, now: float, min_idle: float, spared: Collection[ObjectId], at_most: int
    ) -> list[ObjectId]:
        left = [
            entry
            for entry in self.entries.values()
            if entry.last_access <= now - min_idle and entry.object_id not in spared
        ]
        chosen: list[ObjectId] = []
        while left and wanted > 0 and len(chosen) < at_most:
            victim = self.next_victim(left, now)
            left.remove(victim)
            chosen.append(victim.object_id)
            wanted -= footprint(victim.size)
        return chosen


class TextbookLru(Textbook):
    """Priorities are 0 for all."""


@dataclass
class TextbookClassic:
    """GDSF with c0 = ∞ and no memory, in as many bytes as the cache has. `held`: views and priority."""

    sizes: dict[ObjectId, int] = field(default_factory=dict)
    held: dict[ObjectId, tuple[int, float]] = field(default_factory=dict)
    inflation: float = 0.0
    has_evicted: bool = False

    def view(self, object_id: ObjectId, size: int, views: int, room: int) -> bool:
        if object_id in self.held:
            counted, before = self.held[object_id]
            worth = (counted + views) / max(1, size)
            self.held[object_id] = counted + views, max(before, self.inflation + worth)
            return True
        if footprint(size) <= room:
            left = room - footprint(size) - sum(footprint(self.sizes[known]) for known in self.held)
            while left < 0:
                victim = min(self.held, key=lambda held: (self.held[held][1], held))
                self.inflation = max(self.inflation, self.held.pop(victim)[1])
                self.has_evicted = True
                left += footprint(self.sizes[victim])
            self.sizes[object_id] = size
            self.held[object_id] = views, self.inflation + views / max(1, size)
        return False


@dataclass
class TextbookGdsf(Textbook):
    """`multiple`: c0 is so many times the mean of a view; None: it is `fixed`, or the factor is found."""

    fixed: float | None = None
    multiple: float | None = None
    factor: float = 28.0
    miss_cost: float = 28.0 * (64.0 * 1024**2 / 20)
    views: float = 0.0
    viewed_bytes: float = 0.0
    exponent: float = 1.0
    first: float = 0.4
    victims_seen: int = 0
    move_at: int = 500
    gone: dict[int, float] = field(default_factory=lambda: dict.fromkeys((1, 2, 3), 1.0))
    back: dict[int, float] = field(default_factory=lambda: dict.fromkeys((1, 2, 3), 0.1))
    """Victims, and victims that came back, by views: one, two, more."""
    cells: int = 256
    evicted: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """For each row of the memory its (hash, views), the last victim first."""
    classic: TextbookClassic = field(default_factory=TextbookClassic)
    compared: int = 0
    counted: float = 0.0
    ahead: float = 0.0

    def __post_init__(self) -> None:
        if self.fixed is not None:
            self.miss_cost = self.fixed

    def worth(self, entry: PolicyEntry) -> float:
        return self.worth_of(entry.frequency, entry.size)

    def worth_of(self, views: float, size: int) -> float:
        counted = math.pow(views, self.exponent)
        if views < 2:
            counted = self.first + (views - 1) * (math.pow(2, self.exponent) - self.first)
        size = max(1, size)
        return counted * 2**20 * (self.miss_cost + size) / (size * max(1.0, self.miss_cost))

    def store(self, object_id: ObjectId, size: int, now: float, *, begins_view: bool) -> None:
        views, row = 0, self.row(object_id)
        for known in [known for known in row if known[0] == self.hash(object_id)][:1]:
            row.remove(known)
            views = known[1]
            self.back[min(views, 3)] += 1
        if begins_view:
            self.count(size, 1)
        priority = self.inflation + self.worth_of(max(1.0, 0.4 * views + begins_view), size)
        entry = PolicyEntry(object_id, size, max(1, views + begins_view), now, priority)
        self.entries[object_id] = entry
        if begins_view:
            self.compare(object_id, size, 1, hit=False)

    def access(self, object_id: ObjectId, views: int, now: float) -> None:
        if object_id in self.entries and views:
            self.count(self.entries[object_id].size, views)
        super().access(object_id, views, now)
        if object_id in self.entries and views:
            self.compare(object_id, self.entries[object_id].size, views, hit=True)

    def compare(self, object_id: ObjectId, size: int, views: int, *, hit: bool) -> None:
        """With the classic form: the factor falls unless that has more hits."""
        if self.fixed is not None or self.multiple is not None:
            return
        room = sum(footprint(entry.size) for entry in self.entries.values())
        classic_hit = self.classic.view(object_id, size, views, room)
        if not self.classic.has_evicted:
            return
        self.counted, self.ahead = self.counted + 1, self.ahead + classic_hit - hit
        self.compared += 1
        if self.compared % 1000 == 0:
            step = max(-0.1, min(0.1, 20 * (self.ahead / self.counted - 0.003)))
            self.factor = max(1.5, min(50.0, self.factor * math.exp(step)))
            self.counted, self.ahead = 0.9 * self.counted, 0.9 * self.ahead
            self.move_cost()

    def remove(self, object_id: ObjectId, *, evicted: bool) -> None:
        gone = self.entries.get(object_id)
        if gone is not None and evicted:
            if len(self.entries) > 1.5 * self.cells:
                self.cells, self.evicted = self.cells * 2, {}
            row = self.row(object_id)
            row.insert(0, (self.hash(object_id), min(gone.frequency, 255)))
            del row[8:]
            self.gone[min(gone.frequency, 3)] += 1
            self.victims_seen += 1
            if self.victims_seen == self.move_at:
                self.move_weights()
        super().remove(object_id, evicted=evicted)

    def count(self, size: int, views: int) -> None:
        self.views += views
        self.viewed_bytes += views * size
        if self.views >= 2 * (16 * len(self.entries) + 10_000):
            self.views, self.viewed_bytes = self.views / 2, self.viewed_bytes / 2
        self.move_cost()

    def move_cost(self) -> None:
        if self.fixed is None and self.views:
            factor = self.factor if self.multiple is None else self.multiple
            self.miss_cost = factor * self.exponent * (self.viewed_bytes / self.views)

    def move_weights(self) -> None:
        self.move_at += max(500, len(self.entries) // 4)
        odds = {views: self.back[views] / self.gone[views] for views in (1, 2, 3)}
        steps = {views: 0.2 * max(-1.0, min(1.0, math.log(odds[views] / odds[2]))) for views in (1, 3)}
        if self.gone[2] > 5 and self.gone[3] > 5:
            self.exponent = max(0.2, min(1.0, self.exponent + steps[3]))
        if self.gone[2] > 5 and self.gone[1] > 5:
            least = 0.1 * (1 + min(1.0, self.factor / 28))
            self.first = max(least, min(0.5, self.first * math.exp(steps[1])))
        for views in (1, 2, 3):
            self.gone[views] = self.gone[views] / 2 + 0.1
            self.back[views] = self.back[views] / 2 + 0.01
        self.move_cost()

    def hash(self, object_id: ObjectId) -> int:
        return zlib.crc32(object_id.encode())

    def row(self, object_id: ObjectId) -> list[tuple[int, int]]:
        mixed = self.hash(object_id) * 2_654_435_761 % 2**32
        return self.evicted.setdefault(mixed * (self.cells // 8) // 2**32, [])


class TextbookLruSp(Textbook):
    def next_victim(self, candidates: list[PolicyEntry], now: float) -> PolicyEntry:
        oldest: dict[int, PolicyEntry] = {}
        for entry in sorted(candidates, key=lambda entry: (entry.last_access, entry.object_id)):
            oldest.setdefault(self.group(entry), entry)
        dearest = max(oldest, key=lambda group: (self.cost(oldest[group], now), group))
        return oldest[dearest]

    def group(self, entry: PolicyEntry) -> int:
        kilobytes = math.ceil(entry.size / 1024)
        return min(max(math.ceil(math.log2(kilobytes / entry.frequency)), 0), 23) if kilobytes else 0

    def cost(self, entry: PolicyEntry, now: float) -> float:
        minutes = math.ceil(max(0.0, now - entry.last_access) / 60)
        return minutes * math.ceil(entry.size / 1024) / entry.frequency
