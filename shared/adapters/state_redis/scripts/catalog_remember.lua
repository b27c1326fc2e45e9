-- KEYS: answer, asking. ARGV: description, milliseconds it is believed, milliseconds it is kept
redis.call('SET', KEYS[1], string.format('%.0f', now + tonumber(ARGV[5])) .. ' ' .. ARGV[4], 'PX', ARGV[6])
redis.call('DEL', KEYS[2])
