"""LRU: the object that was accessed least recently goes first; of equally old ones the lesser id.

For comparison only: media sizes span five orders of magnitude, and LRU gives the room of a thousand images to one video
that is never watched again (docs/eviction.md).
"""

from __future__ import annotations

from distributor_node.shared.domain.eviction.packed import PackedPolicy


class Lru(PackedPolicy):
    """Least recently used. The base class is in this order already."""

    name = "lru"
