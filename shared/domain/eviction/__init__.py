"""Which objects go first: eviction policies behind one pure interface, and the choice among them."""

from __future__ import annotations

from typing import Literal, get_args

from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.domain.eviction.gdsf import AUTO_COST, Gdsf, MissCost
from distributor_node.shared.domain.eviction.lru_sp import LruSp
from distributor_node.shared.domain.eviction.packed import Lru
from distributor_node.shared.domain.eviction.policy import EvictionPolicy, PolicyEntry, PriorityBasis

__all__ = [
    "AUTO_COST",
    "POLICY_NAMES",
    "EvictionPolicy",
    "Gdsf",
    "Lru",
    "LruSp",
    "MissCost",
    "PolicyEntry",
    "PolicyName",
    "PriorityBasis",
    "make_policy",
]

PolicyName = Literal["gdsf", "lru-sp", "lru"]
POLICY_NAMES: tuple[PolicyName, ...] = get_args(PolicyName)


def make_policy(name: str, cost: MissCost = AUTO_COST) -> EvictionPolicy:
    """A fresh policy. `cost` concerns gdsf alone. Raises ConfigurationError for an unknown name."""
    match name:
        case "gdsf":
            return Gdsf(cost)
        case "lru-sp":
            return LruSp()
        case "lru":
            return Lru()
    raise ConfigurationError(f"eviction policy: expected one of {', '.join(POLICY_NAMES)}, got {name!r}")
