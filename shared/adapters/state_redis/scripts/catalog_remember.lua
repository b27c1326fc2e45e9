#!lua flags=allow-oom
-- KEYS from 14 on, for each object: answer, asking. ARGV: maximum of answers; for each object: description, milliseconds
-- it is fresh, milliseconds it is kept. Releases the locks
for at = 15, #KEYS, 2 do redis.call('DEL', KEYS[at]) end
if relieve() >= NEARLY_FULL then return end
local argument = 5
for at = 14, #KEYS, 2 do
  local described, fresh, keep = ARGV[argument], tonumber(ARGV[argument + 1]), tonumber(ARGV[argument + 2])
  redis.call('SET', KEYS[at], string.format('%.0f', now + fresh) .. ' ' .. described, 'PX', string.format('%.0f', keep))
  redis.call('ZADD', answers, string.format('%.0f', now + keep), KEYS[at])
  argument = argument + 3
end
redis.call('ZREMRANGEBYSCORE', answers, '-inf', string.format('%.0f', now))
drop_answers(redis.call('ZCARD', answers) - tonumber(ARGV[4]))
