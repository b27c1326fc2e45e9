"""The catalog of the Joystream network: a Storage-Squid GraphQL endpoint, and the chain's head."""

from shared.adapters.catalogs.joystream.catalog import JoystreamCatalog
from shared.adapters.catalogs.joystream.chain import ChainHead
from shared.adapters.catalogs.joystream.limits import SquidLimits
from shared.adapters.catalogs.joystream.network import SquidStatus, StorageEndpoint

__all__ = ["ChainHead", "JoystreamCatalog", "SquidLimits", "SquidStatus", "StorageEndpoint"]
