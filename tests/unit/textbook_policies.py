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
class TextbookGdsf(Textbook):
    """`factor`: c0 is so many times the mean of a view; None: it stays as it is."""

    miss_cost: float = 64.0 * 1024**2
    factor: float | None = None
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

    def worth(self, entry: PolicyEntry) -> float:
        counted = self.first if entry.frequency == 1 else entry.frequency**self.exponent
        return counted * (self.miss_cost + max(1, entry.size)) / max(1, entry.size)

    def store(self, object_id: ObjectId, size: int, now: float, *, begins_view: bool) -> None:
        views, row = 0, self.row(object_id)
        for known in [known for known in row if known[0] == self.hash(object_id)][:1]:
            row.remove(known)
            views = known[1]
            self.back[min(views, 3)] += 1
        if begins_view:
            self.count(size, 1)
        self.add(PolicyEntry(object_id, size, max(1, views + begins_view), now))

    def access(self, object_id: ObjectId, views: int, now: float) -> None:
        if object_id in self.entries and views:
            self.count(self.entries[object_id].size, views)
        super().access(object_id, views, now)

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
        if self.factor is not None and self.views:
            self.miss_cost = self.factor * self.exponent**2 * (self.viewed_bytes / self.views)

    def move_weights(self) -> None:
        self.move_at += max(500, len(self.entries) // 4)
        odds = {views: self.back[views] / self.gone[views] for views in (1, 2, 3)}
        steps = {views: 0.2 * max(-1.0, min(1.0, math.log(odds[views] / odds[2]))) for views in (1, 3)}
        if self.gone[2] > 5 and self.gone[3] > 5:
            self.exponent = max(0.4, min(1.0, self.exponent + steps[3]))
        if self.gone[2] > 5 and self.gone[1] > 5:
            self.first = max(0.1, min(0.5, self.first * math.exp(steps[1])))
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
