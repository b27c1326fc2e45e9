"""The catalog of the Joystream network: a Storage-Squid's GraphQL endpoint, and the head of the chain."""

from distributor_node.shared.adapters.catalogs.joystream.answers import StorageEndpoint
from distributor_node.shared.adapters.catalogs.joystream.catalog import JoystreamCatalog
from distributor_node.shared.adapters.catalogs.joystream.chain import ChainHead
from distributor_node.shared.adapters.catalogs.joystream.endpoint import SquidLimits

__all__ = ["ChainHead", "JoystreamCatalog", "SquidLimits", "StorageEndpoint"]
