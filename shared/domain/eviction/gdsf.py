"""GDSF: Greedy-Dual-Size with Frequency, for misses that cost c0 + size, with a memory of what was evicted.

Priority = L + w(views) × (1 / size + 1 / c0), in views per MiB. The lowest priority goes first; of equal ones the
object accessed least recently, then the lesser id. L ("inflation") is the highest priority of all victims so far. An
object that is not requested any more is overtaken by L in time, however popular it was.

The views of victims are kept for a while (`EvictedViews`), so that an object that comes back is no newcomer. Until its
next view they count less, because it was evicted for good reason. Which victims come back says what views are worth
(`ViewWeights`): w(1) = b and w(views) = views^a for more. Where popularity lasts, a is near 1. Where it moves, objects
with many views do not come back, and a falls. Where many objects are viewed once, b falls.

c0 is what a miss costs besides its bytes, in bytes: how much traffic one avoided miss is worth. It follows the traffic:
a factor × a × the mean bytes of a view (`MissCost`). The factor is as low as the object hit ratio allows
(`CostFactor`). A fixed c0 of 0 counts bytes alone (size then does not matter: least frequently used, with ageing). A
very large one counts misses alone (the classic form). When c0, a or b move, priorities that were given before stay
until the next access.
Source: Ludmila Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching policy", HP Labs
HPL-98-69R1, 1998; ageing from Pei Cao, Sandy Irani, "Cost-aware WWW proxy caching algorithms", USITS 1997.
"""

from __future__ import annotations

import heapq
import math
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import compress
from zlib import crc32

from distributor_node.shared.domain.eviction.packed import PackedPolicy, PackedRecords
from distributor_node.shared.domain.eviction.policy import FIRST_COST_FACTOR, PolicyEntry, PriorityBasis
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import footprint

FORMER_MISS_COST = 64 * 1024**2
"""c0 of versions that did not write down by which c0 priorities were given, unless it was set."""
_UNKNOWN_MEAN = FORMER_MISS_COST / 20  # bytes of a view, before the first one
_MIB = 1024**2
_RETURNED_SHARE = 0.4
"""Of its remembered views so many count for an object that comes back, until its next view."""


@dataclass(frozen=True, slots=True)
class MissCost:
    """How c0 is found: `fixed` bytes, or `factor` × a × the mean bytes of a view. Without either, `CostFactor` finds
    the factor."""

    factor: float | None = None
    fixed: int | None = None  # bytes

    def by_mean(self, mean: float, exponent: float = 1.0, found: float = FIRST_COST_FACTOR) -> float:
        """c0 in bytes. `mean`: bytes of a view; `exponent`: a; `found`: the factor unless it is set. Where popularity
        moves, small objects stay long enough at a lower c0, and more bytes are hits."""
        times = self.times_mean(exponent, found)
        return float(self.fixed or 0) if times is None else times * mean

    def times_mean(self, exponent: float, found: float) -> float | None:
        """What the mean is multiplied by; None: c0 is fixed."""
        if self.fixed is not None:
            return None
        return (found if self.factor is None else self.factor) * exponent


AUTO_COST = MissCost()


def priority_above_inflation(size: int, weighed: float, miss_cost: float) -> float:
    """w(views) × (1 / size + 1 / c0), times MiB. An object and c0 are counted as one byte at least, so that it is
    finite. Whatever c0 is, a small object's is nearly the same: so c0 can move without new priorities for all."""
    size = size or 1
    return weighed * _MIB * (miss_cost + size) / (size * max(1.0, miss_cost))


