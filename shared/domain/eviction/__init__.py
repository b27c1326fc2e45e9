"""Which objects go first: eviction policies, all behind one pure interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from shared.domain.eviction.lru_sp import LruSp
from shared.domain.eviction.policy import EvictionPolicy, PolicyEntry

POLICIES: Mapping[str, Callable[[], EvictionPolicy]] = {"lru-sp": LruSp}
"""By the name that settings give them."""

__all__ = ["POLICIES", "EvictionPolicy", "LruSp", "PolicyEntry"]
