"""Catalogs: a manifest file, an HTTP origin, the Joystream network, and the cache in front of the slow ones."""
