-- KEYS: answer, asking. ARGV: asker
if redis.call('GET', KEYS[2]) == ARGV[4] then redis.call('DEL', KEYS[2]) end
