#!lua flags=allow-oom
-- KEYS[14]: answer, KEYS[15]: asking. ARGV: owner. Releases the lock if this owner holds it
if redis.call('GET', KEYS[15]) == ARGV[4] then redis.call('DEL', KEYS[15]) end
