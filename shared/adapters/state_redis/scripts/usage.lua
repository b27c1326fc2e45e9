#!lua flags=no-writes
-- Returns used, reserved, objects, live leases, accounted, turnover, bytes in leaving/ that no entry stands for, queued
-- fetches, parked fetches, bytes reserved for these
local leases, queued, parked, kept = 0, 0, 0, 0
for _, packed in ipairs(redis.call('HVALS', fetches)) do
  local fetch = unpack_fetch(packed)
  if fetch and fetch.standing == 'fetching' then leases = leases + 1 end
  if fetch and fetch.standing == 'queued' then queued = queued + 1 end
  if fetch and fetch.standing == 'parked' then parked, kept = parked + 1, kept + reservation(fetch) end
end
local counted = redis.call('HMGET', usage, 'used', 'reserved', 'accounted', 'turnover', 'leaving')
return {tonumber(counted[1] or '0'), tonumber(counted[2] or '0'), redis.call('HLEN', objects), leases,
        counted[3] == run_id() and 1 or 0, tonumber(counted[4] or '0'), tonumber(counted[5] or '0'), queued,
        parked, kept}
