#!lua flags=allow-oom
-- ARGV: claimant, milliseconds. Returns 1, or the status of the object that refuses the claim.
if relieve() > OVERFULL then return OUT_OF_MEMORY end
local fetch = read_fetch()
if (fetch and fetch.standing and fetch.standing ~= 'parked') or redis.call('EXISTS', failure) == 1 then
  return standing(fetch)
end
local parked = fetch and fetch.standing == 'parked'
write_fetch({phase = 'claimed', reserved = parked or false, size = parked and fetch.size or 0, token = 0,
             ends = now + tonumber(ARGV[5]), since = now, worker = ARGV[4], source = '', held = parked and fetch.held or nil})
return 1
