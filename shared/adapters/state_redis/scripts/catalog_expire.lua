#!lua flags=allow-oom
-- KEYS[14]: answer, KEYS[15]: asking. ARGV: description. Makes the answer stale if it is this one. It is kept as long as
-- before
local kept = redis.call('GET', KEYS[14])
if not kept then return end
if string.match(kept, '^%d+ (.*)$') == ARGV[4] then redis.call('SET', KEYS[14], '0 ' .. ARGV[4], 'KEEPTTL') end
