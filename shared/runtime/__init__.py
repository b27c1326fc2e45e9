"""What runs a service: its loop, its signals, its end."""

from distributor_node.shared.runtime.run_service import ServiceScope, run_service

__all__ = ["ServiceScope", "run_service"]
