"""Bytes on their way from a source to a client, checked while they pass."""

from __future__ import annotations

from collections import deque

from services.api.assets.decision import HOLD_BACK
from shared.domain.objects import ContentHash


class VerifiedPassage:
    """Hashes all bytes of an object as they pass, and keeps the last HOLD_BACK of them until the hash is known."""

    def __init__(self, content_hash: ContentHash, kept_bytes: int = HOLD_BACK) -> None:
        self._expected = content_hash.digest
        self._hasher = content_hash.hasher()
        self._keep = kept_bytes
        self._kept: deque[memoryview] = deque()
        self._kept_bytes = 0

    def skip(self, data: bytes | memoryview) -> None:
        """Take bytes into account that the client has got already."""
        self._hasher.update(data)

    def push(self, data: bytes) -> list[memoryview]:
        """Take the next bytes; return those that may go now."""
        self._hasher.update(data)
        self._kept.append(memoryview(data))
        self._kept_bytes += len(data)
        freed: list[memoryview] = []
        while self._kept_bytes > self._keep:
            piece, surplus = self._kept.popleft(), self._kept_bytes - self._keep
            if len(piece) > surplus:
                self._kept.appendleft(piece[surplus:])
                piece = piece[:surplus]
            freed.append(piece)
            self._kept_bytes -= len(piece)
        return freed

    def verify(self) -> bool:
        """True if all bytes so far are the object; then `rest` may go."""
        return self._hasher.digest() == self._expected

    def rest(self) -> list[memoryview]:
        """What was kept."""
        kept, self._kept, self._kept_bytes = list(self._kept), deque(), 0
        return kept
