"""GDSF: Greedy-Dual-Size with Frequency, for misses that cost c0 + size, with a memory of what was evicted.

Priority = L + w(views) × (c0 + size) / size. The lowest priority goes first; of equal ones the object accessed least
recently, then the lesser id. L ("inflation") is the highest priority of all victims so far. An object that is not
requested any more is overtaken by L in time, however popular it was.

The views of victims are kept for a while (`EvictedViews`), so that an object that comes back is no newcomer. Which
victims come back says what views are worth (`ViewWeights`): w(1) = b and w(views) = views^a for more. Where popularity
lasts, a is near 1. Where it moves, objects with many views do not come back, and a falls. Where many objects are viewed
once, b falls.

c0 is what a miss costs besides its bytes, in bytes: how much traffic one avoided miss is worth. It follows the traffic:
a factor × a² × the mean bytes of a view (`MissCost`). A fixed 0 counts bytes alone (size then does not matter: least
frequently used, with ageing). A very large one counts misses alone (the classic form). When c0, a or b move,
priorities that were given before stay until the next access.
Source: Ludmila Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching policy", HP Labs
HPL-98-69R1, 1998; ageing from Pei Cao, Sandy Irani, "Cost-aware WWW proxy caching algorithms", USITS 1997.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from zlib import crc32

from distributor_node.shared.domain.eviction.packed import PackedPolicy
from distributor_node.shared.domain.eviction.policy import PolicyEntry, PriorityBasis
from distributor_node.shared.domain.objects import ObjectId

DEFAULT_COST_FACTOR = 20.0
FORMER_MISS_COST = 64 * 1024**2
"""c0 of versions that did not write down by which c0 priorities were given, unless it was set."""
_UNKNOWN_MEAN = FORMER_MISS_COST / DEFAULT_COST_FACTOR  # bytes of a view, before the first one


@dataclass(frozen=True, slots=True)
class MissCost:
    """How c0 is found: `fixed` bytes, or `factor` × a² × the mean bytes of a view."""

    factor: float = DEFAULT_COST_FACTOR
    fixed: int | None = None  # bytes

    def by_mean(self, mean: float, exponent: float = 1.0) -> float:
        """c0 in bytes. `mean`: bytes of a view; `exponent`: a. Where popularity moves, small objects stay long enough
        at a lower c0, and more bytes are hits."""
        return self.factor * exponent**2 * mean if self.fixed is None else float(self.fixed)


AUTO_COST = MissCost()


def priority_above_inflation(size: int, weighed: float, miss_cost: float) -> float:
    """w(views) × (c0 + size) / size; an empty object counts as one byte, so that its priority is finite."""
    size = max(1, size)
    return weighed * (miss_cost + size) / size


class StoredPriorities:
    """What priorities that were stored under an earlier `basis` mean now.

    Under the same policy and c0 they hold as they are. Otherwise the order is made again: of each stored priority the
    part that was L at the last access is taken and scaled as c0 has changed. So recency is kept.
    """

    def __init__(self, basis: PriorityBasis, cost: MissCost) -> None:
        mean = basis.viewed_bytes / basis.views if basis.views else _UNKNOWN_MEAN
        self._weights = ViewWeights(basis.exponent, basis.first_weight)
        self.miss_cost = cost.by_mean(mean, self._weights.exponent)
        self.as_stored = basis.policy == Gdsf.name and basis.miss_cost == self.miss_cost
        """Whether stored priorities hold as they are."""
        self._marked = basis.policy == Gdsf.name
        unmarked = FORMER_MISS_COST if cost.fixed is None else cost.fixed
        self._former_cost = basis.miss_cost if self._marked else unmarked
        self._former_inflation = basis.inflation
        scale = self.miss_cost / self._former_cost if self._former_cost else 0.0
        self._scale = 1.0 if self.as_stored else scale
        self.inflation = basis.inflation * self._scale

    def priority(self, size: int, views: int, stored: float) -> float:
        """`stored`: 0.0 for none. Then it is the highest possible one, as if the object had been accessed just now."""
        given = 0.0 < stored < math.inf
        if given and self.as_stored:
            return stored
        weighed = self._weights.of(views)
        above = priority_above_inflation(size, weighed, self.miss_cost)
        if not given:
            return self.inflation + above
        former = max(1, size)
        former_weight = weighed if self._marked else views
        level = stored - former_weight * (self._former_cost + former) / former
        return min(max(level, 0.0), self._former_inflation) * self._scale + above


class Gdsf(PackedPolicy):
    """Greedy-Dual-Size with Frequency, as the module describes it."""

    name = "gdsf"
    has_priorities = True

    def __init__(self, cost: MissCost = AUTO_COST) -> None:
        self._cost = cost
        super().__init__()

    def _clear(self, basis: PriorityBasis) -> None:
        super()._clear(basis)
        self._stored: StoredPriorities | None = StoredPriorities(basis, self._cost)
        self.inflation, self._miss_cost = self._stored.inflation, self._stored.miss_cost
        self._views, self._viewed_bytes = basis.views, basis.viewed_bytes
        self._evicted = EvictedViews()
        self._weights = ViewWeights(basis.exponent, basis.first_weight)

    @property
    def basis(self) -> PriorityBasis:
        return PriorityBasis(
            self.inflation,
            self.name,
            self._miss_cost,
            self._views,
            self._viewed_bytes,
            self._weights.exponent,
            self._weights.first,
        )

    def end_restore(self) -> None:
        self._stored = None

    def store(self, object_id: ObjectId, size: int, now: float, *, begins_view: bool = True) -> None:
        """Store an object with the views that are remembered of it, and one more if a view begins."""
        remembered = self._evicted.take(object_id)
        if remembered:
            self._weights.count_return(remembered)
        views = remembered + begins_view
        if begins_view:
            self._count_views(size, 1)
        self.add(PolicyEntry(object_id, size, max(1, views), now))

    def access(self, object_id: ObjectId, views: int, now: float) -> None:
        """Raise the priority. Without further views (a long send continues) it rises by as much as L has risen."""
        records = self._records
        slot = records.slots.get(object_id)
        if slot is None:
            return
        size = records.sizes[slot]
        if views:
            self._count_views(size, views)
        frequency = records.count_access(slot, views, now)
        above = priority_above_inflation(size, self._weights.of(frequency), self._miss_cost)
        priority = self.inflation + above
        records.priorities[slot] = max(records.priorities[slot], priority)

    def _count_views(self, size: int, views: int) -> None:
        """Move the mean, and c0 with it. Old views count less and less: both sums are halved from time to time."""
        self._views += views
        self._viewed_bytes += views * size
        if self._views >= 32 * len(self._records.slots) + 20_000:
            self._views /= 2
            self._viewed_bytes /= 2
        self._move_cost()

    def _move_cost(self) -> None:
        if self._views:
            mean = self._viewed_bytes / self._views
            self._miss_cost = self._cost.by_mean(mean, self._weights.exponent)

    def _key(self, slot: int, known: float) -> float:
        size, frequency = self._records.sizes[slot], self._records.frequencies[slot]
        if known and self._stored is not None:
            return self._stored.priority(size, frequency, known)
        if known:
            return known
        weighed = self._weights.of(frequency)
        return self.inflation + priority_above_inflation(size, weighed, self._miss_cost)

    def _age(self, slot: int) -> None:
        """L never falls, not even when the victim is an object that was spared before."""
        self.inflation = max(self.inflation, self._records.priorities[slot])
        views, residents = self._records.frequencies[slot], len(self._records.slots)
        self._evicted.put(ObjectId(self._records.ids[slot]), views, residents)
        if self._weights.count_eviction(views, residents):
            self._move_cost()


_LEAST_EXPONENT, _MOST_EXPONENT = 0.4, 1.0
_LEAST_FIRST, _MOST_FIRST = 0.1, 0.5
_STEP = 0.2
_FEWEST_SEEN = 5


class ViewWeights:
    """What views are worth, learned from the victims that come back.

    When an object is evicted its priority is about L, whatever its views were. So of all victims the same share should
    come back. Victims are counted in three classes: one view, two, and more. If those with more views than two come
    back more seldom than those with two, views count too much: `exponent` falls, else it rises. If those with one view
    come back more seldom, `first` falls, else it rises. Both move once for every 500 victims, or for as many as a
    quarter of the objects in the cache: a victim needs time to come back. Shares are of the victims counted lately,
    with half of their weight for each move since.
    """

    def __init__(self, exponent: float, first: float) -> None:
        self.exponent = min(max(exponent, _LEAST_EXPONENT), _MOST_EXPONENT)
        self.first = min(max(first, _LEAST_FIRST), _MOST_FIRST)
        self._evicted, self._returned = [1.0] * 3, [0.1] * 3
        self._until_move = 500

    def of(self, views: int) -> float:
        """w(views)."""
        return views**self.exponent if views > 1 else self.first

    def count_return(self, views: int) -> None:
        """A victim that had these views is stored again."""
        self._returned[min(views, 3) - 1] += 1

    def count_eviction(self, views: int, residents: int) -> bool:
        """A victim has these views. True if the weights may have moved. `residents`: objects in the cache."""
        self._evicted[min(views, 3) - 1] += 1
        self._until_move -= 1
        if self._until_move > 0:
            return False
        self._until_move = max(500, residents // 4)
        one, two, more = self._evicted
        if two > _FEWEST_SEEN:
            if more > _FEWEST_SEEN:
                moved = self.exponent + _STEP * self._log_odds(2)
                self.exponent = min(max(moved, _LEAST_EXPONENT), _MOST_EXPONENT)
            if one > _FEWEST_SEEN:
                moved = self.first * math.exp(_STEP * self._log_odds(0))
                self.first = min(max(moved, _LEAST_FIRST), _MOST_FIRST)
        self._evicted = [count / 2 + 0.1 for count in self._evicted]
        self._returned = [count / 2 + 0.01 for count in self._returned]
        return True

    def _log_odds(self, place: int) -> float:
        """Log of how much more often the victims of this class come back than those with two views; -1 to 1."""
        share, other = self._returned[place] / self._evicted[place], self._returned[1] / self._evicted[1]
        return min(max(math.log(share / other), -1.0), 1.0)


_ROW = 8
_FEWEST_CELLS = 256
_MOST_EVICTED_VIEWS = 255


class EvictedViews:
    """How many views each of the last victims had (a ghost list), in 5 bytes for each.

    A table of rows of 8 cells. A cell has the 32-bit hash of an id and its views up to 255. A row is first in, first
    out. There are two thirds to four thirds as many cells as objects in the cache. Twice as many cells are made, and
    all is forgotten, when the cache has grown to more than 3 objects for 2 cells.
    """

    def __init__(self) -> None:
        self._resize(_FEWEST_CELLS)

    def _resize(self, cells: int) -> None:
        self.cells = cells
        self._tags, self._views = array("I", bytes(4 * cells)), bytearray(cells)
        self._shift = 33 - (cells // _ROW).bit_length()  # a row's number has that many bits less than 32

    def put(self, object_id: ObjectId, views: int, residents: int) -> None:
        """Remember a victim. `residents`: objects in the cache."""
        if 2 * residents > 3 * self.cells:
            self._resize(2 * self.cells)
        tag = crc32(object_id.encode())
        first = self._row_of(tag)
        last = first + _ROW - 1
        self._tags[first + 1 : last + 1] = self._tags[first:last]
        self._views[first + 1 : last + 1] = self._views[first:last]
        self._tags[first], self._views[first] = tag, min(views, _MOST_EVICTED_VIEWS)

    def take(self, object_id: ObjectId) -> int:
        """Its views, and forget them; 0: none are known."""
        tag = crc32(object_id.encode())
        first = self._row_of(tag)
        last = first + _ROW - 1
        for cell in range(first, last + 1):
            views = self._views[cell]
            if not views:
                break
            if self._tags[cell] == tag:
                self._tags[cell:last] = self._tags[cell + 1 : last + 1]
                self._views[cell:last] = self._views[cell + 1 : last + 1]
                self._views[last] = 0
                return views
        return 0

    def _row_of(self, tag: int) -> int:
        """First cell. The hash of similar ids is spread once more: its low bits alone would fill some rows first."""
        return ((tag * 2_654_435_761 & 0xFFFFFFFF) >> self._shift) * _ROW
