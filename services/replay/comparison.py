"""Policies as they were published, to compare with the node's own in a replay and in the benchmark.

The node does not use them. They have queues and no times, so all but GDSF ignore `min_idle`. `victims` returns one
object at a time and changes the policy's state. The simulator needs no more.
Sources: Zhang et al., "SIEVE is simpler than LRU", NSDI 2024; Yang et al., "FIFO queues are all you need for cache
eviction", SOSP 2023; Megiddo, Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003; Einziger et al.,
"TinyLFU: a highly efficient cache admission policy", ACM TOS 2017; GDSF: see shared/domain/eviction/gdsf.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from distributor_node.shared.domain.eviction import EvictionPolicy, PolicyEntry, PriorityBasis
from distributor_node.shared.domain.eviction.packed import PackedPolicy
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import footprint

_NO_IDS: frozenset[ObjectId] = frozenset()
_SMALL_SHARE = 0.1
_MAX_COUNT = 3
_MIN_COUNT = 2


class _Queues(ABC):
    """Base of policies made of queues: it holds the entries, and names one victim at a time."""

    inflation = 0.0

    def __init__(self) -> None:
        self._entries: dict[ObjectId, PolicyEntry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, object_id: object) -> bool:
        return object_id in self._entries

    def get(self, object_id: ObjectId) -> PolicyEntry | None:
        return self._entries.get(object_id)

    def ids(self) -> Sequence[ObjectId]:
        return list(self._entries)

    def dump(self) -> Iterator[PolicyEntry]:
        return iter(self._entries.values())

    @property
    def basis(self) -> PriorityBasis:
        return PriorityBasis()

    def store(self, object_id: ObjectId, size: int, now: float, *, begins_view: bool = True) -> None:
        self.add(PolicyEntry(object_id, size, 1, now))

    @abstractmethod
    def add(self, entry: PolicyEntry) -> None: ...

    def restore(self, entries: Iterable[PolicyEntry], basis: PriorityBasis) -> None:
        for entry in entries:
            self.add(entry)

    def end_restore(self) -> None:  # noqa: B027 - nothing is translated, in no subclass
        pass

    def victims(
        self,
        wanted: int,
        now: float,
        *,
        min_idle: float = 0.0,
        spared: Collection[ObjectId] = _NO_IDS,
        at_most: int = 1000,
    ) -> list[PolicyEntry]:
        return [self._next_victim()] if self._entries and wanted > 0 else []

    def evictable(
        self,
        wanted: int,
        now: float,
        *,
        min_idle: float = 0.0,
        spared: Collection[ObjectId] = _NO_IDS,
    ) -> int:
        total = 0
        for entry in self._entries.values():
            total += footprint(entry.size)
            if total >= wanted:
                break
        return total

    @abstractmethod
    def _next_victim(self) -> PolicyEntry: ...


class Sieve(_Queues):
    """One queue. A hand goes from the oldest to the newest object, spares visited ones once, and stays where it is."""

    name = "sieve"

    def __init__(self) -> None:
        super().__init__()
        self._newer: dict[ObjectId, ObjectId | None] = {}
        self._older: dict[ObjectId, ObjectId | None] = {}
        self._oldest: ObjectId | None = None
        self._newest: ObjectId | None = None
        self._hand: ObjectId | None = None
        self._visited: set[ObjectId] = set()

    def add(self, entry: PolicyEntry) -> None:
        object_id = entry.object_id
        self.remove(object_id)
        self._entries[object_id] = entry
        self._older[object_id], self._newer[object_id] = self._newest, None
        if self._newest is None:
            self._oldest = object_id
        else:
            self._newer[self._newest] = object_id
        self._newest = object_id

    def access(self, object_id: ObjectId, views: int, now: float) -> None:
        if object_id in self._entries:
            self._visited.add(object_id)

    def remove(self, object_id: ObjectId, *, evicted: bool = False) -> None:
        if self._entries.pop(object_id, None) is None:
            return
        self._visited.discard(object_id)
        older, newer = self._older.pop(object_id), self._newer.pop(object_id)
        if self._hand == object_id:
            self._hand = newer
        if older is None:
            self._oldest = newer
        else:
            self._newer[older] = newer
        if newer is None:
            self._newest = older
        else:
            self._older[newer] = older

    def _next_victim(self) -> PolicyEntry:
        hand = self._hand or self._oldest
        while hand in self._visited:
            self._visited.remove(hand)
            hand = self._newer[hand] or self._oldest
        if hand is None:
            raise LookupError("no object to evict")
        self._hand = hand
        return self._entries[hand]


class S3Fifo(_Queues):
    """Two queues: a small one with a tenth of the bytes for new objects, and a main one.

    An object that was read again while in the small queue moves to the main one. An evicted one leaves a ghost: if it
    returns while that is remembered, it goes to the main queue at once. There are as many ghosts as objects in main.
    An object of the main queue that was read since its last turn gets another one.
    """

    name = "s3-fifo"

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._small_limit = int(limit * _SMALL_SHARE)
        self._small_bytes = 0
        self._small: OrderedDict[ObjectId, None] = OrderedDict()
        self._main: OrderedDict[ObjectId, None] = OrderedDict()
        self._ghosts: OrderedDict[ObjectId, None] = OrderedDict()
        self._counts: dict[ObjectId, int] = {}

    def add(self, entry: PolicyEntry) -> None:
        object_id = entry.object_id
        self.remove(object_id)
        self._entries[object_id], self._counts[object_id] = entry, 0
        if object_id in self._ghosts:
            del self._ghosts[object_id]
            self._main[object_id] = None
        else:
            self._small[object_id] = None
            self._small_bytes += footprint(entry.size)

    def access(self, object_id: ObjectId, views: int, now: float) -> None:
        if object_id in self._entries:
            self._counts[object_id] = min(_MAX_COUNT, self._counts[object_id] + 1)

    def remove(self, object_id: ObjectId, *, evicted: bool = False) -> None:
        entry = self._entries.pop(object_id, None)
        if entry is None:
            return
        del self._counts[object_id]
        if object_id in self._main:
            del self._main[object_id]
            return
        del self._small[object_id]
        self._small_bytes -= footprint(entry.size)
        if evicted:
            self._ghosts[object_id] = None
            while len(self._ghosts) > max(1, len(self._main)):
                self._ghosts.popitem(last=False)

    def _next_victim(self) -> PolicyEntry:
        while True:
            if self._small and (self._small_bytes >= self._small_limit or not self._main):
                object_id = next(iter(self._small))
                if self._counts[object_id] < _MIN_COUNT:
                    return self._entries[object_id]
                del self._small[object_id]
                self._small_bytes -= footprint(self._entries[object_id].size)
                self._main[object_id], self._counts[object_id] = None, 0
            else:
                object_id = next(iter(self._main))
                if not self._counts[object_id]:
                    return self._entries[object_id]
                self._counts[object_id] -= 1
                self._main.move_to_end(object_id)


class Arc(_Queues):
    """ARC, with bytes in place of pages: a queue for objects seen once and one for those seen again, each with ghosts.
    A hit among the ghosts moves the share of the first queue."""

    name = "arc"

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit, self._target = limit, 0.0
        self._once, self._again = _ByteQueue(), _ByteQueue()
        self._once_ghosts, self._again_ghosts = _ByteQueue(), _ByteQueue()

    def add(self, entry: PolicyEntry) -> None:
        object_id, size = entry.object_id, footprint(entry.size)
        self.remove(object_id)
        self._entries[object_id] = entry
        once, again = self._once_ghosts.bytes, self._again_ghosts.bytes
        if self._once_ghosts.pop(object_id):
            self._target = min(self._limit, self._target + size * max(1.0, again / max(1, once)))
            self._again.append(object_id, size)
        elif self._again_ghosts.pop(object_id):
            self._target = max(0.0, self._target - size * max(1.0, once / max(1, again)))
            self._again.append(object_id, size)
        else:
            self._once.append(object_id, size)

    def access(self, object_id: ObjectId, views: int, now: float) -> None:
        if object_id in self._entries:
            size = self._once.pop(object_id) or self._again.pop(object_id)
            self._again.append(object_id, size)

    def remove(self, object_id: ObjectId, *, evicted: bool = False) -> None:
        if self._entries.pop(object_id, None) is None:
            return
        for queue, ghosts in ((self._once, self._once_ghosts), (self._again, self._again_ghosts)):
            size = queue.pop(object_id)
            if size and evicted:
                ghosts.append(object_id, size)
        while self._once_ghosts.ids and self._once.bytes + self._once_ghosts.bytes > self._limit:
            self._once_ghosts.pop(self._once_ghosts.oldest())
        while self._again_ghosts.ids and self._again.bytes + self._again_ghosts.bytes > 2 * self._limit:
            self._again_ghosts.pop(self._again_ghosts.oldest())

    def _next_victim(self) -> PolicyEntry:
        from_once = bool(self._once.ids) and (self._once.bytes > self._target or not self._again.ids)
        return self._entries[(self._once if from_once else self._again).oldest()]


class TinyLfu(_Queues):
    """W-TinyLFU: a window of 1 % of the bytes, then a segmented LRU. The oldest of the window enters it only in
    place of an object that was requested less often, by a count of all requests that is halved from time to time."""

    name = "w-tinylfu"

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._window_limit, self._main_limit = limit // 100, limit - limit // 100
        self._protected_limit = self._main_limit * 8 // 10
        self._window, self._probation, self._protected = _ByteQueue(), _ByteQueue(), _ByteQueue()
        self._counts: dict[ObjectId, int] = {}
        self._counted = 0

    def add(self, entry: PolicyEntry) -> None:
        self.remove(entry.object_id)
        self._entries[entry.object_id] = entry
        self._count(entry.object_id)
        self._window.append(entry.object_id, footprint(entry.size))
        window = self._window
        while window.bytes > self._window_limit and self._main_bytes() < self._main_limit:
            oldest = self._window.oldest()
            self._probation.append(oldest, self._window.pop(oldest))

    def access(self, object_id: ObjectId, views: int, now: float) -> None:
        if object_id not in self._entries:
            return
        self._count(object_id)
        if size := self._window.pop(object_id):
            self._window.append(object_id, size)
            return
        self._protected.append(object_id, self._probation.pop(object_id) or self._protected.pop(object_id))
        while self._protected.bytes > self._protected_limit:
            oldest = self._protected.oldest()
            self._probation.append(oldest, self._protected.pop(oldest))

    def remove(self, object_id: ObjectId, *, evicted: bool = False) -> None:
        if self._entries.pop(object_id, None) is not None:
            for queue in (self._window, self._probation, self._protected):
                queue.pop(object_id)

    def _main_bytes(self) -> int:
        return self._probation.bytes + self._protected.bytes

    def _count(self, object_id: ObjectId) -> None:
        self._counts[object_id] = min(15, self._counts.get(object_id, 0) + 1)
        self._counted += 1
        if self._counted >= 10 * len(self._entries) + 1000:
            self._counts = {known: count // 2 for known, count in self._counts.items() if count > 1}
            self._counted //= 2

    def _next_victim(self) -> PolicyEntry:
        while True:
            main = next((queue for queue in (self._probation, self._protected) if queue.ids), None)
            if main is None:
                return self._entries[self._window.oldest()]
            victim = main.oldest()
            if self._window.bytes <= self._window_limit:
                return self._entries[victim]
            candidate = self._window.oldest()
            if self._counts.get(candidate, 0) <= self._counts.get(victim, 0):
                return self._entries[candidate]
            self._probation.append(candidate, self._window.pop(candidate))
            return self._entries[victim]


class _ByteQueue:
    """Ids in the order of their arrival, with the sum of their bytes."""

    def __init__(self) -> None:
        self.ids: OrderedDict[ObjectId, int] = OrderedDict()
        self.bytes = 0

    def append(self, object_id: ObjectId, size: int) -> None:
        self.ids[object_id] = size
        self.bytes += size

    def pop(self, object_id: ObjectId) -> int:
        """Its bytes; 0 if it is not here."""
        size = self.ids.pop(object_id, 0)
        self.bytes -= size
        return size

    def oldest(self) -> ObjectId:
        return next(iter(self.ids))


class PublishedGdsf(PackedPolicy):
    """GDSF as it was published: w(views) = views, a fixed c0, and no memory. 64 MiB is what the node had."""

    name = "gdsf-1998"
    has_priorities = True

    def __init__(self, miss_cost: int) -> None:
        self._miss_cost = miss_cost
        super().__init__()

    def access(self, object_id: ObjectId, views: int, now: float) -> None:
        slot = self._records.slots.get(object_id)
        if slot is not None:
            self._records.count_access(slot, views, now)
            self._records.priorities[slot] = max(self._records.priorities[slot], self._key(slot, 0.0))

    def _key(self, slot: int, known: float) -> float:
        size = max(1, self._records.sizes[slot])
        return self.inflation + self._records.frequencies[slot] * (self._miss_cost + size) / size

    def _age(self, slot: int) -> None:
        self.inflation = max(self.inflation, self._records.priorities[slot])


OTHER_POLICIES: Mapping[str, Callable[[int], EvictionPolicy]] = {
    "sieve": lambda limit: Sieve(),
    "s3-fifo": S3Fifo,
    "arc": Arc,
    "w-tinylfu": TinyLfu,
    "gdsf-1998": lambda limit: PublishedGdsf(2**50),
    "gdsf-64m": lambda limit: PublishedGdsf(64 * 2**20),
}
"""By name: policies that the node does not have. The argument is the size of the cache in bytes."""
