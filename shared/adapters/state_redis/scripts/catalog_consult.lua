#!lua flags=allow-oom
-- KEYS from 14 on, for each object: answer, asking. ARGV: owner, milliseconds of the lock. Returns for each object what
-- catalog_recall returns, and 1 if the owner got the lock and must ask the catalog
local found = {}
for at = 14, #KEYS, 2 do
  local kept = redis.call('GET', KEYS[at])
  local described, left = false, 0
  if kept then
    local fresh_until
    fresh_until, described = string.match(kept, '^(%d+) (.*)$')
    left = tonumber(fresh_until) - now
  end
  local won = left <= 0 and redis.call('SET', KEYS[at + 1], ARGV[4], 'NX', 'PX', ARGV[5])
  found[#found + 1] = {described, left, won and 1 or 0}
end
return found
