"""When received bytes are written: at once in the beginning, where a client waits for them, in larger batches later."""

from __future__ import annotations

MAX_BATCH = 1024 * 1024
"""Bytes after which a write is due in any case."""

HIGH_WATER = 2 * MAX_BATCH
"""Bytes received and not yet written beyond which the source has to wait."""

MAX_LATENCY = 0.05
"""Seconds after which received bytes are written, however few: a follower of a slow source waits for them."""

_UNBATCHED_BYTES = 64 * 1024


def batch_size(received: int) -> int:
    """Bytes worth a write of their own, after `received` bytes of this stream: any for the first 64 KiB, then a quarter
    of what has come so far, so that followers are never far behind."""
    return 1 if received < _UNBATCHED_BYTES else min(received // 4, MAX_BATCH)
