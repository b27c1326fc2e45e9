#!lua flags=allow-oom
-- KEYS[14]: answer, KEYS[15]: asking. ARGV: description, milliseconds it is fresh, milliseconds it is kept, maximum of
-- answers. Releases the lock
redis.call('DEL', KEYS[15])
if relieve() >= NEARLY_FULL then return end
redis.call('SET', KEYS[14], string.format('%.0f', now + tonumber(ARGV[5])) .. ' ' .. ARGV[4], 'PX', ARGV[6])
redis.call('ZADD', answers, string.format('%.0f', now + tonumber(ARGV[6])), KEYS[14])
redis.call('ZREMRANGEBYSCORE', answers, '-inf', string.format('%.0f', now))
drop_answers(redis.call('ZCARD', answers) - tonumber(ARGV[7]))
