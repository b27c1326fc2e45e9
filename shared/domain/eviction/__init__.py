"""Which objects go first: eviction policies behind one pure interface, and the choice among them."""

from __future__ import annotations

from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.domain.eviction.gdsf import DEFAULT_MISS_COST, Gdsf
from distributor_node.shared.domain.eviction.lru import Lru
from distributor_node.shared.domain.eviction.lru_sp import LruSp
from distributor_node.shared.domain.eviction.policy import EvictionPolicy, PolicyEntry

__all__ = [
    "DEFAULT_MISS_COST",
    "POLICY_NAMES",
    "EvictionPolicy",
    "Gdsf",
    "Lru",
    "LruSp",
    "PolicyEntry",
    "make_policy",
]

POLICY_NAMES = (Gdsf.name, LruSp.name, Lru.name)


def make_policy(name: str, miss_cost: int = DEFAULT_MISS_COST) -> EvictionPolicy:
    """A fresh policy. `miss_cost` (c0, bytes) concerns gdsf alone. Raises ConfigurationError for an unknown name."""
    match name:
        case Gdsf.name:
            return Gdsf(miss_cost)
        case LruSp.name:
            return LruSp()
        case Lru.name:
            return Lru()
    raise ConfigurationError(f"eviction policy: expected one of {', '.join(POLICY_NAMES)}, got {name!r}")
