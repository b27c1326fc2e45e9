"""Catalogs: a manifest file, any HTTP server (an origin), and the cache in front of a slow one."""
