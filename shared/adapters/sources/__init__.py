"""The client that reads objects from sources (storage nodes): bounded in time, and believing nothing unchecked."""

from shared.adapters.sources.answer import SourceResponse
from shared.adapters.sources.client import SourceClient
from shared.adapters.sources.limits import SourceLimits
from shared.adapters.sources.observation import SourceObservation

__all__ = ["SourceClient", "SourceLimits", "SourceObservation", "SourceResponse"]
