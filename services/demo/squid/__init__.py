"""A Storage-Squid for the demo and the tests: GraphQL over the demo's objects, and the head of a chain."""

from services.demo.squid.chain import TestChain
from services.demo.squid.knobs import SquidKnobs
from services.demo.squid.server import TestSquid
from services.demo.squid.world import StorageBucket

__all__ = ["SquidKnobs", "StorageBucket", "TestChain", "TestSquid"]
