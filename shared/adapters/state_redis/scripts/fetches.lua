#!lua flags=allow-oom
-- ARGV: milliseconds until an unfinished job counts as lost. Returns pairs of object id and fetch. Removes expired claims
-- without a reservation.
local live, all = {}, redis.call('HGETALL', fetches)
for index = 1, #all, 2 do
  local fetch = unpack_fetch(all[index + 1])
  if not fetch then
    drop(fetches, all[index])
  elseif fetch.standing then
    live[#live + 1] = {all[index], shown(fetch)}
  elseif not job_waits(fetch, ARGV[4]) then
    redis.call('HDEL', fetches, all[index])
  end
end
return live
