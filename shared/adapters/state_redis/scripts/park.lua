#!lua flags=allow-oom
-- ARGV: token, worker, bytes of the object that stay reserved ("": all). Ends the lease.
local fetch = read_leased(ARGV[4], ARGV[5])
if fetch then
  local freed = park(fetch, tonumber(ARGV[6]))
  announce('fetch_changed')
  if freed then announce('space_freed') end
end
