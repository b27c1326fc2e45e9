#!lua flags=allow-oom
-- ARGV: claimant ("": any). Drops its claim or queue mark, expired or not; a reservation stays, parked.
local fetch = read_fetch()
local claimed = fetch and (fetch.phase == 'claimed' or fetch.phase == 'queued')
if claimed and (ARGV[4] == '' or fetch.worker == ARGV[4]) then
  if fetch.reserved then park(fetch) else redis.call('HDEL', fetches, object_id) end
  announce('fetch_changed')
end
