#!lua flags=allow-oom
-- ARGV: token, worker. Ends the lease and releases the reservation.
local fetch = read_leased(ARGV[4], ARGV[5])
if fetch then
  redis.call('HDEL', fetches, object_id)
  add('reserved', -reservation(fetch))
  announce('fetch_changed')
  announce('space_freed')
end
