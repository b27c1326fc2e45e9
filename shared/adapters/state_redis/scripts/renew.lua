#!lua flags=allow-oom
-- ARGV: token, worker, lease in milliseconds, source ("": unchanged). Returns 1, or 0 if the lease is lost.
local fetch = read_leased(ARGV[4], ARGV[5])
if not fetch then return 0 end
local other = ARGV[7] ~= '' and ARGV[7] ~= fetch.source
if other then fetch.source = ARGV[7] end
if fetch.standing == 'parked' then fetch.since = now end
fetch.ends, fetch.lasts = now + tonumber(ARGV[6]), tonumber(ARGV[6])
write_fetch(fetch)
if other then announce('fetch_changed') end
return 1
