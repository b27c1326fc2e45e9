#!lua flags=allow-oom
-- ARGV: claimant, milliseconds
local fetch = read_fetch()
if fetch and fetch.standing == 'claimed' and fetch.worker == ARGV[4] then
  fetch.phase, fetch.ends, fetch.since, fetch.lasts = 'queued', now + tonumber(ARGV[5]), now, tonumber(ARGV[5])
  write_fetch(fetch)
end
