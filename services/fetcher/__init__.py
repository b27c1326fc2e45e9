"""The fetcher: takes jobs, downloads objects into the volume, verifies them, tells the state store."""
