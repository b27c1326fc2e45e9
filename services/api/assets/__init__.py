"""The asset path: one object for one GET or HEAD, from the volume, from a growing file, or from a source."""
