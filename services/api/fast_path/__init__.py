"""The fast path: plain GETs and HEADs of cached objects, answered without Sanic.

The connection looks at what arrives. A whole, simple request for a cached object is answered at once; everything
else goes to Sanic, byte for byte as it came. Whatever is answered here is what Sanic's path would have answered:
both build headers in `services/api/assets/headers.py` and decide with `services/api/assets/decision.py`.
"""
