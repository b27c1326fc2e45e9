#!lua flags=allow-oom
-- ARGV: holder, milliseconds, serial of the progress (0: none), its state, the progress. Returns serial and warming, or
-- false if none is unfinished or another process holds the lease
local known = redis.call('HMGET', warming, 'serial', 'warming', 'state', 'holder', 'until')
if not known[1] or known[3] == 'finished' then return false end
if known[4] and known[4] ~= ARGV[4] and tonumber(known[5]) > now then return false end
redis.call('HSET', warming, 'holder', ARGV[4], 'until', string.format('%.0f', now + tonumber(ARGV[5])))
if ARGV[6] == known[1] then
  redis.call('HSET', warming, 'state', ARGV[7], 'warming', ARGV[8])
  known[2] = ARGV[8]
end
return {tonumber(known[1]), known[2]}
