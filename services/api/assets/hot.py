"""Objects that are asked for right now: open, described, with their heads ready-made; the smallest ones in memory."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from time import monotonic

from services.api.assets.decision import Description
from services.api.assets.reading import is_cached, read_cached
from services.api.assets.ready_heads import ReadyHeads
from shared.adapters.volume import FileIdentity, OpenObject, Volume
from shared.domain.errors import InvalidInput, VolumeError
from shared.domain.objects import ObjectId, StoredRecord

BELIEVED_SECONDS = 0.2
"""How long an object is answered without another look at its name on the volume."""
IDLE_SECONDS = 1.0
"""How long an object that nobody asks for is kept open."""
LARGEST_IN_MEMORY = 16 * 1024
"""Bytes. Larger objects go from the page cache to the socket without a copy, which is quicker than from our memory."""
MOST_OPEN = 2048
_ENTRY_BYTES = 5 * 1024
"""What a body in memory takes beside itself, heads above all."""
_SEEN_ONCE = 20_000
_MEMORY_LOOK = 10.0
_MOST_HEADS = 4000
"""Ready-made heads that are kept when their objects are not (some 3 KiB each)."""
_NEAR_AS_A_WHOLE = 1024 * 1024
_SWEPT_AT_ONCE = 200


@dataclass(slots=True, eq=False)
class HotObject:
    """One object. `found` is None where `body` is in memory. Times are monotonic seconds: `believed_until` its name
    must be looked at again, `taken_until` its bytes may be sent without another `HotObjects.take`, `used_at` some were
    last sent (or it was opened), `counted_at` its access was last counted, `near_until` it counts as lying in the page
    cache. `sends` go on at this moment."""

    object_id: ObjectId
    described: Description
    heads: ReadyHeads
    identity: FileIdentity
    found: OpenObject | None
    body: bytes | None = None
    size: int = 0
    believed_until: float = 0.0
    taken_until: float = 0.0
    used_at: float = 0.0
    counted_at: float = -10.0
    near_until: float = 0.0
    sends: int = 0
    held: bool = False
    dropped: bool = False

    @property
    def descriptor(self) -> int:
        """Of the open file; -1 where there is none."""
        return self.found.descriptor if self.found is not None else -1

    def is_near(self, first: int, length: int, now: float, *, first_is: bool = False) -> bool:
        """Whether these bytes lie in the page cache, so that sending them holds nobody up; `first_is`: the first one is
        known to. Of small objects that is found out once in a while for all of them."""
        if now < self.near_until:
            return True
        if self.size > _NEAR_AS_A_WHOLE:
            return is_cached(self.descriptor, first, min(length, _NEAR_AS_A_WHOLE), first_is=first_is)
        if not is_cached(self.descriptor, 0, self.size):
            return False
        self.near_until = now + BELIEVED_SECONDS
        return True

    def lock_shared(self) -> bool:
        """Keep the object from being removed until it is closed. False: it is being removed."""
        if not self.held and self.found is not None:
            self.held = self.found.lock_shared()
        return self.held

    def begin_send(self) -> None:
        """Until `end_send` the file stays open. Call it before anybody else may have a turn: a descriptor that was
        closed meanwhile may be another object's by then."""
        self.sends += 1

    def end_send(self) -> None:
        self.sends -= 1
        if self.dropped and not self.sends:
            self.close()

    def close(self) -> None:
        if self.found is not None:
            self.found.close()


@dataclass(slots=True)
class _Memory:
    """Bytes held by bodies, and how many may be."""

    limit: int
    used: int = 0
    seen: dict[bytes, None] = field(default_factory=dict)

    def wants(self, key: bytes) -> bool:
        """True from the second time on."""
        if key in self.seen:
            return True
        if len(self.seen) >= _SEEN_ONCE:
            self.seen.clear()
        self.seen[key] = None
        return False


