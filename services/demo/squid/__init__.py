"""A Storage-Squid for the demo and the tests: GraphQL over the demo's objects, and the head of a chain."""

from distributor_node.services.demo.squid.chain import TestChain
from distributor_node.services.demo.squid.knobs import SquidFaults
from distributor_node.services.demo.squid.server import TestSquid
from distributor_node.services.demo.squid.world import StorageBucket

__all__ = ["SquidFaults", "StorageBucket", "TestChain", "TestSquid"]
