#!lua flags=allow-oom
-- ARGV: token, worker, size, limit. Returns 1, or 0 if the lease is lost or the reservation would exceed the limit.
local fetch = read_leased(ARGV[4], ARGV[5])
if not fetch then return 0 end
local before, counted = reservation(fetch), redis.call('HMGET', usage, 'used', 'reserved', 'leaving')
fetch.size, fetch.held = tonumber(ARGV[6]), nil
local more = reservation(fetch) - before
local taken = tonumber(counted[1] or '0') + tonumber(counted[2] or '0') + tonumber(counted[3] or '0')
if more > 0 and taken + more > tonumber(ARGV[7]) then return 0 end
write_fetch(fetch)
add('reserved', more)
if more < 0 then announce('space_freed') end
return 1