class HotObjects:
    """By id, as bytes. `run` is the task that lets go of what nobody asks for.

    From the first `take` on, while an object is open here, the shared lock on it is held, so that its bytes count until
    they are sent: whoever wants it gone sets it aside, it is missed here within BELIEVED_SECONDS, and closed. Bodies in
    memory need no lock. What sends no bytes, a HEAD or a 304, takes no object: it holds nothing, and renews nothing.
    """

    def __init__(
        self, volume: Volume, memory: int, most_open: int = MOST_OPEN, clock: Callable[[], float] = monotonic
    ) -> None:
        """`memory`: bytes that bodies may take."""
        self._volume = volume
        self._memory = _Memory(memory)
        self._most_open = most_open
        self._clock = clock
        self._open: OrderedDict[bytes, HotObject] = OrderedDict()
        self._in_memory: OrderedDict[bytes, HotObject] = OrderedDict()
        self._heads: OrderedDict[StoredRecord, tuple[Description, ReadyHeads]] = OrderedDict()
        self._memory_look = 0.0

    def get(self, key: bytes, now: float) -> HotObject | None:
        """The object, if it is cached and lies where it should; None: somebody else must find out more. Bytes of it
        are for those who `take` it."""
        hot = self._in_memory.get(key) or self._open.get(key)
        if hot is None or (now >= hot.believed_until and not self._believe(key, hot, now)):
            return self._add(key, now)
        return hot

    def take(self, key: bytes, hot: HotObject) -> HotObject | None:
        """To be called before bytes are sent, unless `taken_until` is still to come: the object, which stays as it is
        from now on, and may be in memory now; None: it is being removed."""
        if hot.body is not None:
            self._in_memory.move_to_end(key)
        else:
            if not hot.lock_shared():
                self.drop(key)
                return None
            self._open.move_to_end(key)
            if hot.size <= LARGEST_IN_MEMORY and self._memory.wants(key):
                hot = self._take_into_memory(key, hot)
        hot.taken_until = hot.believed_until
        return hot

    def drop(self, key: bytes) -> None:
        """Forget the object: what is sent of it is sent to its end."""
        kept = self._in_memory.pop(key, None)
        if kept is not None and kept.body is not None:
            self._memory.used -= len(kept.body) + _ENTRY_BYTES
        hot = self._open.pop(key, None)
        if hot is not None:
            hot.dropped = True
            if not hot.sends:
                hot.close()

    def _believe(self, key: bytes, hot: HotObject, now: float) -> bool:
        if self._volume.identity_of(hot.object_id) != hot.identity:
            self.drop(key)
            return False
        hot.believed_until = now + BELIEVED_SECONDS
        return True

    def _add(self, key: bytes, now: float) -> HotObject | None:
        try:
            object_id = ObjectId.parse(key.decode("ascii"))
            found = self._volume.open_object(object_id)
        except (InvalidInput, UnicodeDecodeError, VolumeError):
            return None
        if found is None:
            return None
        hot = self._describe(object_id, found)
        if hot is None:
            found.close()
            return None
        hot.believed_until, hot.used_at = now + BELIEVED_SECONDS, now
        self._open[key] = hot
        while len(self._open) > self._most_open:
            self.drop(next(iter(self._open)))
        return hot

    def _describe(self, object_id: ObjectId, found: OpenObject) -> HotObject | None:
        """None for what Sanic's lane answers better: nothing at all, or headers that cannot be sent as they are."""
        record = found.record
        try:
            if not record.size:
                return None
            if record not in self._heads:
                described = Description.of_record(record, complete=True)
                self._heads[record] = (described, ReadyHeads.of(described))
                if len(self._heads) > _MOST_HEADS:
                    self._heads.popitem(last=False)
            described, heads = self._heads[record]
            return HotObject(object_id, described, heads, found.identity(), found, size=record.size)
        except (ValueError, OSError):
            return None

    def _take_into_memory(self, key: bytes, hot: HotObject) -> HotObject:
        """The object in memory, if all of it is in the page cache, and there is room; else as it was."""
        if hot.found is None or hot.size + _ENTRY_BYTES > self._memory.limit:
            return hot
        try:
            body = read_cached(hot.found.descriptor, 0, hot.size)
        except OSError:
            return hot
        if len(body) != hot.size:
            return hot
        self.drop(key)
        kept = replace(hot, found=None, body=body, sends=0, held=False, dropped=False)
        self._in_memory[key] = kept
        self._memory.used += hot.size + _ENTRY_BYTES
        while self._memory.used > self._memory.limit:
            self.drop(next(iter(self._in_memory)))
        return kept

    async def run(self) -> None:
        """Until cancelled: close what is idle, and forget bodies of objects that are gone."""
        while True:
            await asyncio.sleep(IDLE_SECONDS / 4)
            await self.sweep()

    async def sweep(self) -> None:
        """Look at everything that may be due, a little at a time."""
        await self._sweep(self._open, self._let_go_if_idle)
        if self._clock() >= self._memory_look:
            # In no hurry: these take no space on the volume, and are looked at before they are answered
            self._memory_look = self._clock() + _MEMORY_LOOK
            await self._sweep(self._in_memory, self._forget_if_gone)

    async def _sweep(
        self, table: OrderedDict[bytes, HotObject], look: Callable[[bytes, HotObject, float], None]
    ) -> None:
        keys = list(table)
        for start in range(0, len(keys), _SWEPT_AT_ONCE):
            now = self._clock()
            for key in keys[start : start + _SWEPT_AT_ONCE]:
                hot = table.get(key)
                if hot is not None:
                    look(key, hot, now)
            await asyncio.sleep(0)

    def _let_go_if_idle(self, key: bytes, hot: HotObject, now: float) -> None:
        if not hot.sends and now - hot.used_at > IDLE_SECONDS:
            self.drop(key)

    def _forget_if_gone(self, key: bytes, hot: HotObject, now: float) -> None:
        if now >= hot.believed_until and self._volume.identity_of(hot.object_id) != hot.identity:
            self.drop(key)

    def close(self) -> None:
        """Close all; sends that go on keep their files."""
        for key in (*self._open, *self._in_memory):
            self.drop(key)
