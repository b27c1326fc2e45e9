"""The client that reads objects from sources (storage nodes): bounded in time, and believing nothing unchecked."""

from shared.adapters.sources.client import SourceClient, SourceObservation, SourceResponse
from shared.adapters.sources.connections import SourceLimits

__all__ = ["SourceClient", "SourceLimits", "SourceObservation", "SourceResponse"]
