"""A Storage-Squid for the demo and the tests: GraphQL over the demo's objects, and the head of a chain."""

from services.demo.squid.chain import TestChain
from services.demo.squid.knobs import SquidFaults
from services.demo.squid.server import TestSquid
from services.demo.squid.world import StorageBucket

__all__ = ["SquidFaults", "StorageBucket", "TestChain", "TestSquid"]
