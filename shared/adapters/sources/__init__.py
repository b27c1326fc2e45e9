"""The client that reads objects from sources (storage nodes): bounded in time, and believing nothing unchecked."""

from distributor_node.shared.adapters.sources.client import SourceClient, SourceObservation, SourceResponse
from distributor_node.shared.adapters.sources.connections import SourceLimits

__all__ = ["SourceClient", "SourceLimits", "SourceObservation", "SourceResponse"]
