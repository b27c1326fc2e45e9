#!lua flags=allow-oom
-- KEYS[14]: answer, KEYS[15]: asking. ARGV: owner, milliseconds of the lock. Returns what catalog_recall returns, and 1
-- if the owner
-- got the lock and must ask the catalog
local kept = redis.call('GET', KEYS[14])
local described, left = false, 0
if kept then
  local fresh_until
  fresh_until, described = string.match(kept, '^(%d+) (.*)$')
  left = tonumber(fresh_until) - now
  if left > 0 then return {described, left, 0} end
end
local won = redis.call('SET', KEYS[15], ARGV[4], 'NX', 'PX', ARGV[5])
return {described, left, won and 1 or 0}
