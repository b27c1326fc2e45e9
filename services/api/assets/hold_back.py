"""Bytes on their way from a source to a client, checked while they pass."""

from __future__ import annotations

from collections import deque

from services.api.assets.decision import HOLD_BACK
from shared.domain.objects import ContentHash


class VerifiedPassage:
    """Hashes all bytes of an object as they pass, and keeps the object's last ones until the hash is known."""

    def __init__(
        self, content_hash: ContentHash, size: int | None, keep: int = HOLD_BACK, first: int = 0
    ) -> None:
        """`size` of the object in bytes; while nobody knows it, any byte may be among the last `keep`. What comes
        before byte `first` is hashed and handed to nobody."""
        self._expected = content_hash.digest
        self._hasher = content_hash.hasher()
        self._size = size
        self._keep = keep
        self._first = first
        self.resumed = False
        self._kept: deque[memoryview] = deque()
        self._received = self._released = 0

    def skip(self, data: bytes) -> None:
        """Take bytes into account that the client got from elsewhere. From now on the passage is `resumed`,
        and wrong bytes say nothing of who gave the rest."""
        self.resumed = True
        self._hasher.update(data)
        self._received += len(data)
        self._released += len(data)

    def push(self, data: bytes) -> list[memoryview]:
        """Take the next bytes; return those that may go now."""
        self._hasher.update(data)
        dropped = min(len(data), max(0, self._first - self._received))
        self._received += len(data)
        self._released += dropped
        if dropped < len(data):
            self._kept.append(memoryview(data)[dropped:])
        end = (self._received if self._size is None else self._size) - self._keep
        return self._release(min(end, self._received) - self._released)

    def verify(self) -> bool:
        """True if all bytes so far are the object; then `rest` may go."""
        return self._hasher.digest() == self._expected

    def rest(self) -> list[memoryview]:
        """What was kept."""
        return self._release(self._received - self._released)

    def _release(self, length: int) -> list[memoryview]:
        freed: list[memoryview] = []
        while length > 0:
            piece = self._kept.popleft()
            if len(piece) > length:
                self._kept.appendleft(piece[length:])
                piece = piece[:length]
            freed.append(piece)
            length -= len(piece)
            self._released += len(piece)
        return freed
