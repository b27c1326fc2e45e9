"""Bytes on their way from a source to a client, checked while they pass."""

from __future__ import annotations

from collections import deque

from services.api.assets.decision import UNVERIFIED_TAIL_BYTES
from shared.domain.objects import ContentHash


class VerifyingBuffer:
    """Hashes all bytes of an object as they pass, and keeps the object's last ones until the hash is known."""

    def __init__(
        self,
        content_hash: ContentHash,
        size: int | None,
        tail_bytes: int = UNVERIFIED_TAIL_BYTES,
        first: int = 0,
    ) -> None:
        """`size` of the object in bytes; while nobody knows it, any byte may be among the last `tail_bytes`. What comes
        before byte `first` is hashed and handed to nobody."""
        self._expected = content_hash.digest
        self._hasher = content_hash.hasher()
        self._size = size
        self._tail_bytes = tail_bytes
        self._first = first
        self.resumed = False
        self._chunks: deque[memoryview] = deque()
        self._received = self._released = 0

    def hash_only(self, data: bytes) -> None:
        """Take bytes into account that the client got from elsewhere. From now on the passage is `resumed`,
        and wrong bytes say nothing of who gave the rest."""
        self.resumed = True
        self._hasher.update(data)
        self._received += len(data)
        self._released += len(data)

    def feed(self, data: bytes) -> list[memoryview]:
        """Take the next bytes; return those that may go now."""
        self._hasher.update(data)
        dropped = min(len(data), max(0, self._first - self._received))
        self._received += len(data)
        self._released += dropped
        if dropped < len(data):
            self._chunks.append(memoryview(data)[dropped:])
        end = (self._received if self._size is None else self._size) - self._tail_bytes
        return self._release(min(end, self._received) - self._released)

    def verify(self) -> bool:
        """True if all bytes so far are the object; then `drain` may go."""
        return self._hasher.digest() == self._expected

    def drain(self) -> list[memoryview]:
        """What was kept."""
        return self._release(self._received - self._released)

    def _release(self, length: int) -> list[memoryview]:
        released: list[memoryview] = []
        while length > 0:
            chunk = self._chunks.popleft()
            if len(chunk) > length:
                self._chunks.appendleft(chunk[length:])
                chunk = chunk[:length]
            released.append(chunk)
            length -= len(chunk)
            self._released += len(chunk)
        return released
