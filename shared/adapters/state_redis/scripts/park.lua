#!lua flags=allow-oom
-- ARGV: token, worker. Ends the lease and keeps the reservation.
local fetch = read_leased(ARGV[4], ARGV[5])
if fetch then
  park(fetch)
  announce('fetch_changed')
end
