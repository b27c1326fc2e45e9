"""The ports' implementations, and the doors that have only one: volume and source client."""
