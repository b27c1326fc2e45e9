"""Cache of objects in use: open files with prebuilt response headers, and the bodies of small objects in memory."""

from __future__ import annotations

import asyncio
import resource
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import inf
from time import monotonic, time

from distributor_node.services.api.assets.decision import Representation
from distributor_node.services.api.assets.response import is_cached, read_cached
from distributor_node.services.api.headers import TAIL, PrebuiltHeaders, aging_tail
from distributor_node.shared.adapters.volume import ChangeWatch, FileIdentity, OpenObject, Volume
from distributor_node.shared.domain.conditionals import Conditions
from distributor_node.shared.domain.errors import InvalidInput, VolumeError
from distributor_node.shared.domain.objects import ObjectId, StoredRecord
from distributor_node.shared.observability.metrics import SEND_BLOCKED

REVALIDATE_SECONDS = 0.2
"""Seconds for which an object is served without checking its path on the volume again, where the kernel does not tell
of its changes."""
WATCHED_SECONDS = 5.0
"""The same, where the kernel tells. It says nothing of writes through a shared mapping or another hard link."""
IDLE_SECONDS = 1.0
"""Seconds for which an unused object is kept open after a process has tried to remove it, or may have."""
WATCHED_IDLE_SECONDS = 10.0
"""Seconds for which an unused object is kept open where the kernel tells of every attempt to remove it; less where
eviction may choose an object that was used not much longer ago."""
RESIDENT_SECONDS = 5.0
"""Seconds for which a small object that was found in the page cache counts as lying there."""
BLOCKED_SECONDS = 0.02
"""A send that takes longer has waited for the disk, or the process for the CPU."""
_ASK_AGAIN_SECONDS = 10.0
"""Seconds after a send that waited for the disk in which the page cache is asked every REVALIDATE_SECONDS."""
_TOUCH_SECONDS = 1.0
"""Seconds in which further uses of an object do not make it one of those used last."""
MAX_IN_MEMORY = 16 * 1024
"""Bytes. Larger objects are faster by sendfile, which copies nothing to user space."""
MAX_OPEN_FILES = 2048
_ENTRY_OVERHEAD = 5 * 1024
"""Bytes that an object in memory takes in addition to its body, mostly for its headers."""
_MAX_SEEN_ONCE = 20_000
_MEMORY_SWEEP_INTERVAL = 10.0
_MAX_HEADERS = 4000
"""Prebuilt headers that are kept after their objects have been dropped, about 3 KiB each."""
_WHOLE_PROBE_LIMIT = 1024 * 1024
_SWEEP_BATCH = 200


@dataclass(slots=True, eq=False)
class CachedObject:
    """One object. `file` is None where `body` is in memory. Times are monotonic seconds: `fresh_until` its name
    must be looked at again, `acquired_until` its bytes may be sent without another `OpenObjectCache.acquire`, `used_at`
    some were last sent (or it was opened), `counted_at` its access was last counted, `resident_until` it counts as
    lying in the page cache, `idle_limit` (a duration) it stays open unused. `sends` go on at this moment.
    `not_modified_for`: conditions that were answered 304, compared by identity."""

    object_id: ObjectId
    representation: Representation
    headers: PrebuiltHeaders
    identity: FileIdentity
    file: OpenObject | None
    body: bytes | None = None
    size: int = 0
    fresh_until: float = 0.0
    acquired_until: float = 0.0
    used_at: float = 0.0
    counted_at: float = -10.0
    resident_until: float = 0.0
    idle_limit: float = IDLE_SECONDS
    not_modified_for: Conditions | None = None
    sends: int = 0
    locked: bool = False
    dropped: bool = False
    tail: bytes = TAIL  # follows a prebuilt head; has the age of an object that can become stale
    tail_until: float = inf  # monotonic seconds until which `tail` may be sent

    def renew_tail(self, now: float) -> bool:
        """Prepare the tail of an object of an HTTP origin for the next second. False: it is stale."""
        freshness, wall = self.representation.freshness, time()
        if freshness is None:
            return True
        second = int(wall)
        age = max(0, second - freshness.born_at)
        if age >= freshness.lifetime:
            return False
        self.tail = aging_tail(age, freshness.lifetime - age)
        self.tail_until = now + 1.0 - (wall - second)
        return True

    @property
    def descriptor(self) -> int:
        """The descriptor of the open file, or -1."""
        return self.file.descriptor if self.file is not None else -1

    def is_resident(
        self, first: int, length: int, now: float, lasting: float, *, first_resident: bool = False
    ) -> bool:
        """Whether these bytes are in the page cache, so that sending them does not block.

        `first_resident`: the first byte is known to be. Small objects are probed as a whole, and count as lying there
        for `lasting` seconds, until `resident_until`.
        """
        if self.size > _WHOLE_PROBE_LIMIT:
            return is_cached(
                self.descriptor, first, min(length, _WHOLE_PROBE_LIMIT), first_resident=first_resident
            )
        if not is_cached(self.descriptor, 0, self.size):
            return False
        # For the shorter time where nothing is watched: a network file system, whose reads the kernel does not count.
        self.resident_until = now + (lasting if self.idle_limit > IDLE_SECONDS else REVALIDATE_SECONDS)
        return True

    def lock_shared(self) -> bool:
        """Lock the object against removal until it is closed. Returns False if it is being removed."""
        if not self.locked and self.file is not None:
            self.locked = self.file.lock_shared()
        return self.locked

    def begin_send(self) -> None:
        """Keep the file open until `end_send`. Call it before the next await.

        A descriptor that is closed in between may belong to another object afterwards.
        """
        self.sends += 1

    def end_send(self) -> None:
        self.sends -= 1
        if self.dropped and not self.sends:
            self.close()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