class StoredPriorities:
    """What priorities that were stored under an earlier `basis` mean now.

    Under the same policy and c0 they hold as they are. Otherwise the order is made again: of each stored priority the
    part that was L at the last access is taken and brought to views per MiB. So recency is kept.
    """

    def __init__(self, basis: PriorityBasis, cost: MissCost) -> None:
        mean = basis.viewed_bytes / basis.views if basis.views else _UNKNOWN_MEAN
        self._weights = ViewWeights(basis.exponent, basis.first_weight)
        self.miss_cost = cost.by_mean(mean, self._weights.exponent, bounded_factor(basis.cost_factor))
        self._per_mib = basis.policy == Gdsf.mark
        self.as_stored = self._per_mib and basis.miss_cost == self.miss_cost
        """Whether stored priorities hold as they are."""
        # Earlier versions: w(views) × (c0 + size) / size. The earliest had w(views) = views and noted no c0
        self._views_weigh = basis.policy in (Gdsf.mark, Gdsf.name)
        unmarked = FORMER_MISS_COST if cost.fixed is None else cost.fixed
        self._former_cost = basis.miss_cost if self._views_weigh else unmarked
        self._scale = 1.0 if self._per_mib else _MIB / max(1.0, self._former_cost)
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
        former_weight = weighed if self._views_weigh else views
        former = priority_above_inflation(size, former_weight, self._former_cost)
        return min(max(stored * self._scale - former, 0.0), self.inflation) + above


class Gdsf(PackedPolicy):
    """Greedy-Dual-Size with Frequency, as the module describes it."""

    name = "gdsf"
    mark = "gdsf, views per MiB"
    """Of a basis whose priorities are in this unit."""
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
        self._factor = bounded_factor(basis.cost_factor)
        self._weights = ViewWeights(basis.exponent, basis.first_weight)
        self._times_mean = self._cost.times_mean(self._weights.exponent, self._factor)
        self._search = (
            CostFactor(self._factor, partial(_note_sample, self._records))
            if self._cost == AUTO_COST
            else None
        )

    @property
    def basis(self) -> PriorityBasis:
        return PriorityBasis(
            self.inflation,
            self.mark,
            self._miss_cost,
            self._views,
            self._viewed_bytes,
            self._weights.exponent,
            self._weights.first,
            self._factor,
        )

    def restore(self, entries: Iterable[PolicyEntry], basis: PriorityBasis) -> None:
        super().restore(entries, basis)
        if self._search is not None:
            self._search.classic.sample_for(len(self._records.slots))

    def end_restore(self) -> None:
        self._stored = None
        if self._search is not None:
            self._search.classic.sample_for(len(self._records.slots))

    def store(self, object_id: ObjectId, size: int, now: float, *, begins_view: bool = True) -> None:
        """Store an object with the views that are remembered of it, and one more if a view begins."""
        remembered = self._evicted.take(object_id)
        if remembered:
            self._weights.count_return(remembered)
        if begins_view:
            self._count_views(size, 1)
        self.remove(object_id)
        records = self._records
        slot = records.insert(object_id, size, remembered + begins_view, now)
        weighed = self._weights.first
        if remembered:
            weighed = self._weights.of(max(1.0, _RETURNED_SHARE * remembered + begins_view))
        records.priorities[slot] = self.inflation + priority_above_inflation(size, weighed, self._miss_cost)
        self._heap.push(slot)
        search = self._search
        if search is not None and search.classic.count_resident(object_id, size):
            records.sampled[slot] = 1
            if begins_view:
                self._find_factor(search, object_id, size, 1, hit=False)

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
        weights, priorities = self._weights, records.priorities
        weighed = weights.few[frequency] if frequency < _FEW_VIEWS else weights.of(frequency)
        before, priority = priorities[slot], priority_above_inflation(size, weighed, self._miss_cost)
        priority += self.inflation
        if priority > before:
            priorities[slot] = priority
        if views and records.sampled[slot] and self._search is not None:
            self._find_factor(self._search, object_id, size, views, hit=True)

    def _find_factor(
        self, search: CostFactor, object_id: ObjectId, size: int, views: int, *, hit: bool
    ) -> None:
        if search.count_view(object_id, size, views, hit=hit):
            self._factor = search.value
            self._move_cost()

    def _count_views(self, size: int, views: int) -> None:
        """Move the mean, and c0 with it. Old views count less and less: both sums are halved from time to time."""
        counted, viewed_bytes = self._views + views, self._viewed_bytes + views * size
        if counted >= 32 * len(self._records.slots) + 20_000:
            counted, viewed_bytes = counted / 2, viewed_bytes / 2
        self._views, self._viewed_bytes = counted, viewed_bytes
        if self._times_mean is not None:
            self._miss_cost = self._times_mean * (viewed_bytes / counted)

    def _move_cost(self) -> None:
        """The factor or a has moved, and c0 moves with it."""
        self._times_mean = self._cost.times_mean(self._weights.exponent, self._factor)
        if self._views and self._times_mean is not None:
            self._miss_cost = self._times_mean * (self._viewed_bytes / self._views)

    def _insert(self, entry: PolicyEntry) -> int:
        slot = super()._insert(entry)
        if self._search is not None and self._search.classic.count_resident(entry.object_id, entry.size):
            self._records.sampled[slot] = 1
        return slot

    def _remove(self, slot: int, *, evicted: bool) -> None:
        records = self._records
        if records.sampled[slot] and self._search is not None:
            records.sampled[slot] = 0
            self._search.classic.count_resident(records.ids[slot], records.sizes[slot], here=False)
        super()._remove(slot, evicted=evicted)

    def _key(self, slot: int, known: float) -> float:
        if known and self._stored is None:
            return known
        size, frequency = self._records.sizes[slot], self._records.frequencies[slot]
        if known and self._stored is not None:
            return self._stored.priority(size, frequency, known)
        weighed = self._weights.of(frequency)
        return self.inflation + priority_above_inflation(size, weighed, self._miss_cost)

    def _age(self, slot: int) -> None:
        """L never falls, not even when the victim is an object that was spared before."""
        self.inflation = max(self.inflation, self._records.priorities[slot])
        views, residents = self._records.frequencies[slot], len(self._records.slots)
        self._evicted.put(self._records.ids[slot], views, residents)
        if self._weights.count_eviction(views, residents, self._factor):
            self._move_cost()


