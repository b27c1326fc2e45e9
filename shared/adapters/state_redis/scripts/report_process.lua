#!lua
-- KEYS: reports, watched. ARGV[3]: process. ARGV[4]: milliseconds until it expires. ARGV[5]: report. Drops expired
-- ones. Returns 1 while a page is open.
local all = redis.call('HGETALL', KEYS[1])
for index = 1, #all, 2 do
  local at, lasts = string.match(all[index + 1], '^(%d+) (%d+) ')
  if now - tonumber(at) >= tonumber(lasts) then redis.call('HDEL', KEYS[1], all[index]) end
end
redis.call('HSET', KEYS[1], ARGV[3], string.format('%.0f %s %s', now, ARGV[4], ARGV[5]))
return redis.call('EXISTS', KEYS[2])