@dataclass(slots=True)
class _Memory:
    """The memory used by bodies, and the objects that have been requested once."""

    limit: int
    used: int = 0
    seen: dict[bytes, None] = field(default_factory=dict)

    def seen_before(self, key: bytes) -> bool:
        """Whether the object was requested before. Notes the request."""
        if key in self.seen:
            return True
        if len(self.seen) >= _MAX_SEEN_ONCE:
            self.seen.clear()
        self.seen[key] = None
        return False


def _blocks_read() -> int:
    """Blocks that this thread has had read from a disk."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_inblock


class OpenObjectCache:
    """Open objects and bodies in memory, by object id as bytes. `run` closes what is idle.

    `acquire` locks an open file against removal. Eviction renames the file. The cache notices at once where the kernel
    tells (`run` watches the volume) and otherwise within REVALIDATE_SECONDS, and closes its descriptor, which ends the
    lock. Bodies in memory need no lock. HEAD and 304 send no bytes and do not acquire the object.
    """

    def __init__(
        self,
        volume: Volume,
        memory: int,
        max_open_files: int = MAX_OPEN_FILES,
        clock: Callable[[], float] = monotonic,
        *,
        http_caching: bool = False,
        min_idle: float = inf,
    ) -> None:
        """`memory`: limit in bytes for bodies in memory. `clock`: monotonic seconds. `http_caching`: the objects are
        those of an HTTP origin, and may become stale. `min_idle`: seconds since its last access after which an object
        may be evicted."""
        self._watched_idle = max(IDLE_SECONDS, min(WATCHED_IDLE_SECONDS, min_idle / 4))
        self._http_caching = http_caching
        self._volume = volume
        self._memory = _Memory(memory)
        self._max_open_files = max_open_files
        self._clock = clock
        self._open: OrderedDict[bytes, CachedObject] = OrderedDict()
        self._in_memory: OrderedDict[bytes, CachedObject] = OrderedDict()
        self._headers: OrderedDict[StoredRecord, tuple[Representation, PrebuiltHeaders]] = OrderedDict()
        self._next_memory_sweep = 0.0
        self._watch: ChangeWatch | None = None
        self._replacements = volume.replacements
        self._asking_until = 0.0
        self._blocks_read = _blocks_read()
        self.resident_seconds = RESIDENT_SECONDS  # for `CachedObject.is_resident`

    def get(self, key: bytes, now: float) -> CachedObject | None:
        """Return the object if it is complete on the volume, else None. `acquire` it before sending its bytes."""
        cached = self._in_memory.get(key) or self._open.get(key)
        if cached is None or (now >= cached.fresh_until and not self._revalidate(key, cached, now)):
            return self._add(key, now)
        return cached

    def acquire(self, key: bytes, cached: CachedObject) -> CachedObject | None:
        """Lock the object before its bytes are sent. Not needed before `acquired_until`.

        Returns the object, which may be in memory now, or None if it is being removed.
        """
        if cached.body is not None:
            self._in_memory.move_to_end(key)
        else:
            if not cached.lock_shared():
                self.drop(key)
                return None
            self._open.move_to_end(key)
            if cached.size <= MAX_IN_MEMORY:
                if not self._memory.seen_before(key):
                    cached.acquired_until = min(cached.fresh_until, self._clock() + REVALIDATE_SECONDS)
                    return cached
                cached = self._load_into_memory(key, cached)
        cached.acquired_until = min(cached.fresh_until, self._clock() + _TOUCH_SECONDS)
        return cached

    def drop(self, key: bytes) -> None:
        """Remove the object from the cache. Sends in progress complete."""
        in_memory = self._in_memory.pop(key, None)
        if in_memory is not None and in_memory.body is not None:
            self._memory.used -= len(in_memory.body) + _ENTRY_OVERHEAD
        cached = self._open.pop(key, None)
        if cached is not None:
            cached.dropped = True
            if not cached.sends:
                cached.close()

    def _revalidate(self, key: bytes, cached: CachedObject, now: float) -> bool:
        watched = self._watch is not None and self._watch.covers(cached.object_id)
        if self._volume.identity_of(cached.object_id) != cached.identity:
            self.drop(key)
            return False
        self._set_fresh(cached, now, watched)
        return True

    def _set_fresh(self, cached: CachedObject, now: float, watched: bool) -> None:
        """`watched`: since before the file was looked at. A file with more names may be changed through another one."""
        watched = watched and cached.identity[5] == 1
        cached.fresh_until = now + (WATCHED_SECONDS if watched else REVALIDATE_SECONDS)
        cached.idle_limit = self._watched_idle if watched else IDLE_SECONDS

    def _add(self, key: bytes, now: float) -> CachedObject | None:
        try:
            object_id = ObjectId.parse(key.decode("ascii"))
            watched = self._watch is not None and self._watch.covers(object_id)
            file = None if object_id.is_digest else self._volume.open_object(object_id)
        except (InvalidInput, UnicodeDecodeError, VolumeError):
            return None
        if file is None:
            return None
        cached = self._make_entry(object_id, file)
        if cached is None:
            file.close()
            return None
        cached.used_at = now
        self._set_fresh(cached, now, watched)
        self._open[key] = cached
        while len(self._open) > self._max_open_files:
            self.drop(next(iter(self._open)))
        return cached

    def _make_entry(self, object_id: ObjectId, file: OpenObject) -> CachedObject | None:
        """Make an entry, or return None for Sanic's path: an empty object, or headers that cannot be prebuilt."""
        record = file.record
        try:
            if not record.size:
                return None
            if record not in self._headers:
                representation = Representation.of_hit(record, http_caching=self._http_caching)
                self._headers[record] = (representation, PrebuiltHeaders.build(representation))
                if len(self._headers) > _MAX_HEADERS:
                    self._headers.popitem(last=False)
            representation, headers = self._headers[record]
            return CachedObject(
                object_id,
                representation,
                headers,
                file.identity(),
                file,
                size=record.size,
                tail_until=inf if representation.freshness is None else 0.0,
            )
        except (ValueError, OSError):
            return None

    def _load_into_memory(self, key: bytes, cached: CachedObject) -> CachedObject:
        """Return the object with its body in memory if it is in the page cache and fits, else unchanged."""
        if cached.file is None or cached.size + _ENTRY_OVERHEAD > self._memory.limit:
            return cached
        try:
            body = read_cached(cached.file.descriptor, 0, cached.size)
        except OSError:
            return cached
        if len(body) != cached.size:
            return cached
        self.drop(key)
        in_memory = replace(cached, file=None, body=body, sends=0, locked=False, dropped=False)
        self._in_memory[key] = in_memory
        self._memory.used += cached.size + _ENTRY_OVERHEAD
        while self._memory.used > self._memory.limit:
            self.drop(next(iter(self._in_memory)))
        return in_memory

    # Changes that the kernel tells of

    def start_watch(self) -> None:
        """Have the running loop call `notice_changes`. `stop_watch` ends it."""
        self.stop_watch()
        self._replacements = self._volume.replacements
        self._watch = self._volume.watch_changes()
        if self._watch is not None:
            asyncio.get_running_loop().add_reader(self._watch.descriptor, self.notice_changes)

    def stop_watch(self) -> None:
        """From now on objects are looked at every REVALIDATE_SECONDS, each of them at its next request."""
        watch, self._watch = self._watch, None
        if watch is not None:
            asyncio.get_running_loop().remove_reader(watch.descriptor)
            watch.close()
        for table in (self._open, self._in_memory):
            for cached in table.values():
                cached.fresh_until, cached.idle_limit = 0.0, IDLE_SECONDS

    def notice_changes(self) -> None:
        """Drop what is not as it was, and close what is idle and stands in the way of a removal."""
        watch = self._watch
        names = set() if watch is None else watch.read()
        if names is None:
            self.start_watch()
            return
        now = self._clock()
        for name in names:
            key = name.encode("utf-8", "surrogateescape")
            cached = self._open.get(key) or self._in_memory.get(key)
            if cached is None:
                continue
            cached.fresh_until = 0.0
            if self._revalidate(key, cached, now):
                cached.idle_limit = IDLE_SECONDS
                if cached.body is None:
                    self._close_if_idle(key, cached, now)

    def note_blocked(self, seconds: float, now: float) -> None:
        """A send took `seconds`, more than BLOCKED_SECONDS. If the loop's thread has read from the disk since the last
        one, ask the page cache more often for a while.
        """
        SEND_BLOCKED.observe(seconds)
        blocks, self._blocks_read = self._blocks_read, _blocks_read()
        if blocks == self._blocks_read:
            return
        self._asking_until = now + _ASK_AGAIN_SECONDS
        if self.resident_seconds != REVALIDATE_SECONDS:
            self.resident_seconds = REVALIDATE_SECONDS
            for cached in self._open.values():
                cached.resident_until = min(cached.resident_until, now)

    async def run(self) -> None:
        """Watch the volume and sweep, until cancelled."""
        self.start_watch()
        try:
            while True:
                await asyncio.sleep(IDLE_SECONDS / 4)
                await self.sweep()
        finally:
            self.stop_watch()

    async def sweep(self) -> None:
        """Close idle objects, and drop bodies of removed objects. Yields to the loop every _SWEEP_BATCH objects."""
        if self._watch is not None and self._volume.replacements != self._replacements:
            self.start_watch()
        if self.resident_seconds != RESIDENT_SECONDS and self._clock() >= self._asking_until:
            self.resident_seconds = RESIDENT_SECONDS
        await self._sweep(self._open, self._close_if_idle)
        if self._clock() >= self._next_memory_sweep:
            # Rarely: these take no space on the volume, and are revalidated before they are served.
            self._next_memory_sweep = self._clock() + _MEMORY_SWEEP_INTERVAL
            await self._sweep(self._in_memory, self._drop_if_replaced)

    async def _sweep(
        self, table: OrderedDict[bytes, CachedObject], check: Callable[[bytes, CachedObject, float], None]
    ) -> None:
        keys = list(table)
        for start in range(0, len(keys), _SWEEP_BATCH):
            now = self._clock()
            for key in keys[start : start + _SWEEP_BATCH]:
                cached = table.get(key)
                if cached is not None:
                    check(key, cached, now)
            await asyncio.sleep(0)

    def _close_if_idle(self, key: bytes, cached: CachedObject, now: float) -> None:
        if not cached.sends and now - cached.used_at > cached.idle_limit:
            self.drop(key)

    def _drop_if_replaced(self, key: bytes, cached: CachedObject, now: float) -> None:
        if now >= cached.fresh_until and self._volume.identity_of(cached.object_id) != cached.identity:
            self.drop(key)

    def close(self) -> None:
        """Drop all objects. Sends in progress keep their files open."""
        for key in (*self._open, *self._in_memory):
            self.drop(key)
