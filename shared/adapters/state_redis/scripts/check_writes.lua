-- KEYS: writable. Fails on a read-only replica, and on a server that refuses writes.
redis.call('SET', KEYS[1], '1', 'PX', 60000)
