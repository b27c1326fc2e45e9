"""`distributor replay`: how other policies, cache sizes and settings would have served the traffic of access logs.

`access_logs` reads the logs, `scenarios` defines what is tried, and `run` tries it and writes the report.
"""