def _note_sample(records: PackedRecords, samples: Callable[[str], bool]) -> int:
    """Note which objects are in the sample now; their bytes, with the records. The sample only ever shrinks."""
    taken = 0
    for slot in compress(range(len(records.ids)), records.sampled):
        if samples(records.ids[slot]):
            taken += footprint(records.sizes[slot])
        else:
            records.sampled[slot] = 0
    return taken


_LEAST_EXPONENT, _MOST_EXPONENT = 0.2, 1.0
_LEAST_FIRST, _MOST_FIRST = 0.1, 0.5
_STEP = 0.2
_FEWEST_SEEN = 5
_FEW_VIEWS = 64


class ViewWeights:
    """What views are worth, learned from the victims that come back.

    When an object is evicted its priority is about L, whatever its views were. So of all victims the same share should
    come back. Victims are counted in three classes: one view, two, and more. If those with more views than two come
    back more seldom than those with two, views count too much: `exponent` falls, else it rises. If those with one view
    come back more seldom, `first` falls, else it rises. Both move once for every 500 victims, or for as many as a
    quarter of the objects in the cache: a victim needs time to come back. Shares are of the victims counted lately,
    with half of their weight for each move since. The higher the factor of c0, the less `first` may fall (0.1 to 0.2):
    where too few objects are hits, new ones need a chance.
    """

    def __init__(self, exponent: float, first: float) -> None:
        self.exponent = min(max(exponent, _LEAST_EXPONENT), _MOST_EXPONENT)
        self.first = min(max(first, _LEAST_FIRST), _MOST_FIRST)
        self._evicted, self._returned = [1.0] * 3, [0.1] * 3
        self._until_move = 500
        self.few = self._of_few()
        """w(views) for fewer than 64 views: a hit looks it up."""

    def _of_few(self) -> list[float]:
        return [self.of(views) for views in range(_FEW_VIEWS)]

    def of(self, views: float) -> float:
        """w(views). Between one view and two it is on the straight line."""
        if views >= 2:
            return math.pow(views, self.exponent)
        return self.first + (views - 1) * (math.pow(2, self.exponent) - self.first)

    def count_return(self, views: int) -> None:
        """A victim that had these views is stored again."""
        self._returned[min(views, 3) - 1] += 1

    def count_eviction(self, views: int, residents: int, cost_factor: float) -> bool:
        """A victim has these views. True if the weights may have moved. `residents`: objects in the cache;
        `cost_factor`: as it is now."""
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
                least = _LEAST_FIRST * (1 + min(1.0, cost_factor / FIRST_COST_FACTOR))
                self.first = min(max(moved, least), _MOST_FIRST)
            self.few = self._of_few()
        self._evicted = [count / 2 + 0.1 for count in self._evicted]
        self._returned = [count / 2 + 0.01 for count in self._returned]
        return True

    def _log_odds(self, place: int) -> float:
        """Log of how much more often the victims of this class come back than those with two views; -1 to 1."""
        share, other = self._returned[place] / self._evicted[place], self._returned[1] / self._evicted[1]
        return min(max(math.log(share / other), -1.0), 1.0)


