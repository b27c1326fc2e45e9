"""The state store for standalone mode: one process, nothing outlives it but the volume."""

from distributor_node.shared.adapters.state_memory.store import MemoryStateStore

__all__ = ["MemoryStateStore"]
