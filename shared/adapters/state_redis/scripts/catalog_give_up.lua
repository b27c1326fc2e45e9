-- KEYS: answer, asking. ARGV: owner. Releases the lock if this owner holds it
if redis.call('GET', KEYS[2]) == ARGV[4] then redis.call('DEL', KEYS[2]) end