_LEAST_FACTOR, _MOST_FACTOR = 1.5, 50.0
_ALLOWED_LOSS = 0.003
_COMPARED_VIEWS = 1000
_GAIN, _LARGEST_STEP = 20.0, 0.1
_KEPT_OF_COUNTS = 0.9


def bounded_factor(value: float) -> float:
    return min(max(value, _LEAST_FACTOR), _MOST_FACTOR)


NoteSample = Callable[[Callable[[str], bool]], int]
"""Is told which ids are in a sample that has changed, and returns the bytes that these take in the cache."""


class CostFactor:
    """The factor of c0, as low as the object hit ratio allows: the lower it is, the more bytes are hits.

    The object hit ratio is held against that of the classic form (c0 = ∞, w(views) = views), on the same views. That
    runs in miniature, on a sample of the ids (`ClassicMiniature`). Once for every 1000 views compared the factor falls
    if the classic form is ahead by less than 0.3 points, else it rises: by 20 times the difference, and by a tenth at
    most. Hits are of the views counted lately, with nine tenths of their weight for each move since.
    """

    def __init__(self, value: float, note_sample: NoteSample) -> None:
        self.value = value
        self.classic = ClassicMiniature(note_sample)
        self._counted = self._ahead = 0.0  # views; and by how many hits the classic form is ahead
        self._until_move = _COMPARED_VIEWS

    def count_view(self, object_id: ObjectId, size: int, views: int, *, hit: bool) -> bool:
        """A view of an object in the sample, or several reported together. `hit`: it was in the cache. True if the
        factor has moved."""
        classic_hit = self.classic.view(object_id, size, views)
        if classic_hit is None:
            return False
        self._counted += 1
        self._ahead += classic_hit - hit
        self._until_move -= 1
        if self._until_move > 0:
            return False
        self._until_move = _COMPARED_VIEWS
        step = _GAIN * (self._ahead / self._counted - _ALLOWED_LOSS)
        self.value = bounded_factor(self.value * math.exp(min(max(step, -_LARGEST_STEP), _LARGEST_STEP)))
        self._counted *= _KEPT_OF_COUNTS
        self._ahead *= _KEPT_OF_COUNTS
        return True


_MOST_SAMPLED = 8192
_ALL_HASHES = 2**32
_SPREAD = 2_246_822_519


