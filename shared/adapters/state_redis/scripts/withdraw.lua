#!lua flags=allow-oom
-- ARGV: claimant. Drops its claim or queue mark; a reservation stays, parked.
local fetch = read_fetch()
if fetch and (fetch.standing == 'claimed' or fetch.standing == 'queued') and fetch.worker == ARGV[4] then
  if fetch.reserved then park(fetch) else redis.call('HDEL', fetches, object_id) end
  announce('fetch_changed')
end
