"""The asset path: GET and HEAD of one object from the volume, from a growing partial file, or from a source."""
