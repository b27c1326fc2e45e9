#!lua flags=allow-oom
-- ARGV: claimant, milliseconds, serial of the claim (0: any)
local fetch, serial = read_fetch(), tonumber(ARGV[6])
if fetch and fetch.standing == 'claimed' and fetch.worker == ARGV[4] and (serial == 0 or serial == fetch.job) then
  fetch.phase, fetch.ends, fetch.since, fetch.lasts = 'queued', now + tonumber(ARGV[5]), now, tonumber(ARGV[5])
  write_fetch(fetch)
end
