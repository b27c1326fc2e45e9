#!lua flags=allow-oom
-- ARGV: claimant ("": any), serial of the claim (0: any). Drops it or its queue mark, expired or not; a reservation stays,
-- parked.
local fetch, serial = read_fetch(), tonumber(ARGV[5])
local claimed = fetch and (fetch.phase == 'claimed' or fetch.phase == 'queued')
if claimed and (ARGV[4] == '' or fetch.worker == ARGV[4]) and (serial == 0 or fetch.job == serial) then
  if fetch.reserved then park(fetch) else redis.call('HDEL', fetches, object_id) end
  announce('fetch_changed')
end
