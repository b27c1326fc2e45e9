"""Measurements: run by `make bench` and its like."""
