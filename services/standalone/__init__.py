"""The whole node in one process, with no servers beside it: API, fetcher and evictor as tasks of one loop."""
