#!lua flags=allow-oom
-- ARGV: claimant, milliseconds of the claim, milliseconds of a queue mark, milliseconds until an unfinished job counts as
-- lost, trace; with a question of admission: size, size above which a second view is needed (-1: it follows the mean
-- view), low watermark, milliseconds in which the second view has to follow, milliseconds of a view, most first views.
-- KEYS[14]: first views. Returns the serial of the claim, or the status of the object that refuses it, or `not_admitted`.
local first_views = KEYS[14]

-- Bytes; of all complete objects where no view was counted
local function mean_view(used)
  local readable, basis = pcall(cjson.decode, redis.call('HGET', policy, 'basis') or '')
  local views = readable and type(basis) == 'table' and tonumber(basis.views) or 0
  if views > 0 then return (tonumber(basis.viewed_bytes) or 0) / views end
  return used / math.max(1, redis.call('HLEN', objects))
end

-- As SecondHitAdmission decides
local function admitted(size, above, low, window, lasts, most)
  local sums = redis.call('HMGET', usage, 'used', 'reserved', 'leaving')
  local used, above = tonumber(sums[1] or '0'), tonumber(above)
  if above < 0 then above = math.max(1048576, 2 * mean_view(used)) end
  if tonumber(size) <= above then return true end
  local pressure = used + tonumber(sums[2] or '0') + tonumber(sums[3] or '0') > tonumber(low)
  local first = tonumber(redis.call('ZSCORE', first_views, object_id) or '')
  if first and first <= now and now - first <= tonumber(window) then
    return not pressure or now - first >= tonumber(lasts)
  end
  redis.call('ZADD', first_views, now, object_id)
  redis.call('ZREMRANGEBYRANK', first_views, 0, -1 - tonumber(most))
  return not pressure
end

local share = relieve()
if share > OVERFULL then return OUT_OF_MEMORY end
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
if share >= NEARLY_FULL then
  redis.call('UNLINK', first_views)
elseif ARGV[9] and not parked and not admitted(unpack(ARGV, 9)) then
  return 'not_admitted'
end
local serial = next_serial()
write_fetch({phase = 'claimed', reserved = parked or false, size = parked and fetch.size or 0, token = 0,
             ends = now + tonumber(ARGV[5]), since = now, worker = ARGV[4], source = '',
             held = parked and fetch.held or nil, job = serial, trace = ARGV[8], whole = parked and fetch.whole or nil,
             views = parked and fetch.views or 0, last_access = parked and fetch.last_access or 0,
             priority = parked and fetch.priority or 0,
             following = parked and fetch.following or nil})
return serial
