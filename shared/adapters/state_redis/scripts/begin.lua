#!lua flags=allow-oom
-- ARGV: size, worker, lease in milliseconds, limit, serial of the claim (0: none), trace. Returns the name of the result
-- and its numbers. A reservation never shrinks here: the larger file of before may still be on the volume.
local size, worker, limit = tonumber(ARGV[4]), ARGV[5], tonumber(ARGV[7])
local object = read_object(object_id)
if object and object.state == EVICTING then return {'held', 0} end
if object then return {'stored', object.generation} end
local fetch = read_fetch()
local job = tonumber(ARGV[8])
if fetch and fetch.standing == 'fetching' then
  if job > 0 and fetch.job > 0 and job ~= fetch.job then return {'superseded'} end
  return {'held', fetch.ends - now}
end
if footprint(size) > limit then return {'never_fits'} end
if relieve() > OVERFULL then return OUT_OF_MEMORY end

local counted = redis.call('HMGET', usage, 'used', 'reserved', 'accounted', 'leaving')
if counted[3] ~= run_id() then return {'not_accounted'} end
local resumed = fetch ~= nil and fetch.reserved
local held = resumed and math.max(size, held_size(fetch)) or size
local more = footprint(held) - reservation(fetch)
local missing = tonumber(counted[1] or '0') + tonumber(counted[2] or '0') + tonumber(counted[4] or '0') + more - limit
if more > 0 and missing > 0 then return {'no_space', missing} end

local token = next_serial()
add('reserved', more)
write_fetch({phase = 'fetching', reserved = true, size = size, token = token, ends = now + tonumber(ARGV[6]),
             since = now, worker = worker, source = '', held = held > size and held or nil, job = job,
             trace = ARGV[9] ~= '' and ARGV[9] or fetch and fetch.trace, views = fetch and fetch.views,
             last_access = fetch and fetch.last_access, priority = fetch and fetch.priority,
             following = fetch and fetch.following})
redis.call('HDEL', wishes, object_id)
-- Nothing of a new fetch can be sent yet: to announce it would wake every process that waits for its first bytes.
if resumed then announce('fetch_changed') end
return {'granted', token, resumed and 1 or 0, held - size}
