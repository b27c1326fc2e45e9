"""Which objects go first: eviction policies, all behind one pure interface."""

from __future__ import annotations

from distributor_node.shared.domain.eviction.choice import POLICY_NAMES, PolicyName, make_policy
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
    "PolicyName",
    "make_policy",
]
