"""Benchmarks: run by `make bench`, `make bench-scale` and `make bench-policies`."""
