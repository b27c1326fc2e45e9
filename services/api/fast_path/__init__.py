"""The fast path: responds to simple GETs and HEADs of cached objects without Sanic.

The connection inspects received bytes first. A complete, simple request for a cached object gets its response at once.
Everything else goes to Sanic, byte for byte. Both paths send equal responses: they build headers in
`services/api/headers.py` and decide with `services/api/assets/decision.py`.
"""
