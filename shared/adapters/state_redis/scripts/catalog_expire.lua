-- KEYS: answer, asking. ARGV: description. Makes the answer stale if it is this one; it expires when it would have
local kept = redis.call('GET', KEYS[1])
if not kept then return end
if string.match(kept, '^%d+ (.*)$') == ARGV[4] then redis.call('SET', KEYS[1], '0 ' .. ARGV[4], 'KEEPTTL') end
