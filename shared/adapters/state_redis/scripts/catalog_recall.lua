#!lua flags=no-writes
-- KEYS[14]: answer, KEYS[15]: asking. Returns the description (or false) and for how many milliseconds it is still fresh
local kept = redis.call('GET', KEYS[14])
if not kept then return {false, 0} end
local fresh_until, described = string.match(kept, '^(%d+) (.*)$')
return {described, tonumber(fresh_until) - now}
