"""The state store on Redis 7.0 or newer (one server, or one with replicas; no cluster).

Only this package knows the Redis keys and the Lua scripts.
"""

from distributor_node.shared.adapters.state_redis.store import RedisStateStore

__all__ = ["RedisStateStore"]
