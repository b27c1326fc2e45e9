-- KEYS: answer, asking. ARGV: description, milliseconds it is fresh, milliseconds it is kept. Releases the lock
redis.call('SET', KEYS[1], string.format('%.0f', now + tonumber(ARGV[5])) .. ' ' .. ARGV[4], 'PX', ARGV[6])
redis.call('DEL', KEYS[2])
