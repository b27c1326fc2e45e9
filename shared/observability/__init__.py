"""Logs and metrics: how a running node is watched."""