class ClassicMiniature:
    """The classic form of GDSF in miniature: a sample of the ids, in as many bytes as these have in the cache itself.

    Priority = L + views / size, without a memory. The sample is of all ids at first. It is halved when it has more than
    8192 objects, which take about two megabytes. An id is in the sample or is not, by its hash, so all its views are
    seen. A share of the bytes would not do as room: a few large objects more or less in the sample change much.
    Source: Carl Waldspurger et al., "Cache modeling and optimization using miniature simulations", USENIX ATC 2017.
    """

    def __init__(self, note_sample: NoteSample, most: int = _MOST_SAMPLED) -> None:
        self._note_sample, self._most = note_sample, most
        self.sampled = _ALL_HASHES
        """Ids with a hash below this are in the sample."""
        self._room = 0  # bytes, with the records
        self._inflation, self._bytes, self._full = 0.0, 0, False
        self._held: dict[str, tuple[float, int, int]] = {}  # priority, views, footprint
        self._order: list[tuple[float, str]] = []  # heap; an object's priority may have risen since

    def __len__(self) -> int:
        return len(self._held)

    def count_resident(self, object_id: str, size: int, *, here: bool = True) -> bool:
        """An object of this size has come into the cache, or is no more `here`. Whether it is in the sample."""
        sampled = self.samples(object_id)
        if sampled:
            self._room += footprint(size) if here else -footprint(size)
        return sampled

    def sample_for(self, residents: int) -> None:
        """Choose the sample for a cache that is given with so many objects at once."""
        while residents * self.sampled > self._most * _ALL_HASHES:
            self.sampled >>= 1
        self._resample()

    def view(self, object_id: ObjectId, size: int, views: int) -> bool | None:
        """Whether an object of the sample is here; stores it if not. None: nothing was evicted yet."""
        known = self._held.get(object_id)
        if known is None:
            self._store(object_id, size, views)
        else:
            before, counted, taken = known
            counted += views
            self._held[object_id] = max(before, self._inflation + counted / max(1, size)), counted, taken
        return known is not None if self._full else None

    def samples(self, object_id: str) -> bool:
        """Whether the object is in the sample."""
        sampled = self.sampled
        return sampled == _ALL_HASHES or crc32(object_id.encode()) * _SPREAD & 0xFFFFFFFF < sampled

    def _store(self, object_id: ObjectId, size: int, views: int) -> None:
        taken = footprint(size)
        if taken > self._room:
            return
        while self._bytes + taken > self._room:
            self._evict()
        self._bytes += taken
        priority = self._inflation + views / max(1, size)
        self._held[object_id] = priority, views, taken
        heapq.heappush(self._order, (priority, object_id))
        if len(self._held) > self._most:
            self.sampled >>= 1
            self._resample()

    def _evict(self) -> None:
        while True:
            pushed, object_id = self._order[0]
            priority, _, taken = self._held[object_id]
            if priority == pushed:
                break
            heapq.heapreplace(self._order, (priority, object_id))
        heapq.heappop(self._order)
        del self._held[object_id]
        self._bytes -= taken
        self._inflation, self._full = max(self._inflation, priority), True

    def _resample(self) -> None:
        self._room = self._note_sample(self.samples)
        self._held = {held: fields for held, fields in self._held.items() if self.samples(held)}
        self._bytes = sum(taken for _, _, taken in self._held.values())
        self._order = [(priority, held) for held, (priority, _, _) in self._held.items()]
        heapq.heapify(self._order)


_ROW = 8
_FEWEST_CELLS = 256
_MOST_EVICTED_VIEWS = 255
_CELL = struct.Struct("<IB")
"""32-bit hash of an id, and its views."""
_CELL_BYTES = _CELL.size
_ROW_BYTES = _ROW * _CELL_BYTES


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
        self._table = bytearray(cells * _CELL_BYTES)
        self._shift = 33 - (cells // _ROW).bit_length()  # a row's number has that many bits less than 32

    def put(self, object_id: str, views: int, residents: int) -> None:
        """Remember a victim. `residents`: objects in the cache."""
        if 2 * residents > 3 * self.cells:
            self._resize(2 * self.cells)
        tag = crc32(object_id.encode())
        first = self._row_of(tag)
        end, table = first + _ROW_BYTES, self._table
        table[first + _CELL_BYTES : end] = table[first : end - _CELL_BYTES]
        _CELL.pack_into(table, first, tag, min(views, _MOST_EVICTED_VIEWS))

    def take(self, object_id: str) -> int:
        """Its views, and forget them; 0: none are known."""
        tag = crc32(object_id.encode())
        first = self._row_of(tag)
        end = first + _ROW_BYTES
        row = self._table[first:end]
        cell = self._find(row, tag)
        if cell < 0:
            return 0
        views = row[cell + _CELL_BYTES - 1]
        self._table[first + cell : end] = row[cell + _CELL_BYTES :] + bytes(_CELL_BYTES)
        return views

    @staticmethod
    def _find(row: bytearray, tag: int) -> int:
        """Where the cell with this hash begins; -1: there is none."""
        wanted = tag.to_bytes(4, "little")
        place = row.find(wanted)
        while place > 0 and place % _CELL_BYTES:  # across two cells
            place = row.find(wanted, place + 1)
        return place

    def _row_of(self, tag: int) -> int:
        """Its first byte. The hash of similar ids is spread once more: by its low bits alone some rows fill first."""
        return ((tag * 2_654_435_761 & 0xFFFFFFFF) >> self._shift) * _ROW_BYTES
