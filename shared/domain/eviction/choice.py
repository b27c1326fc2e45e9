"""Policies by the names that settings give them."""

from __future__ import annotations

from typing import Literal, get_args

from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.domain.eviction.gdsf import DEFAULT_MISS_COST, Gdsf
from distributor_node.shared.domain.eviction.lru import Lru
from distributor_node.shared.domain.eviction.lru_sp import LruSp
from distributor_node.shared.domain.eviction.policy import EvictionPolicy

PolicyName = Literal["gdsf", "lru-sp", "lru"]
POLICY_NAMES: tuple[PolicyName, ...] = get_args(PolicyName)


def make_policy(name: str, miss_cost: int = DEFAULT_MISS_COST) -> EvictionPolicy:
    """A fresh policy. `miss_cost` (c0, bytes) concerns gdsf alone. Raises ConfigurationError for an unknown name."""
    match name:
        case "gdsf":
            return Gdsf(miss_cost)
        case "lru-sp":
            return LruSp()
        case "lru":
            return Lru()
    raise ConfigurationError(f"no eviction policy {name!r}: there are {', '.join(POLICY_NAMES)}")
