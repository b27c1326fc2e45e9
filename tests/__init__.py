"""Tests: unit, contract, integration, end to end, deployment files, Docker and chaos."""
