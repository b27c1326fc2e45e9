"""Complete objects, opened for sending."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from dataclasses import dataclass, field

from shared.domain.objects import StoredRecord

FileIdentity = tuple[int, int, int, int]
"""Device, inode, size, time of the last change of content: another file under the same name differs in one of them."""


def identity_of(seen: os.stat_result) -> FileIdentity:
    return (seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns)


@dataclass(slots=True)
class OpenObject:
    """An open complete object and its record. `close` it; `lock_shared` it when sending takes longer than a moment.

    One open object may serve several sends at once: holds are counted, the shared lock is on while there is one.
    """

    record: StoredRecord
    descriptor: int
    _lock_count: int = field(default=0)

    def lock_shared(self) -> bool:
        """Keep the object from being removed until `unlock`. False: it is being removed at this moment.

        On a file system without locks True: there nothing can be locked for removal either.
        """
        if self._lock_count == 0:
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:
                self._lock_count += 1
                return True
            if os.fstat(self.descriptor).st_nlink == 0:
                fcntl.flock(self.descriptor, fcntl.LOCK_UN)
                return False
        self._lock_count += 1
        return True

    def unlock(self) -> None:
        self._lock_count -= 1
        if self._lock_count == 0:
            with suppress(OSError):
                fcntl.flock(self.descriptor, fcntl.LOCK_UN)

    def identity(self) -> FileIdentity:
        """Of the file that is open, whatever lies under its name now."""
        return identity_of(os.fstat(self.descriptor))

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes; fewer only at the end of the file. OSError if the disk fails."""
        return os.pread(self.descriptor, length, offset)

    def close(self) -> None:
        """Close the descriptor, and with it every hold."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
