"""The client that reads objects from sources (storage nodes). It is bounded in time and checks every response."""

from distributor_node.shared.adapters.sources.client import SourceClient, SourceObservation, SourceResponse
from distributor_node.shared.adapters.sources.connections import SourceLimits

__all__ = ["SourceClient", "SourceLimits", "SourceObservation", "SourceResponse"]
