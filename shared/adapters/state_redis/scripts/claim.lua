#!lua flags=allow-oom
-- ARGV: claimant, milliseconds of the claim, milliseconds of a queue mark, milliseconds until an unfinished job counts as
-- lost, trace. Returns the serial of the claim, or the status of the object that refuses it.
if relieve() > OVERFULL then return OUT_OF_MEMORY end
kept_since()
local fetch = read_fetch()
if (fetch and fetch.standing and fetch.standing ~= 'parked') or redis.call('EXISTS', failure) == 1 then
  return standing(fetch)
end
if fetch and job_waits(fetch, ARGV[7]) then
  fetch.ends, fetch.since, fetch.lasts = now + tonumber(ARGV[6]), fetch.written, tonumber(ARGV[6])
  fetch.standing = 'queued'
  write_fetch(fetch)
  return standing(fetch)
end
local parked = fetch and fetch.standing == 'parked'
local serial = next_serial()
write_fetch({phase = 'claimed', reserved = parked or false, size = parked and fetch.size or 0, token = 0,
             ends = now + tonumber(ARGV[5]), since = now, worker = ARGV[4], source = '',
             held = parked and fetch.held or nil, job = serial, trace = ARGV[8]})
return serial
