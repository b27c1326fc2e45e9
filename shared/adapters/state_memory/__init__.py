"""The state store of standalone mode, in the memory of the only process. It is lost when the process ends."""

from distributor_node.shared.adapters.state_memory.store import MemoryStateStore

__all__ = ["MemoryStateStore"]
