"""Reads metrics as Prometheus would."""

from __future__ import annotations

from prometheus_client import REGISTRY


def counted(name: str, **labels: str) -> float:
    """The value of one series; 0 before its first sample."""
    return REGISTRY.get_sample_value(name, labels) or 0.0
