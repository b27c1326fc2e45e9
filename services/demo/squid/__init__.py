"""A Storage-Squid for the demo and the tests: a GraphQL API for the demo's objects, and the head of a chain."""

from distributor_node.services.demo.squid.data import StorageBucket
from distributor_node.services.demo.squid.resolvers import SquidFaults
from distributor_node.services.demo.squid.server import TestChain, TestSquid

__all__ = ["SquidFaults", "StorageBucket", "TestChain", "TestSquid"]
