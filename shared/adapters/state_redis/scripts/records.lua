-- Prepended to every other script: keys, the server's clock in milliseconds, and how records are read and written.
-- KEYS: see Keys in records.py. ARGV[1]: announcement channel. ARGV[2]: bytes counted for the record of an object.
-- ARGV[3]: object id.
local objects, fetches, usage, wishes, leader, policy, accesses, failure, orders, pins, purges, warming, answers =
  unpack(KEYS)
local channel, record_bytes, object_id = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

-- What this version writes, in the field `format` of usage; records without the field have the same layout. A store that a
-- newer version wrote is not touched. Scripts with keys of their own (caches) have nothing to compare
local FORMAT = '1'
if #KEYS > 12 then
  local written = redis.call('HGET', usage, 'format')
  if written and written ~= FORMAT then
    return redis.error_reply('FORMAT expected format ' .. FORMAT .. ' of the state store, got ' .. written
      .. ': return to the version that wrote it, or delete its keys, and the index is rebuilt from the volume')
  end
end

-- views × 2 + state, size, last access (in 2^-16 POSIX seconds), priority, generation; as _OBJECT in records.py.
-- 30 bytes: with one byte more, the server allocates 16 bytes more for each object
local OBJECT = '<I4I6I6dI6'
local STORED, EVICTING = 0, 1
local GRAIN, MOST_VIEWS, MOST_BYTES = 65536, 2147483647, 281474976710655

local function footprint(size) return size + record_bytes end

-- %.0f, because Lua writes large numbers in scientific notation, which HINCRBY rejects
local function add(field, bytes)
  redis.call('HINCRBY', usage, field, string.format('%.0f', bytes))
  if field == 'used' then redis.call('HINCRBY', usage, 'turnover', string.format('%.0f', math.abs(bytes))) end
end

-- Rises with every call, and across an emptied store: it is at least the clock, so old tokens are never granted again
local function next_serials(count)
  local first = math.max(tonumber(redis.call('HGET', usage, 'serial') or '0') + 1, now)
  redis.call('HSET', usage, 'serial', string.format('%.0f', first + count - 1))
  return first
end

local function next_serial() return next_serials(1) end

local function run_id() return string.match(redis.call('INFO', 'server'), 'run_id:(%w+)') end

-- POSIX milliseconds since when this server has kept what it was told. Another run id: it was restarted or replaced, and
-- may have lost its last second. No run id: it was emptied
local function kept_since()
  local known = redis.call('HMGET', usage, 'run', 'kept_since')
  local run = run_id()
  if known[1] == run and known[2] then return tonumber(known[2]) end
  redis.call('HSET', usage, 'run', run, 'kept_since', string.format('%.0f', now))
  return now
end

local function announce(topic, id) redis.call('PUBLISH', channel, topic .. ' ' .. (id or object_id)) end

-- Remove a record that cannot be read. What it counted is recounted: until then nothing is reserved
local function drop(key, id)
  redis.call('HDEL', key, id)
  redis.call('HDEL', usage, 'accounted')
end

local function read_object(id)
  local packed = redis.call('HGET', objects, id)
  if not packed then return nil end
  if #packed ~= struct.size(OBJECT) then return drop(objects, id) end
  local views_and_state, size, accessed, priority, generation = struct.unpack(OBJECT, packed)
  local state = views_and_state % 2
  return {state = state, size = size, frequency = (views_and_state - state) / 2, last_access = accessed / GRAIN,
          priority = priority, generation = generation}
end

local function write_object(id, object)
  local views = math.min(math.max(object.frequency, 0), MOST_VIEWS)
  local accessed = math.min(math.max(math.floor(object.last_access * GRAIN), 0), MOST_BYTES)
  redis.call('HSET', objects, id, struct.pack(OBJECT, views * 2 + object.state, object.size, accessed, object.priority,
    object.generation))
end

-- `phase` is what was written. `standing` is the phase now: nil if it expired without a reservation. `lasts`: the
-- milliseconds from writing to `ends`. A fetch that ends later than that from now was written before the clock was set
-- back. `held`: bytes of the object that the reservation covers where that is more than `size`, because the object was
-- larger before; nil otherwise. `job`: serial of the claim whose job is carried out, 0 if there is none. `trace`: see
-- Fetch; versions before it neither write nor keep it. `whole`: bytes of the object where it was parked with fewer, nil
-- otherwise. `size` is what was kept then: a version that knows no `whole` counts it right, and claims the rest in `begin`.
-- `following`: who reads the object, see `following_of`. `views`, `last_access`, `priority`: see Fetch. `written`: when the phase was written. Nil if it cannot be read
local function unpack_fetch(packed)
  local readable, fields = pcall(cmsgpack.unpack, packed)
  if not readable or type(fields) ~= 'table' or type(fields[5]) ~= 'number' then return nil end
  local phase, reserved, size, token, ends, since, worker, source, lasts, held, job, trace, following, partial =
    unpack(fields)
  local whole, views, last_access, priority = unpack(type(partial) == 'table' and partial or {})
  local fetch = {phase = phase, reserved = reserved, size = size, token = token, ends = ends, since = since,
                 worker = worker, source = source, lasts = lasts, held = held ~= 0 and held or nil,
                 job = job or 0, trace = trace or '', following = type(following) == 'table' and following or nil,
                 whole = whole ~= 0 and whole or nil, views = views or 0, last_access = last_access or 0,
                 priority = priority or 0, written = since, standing = phase}
  if lasts and ends > now + lasts then fetch.ends, fetch.outdated = now + lasts, true end
  if phase ~= 'parked' and ends <= now then
    fetch.standing = reserved and 'parked' or nil
    fetch.since = ends
  end
  return fetch
end

local function write_fetch(fetch, id)
  local partial = 0
  if fetch.whole or (fetch.views or 0) > 0 then
    partial = {fetch.whole or 0, fetch.views or 0, fetch.last_access or 0, fetch.priority or 0}
  end
  redis.call('HSET', fetches, id or object_id, cmsgpack.pack({fetch.phase, fetch.reserved, fetch.size, fetch.token,
    fetch.ends, fetch.since, fetch.worker, fetch.source, math.max(0, fetch.lasts or fetch.ends - now), fetch.held or 0,
    fetch.job or 0, fetch.trace or '', fetch.following or 0, partial}))
end

local function peek_fetch(id)
  local packed = redis.call('HGET', fetches, id or object_id)
  return packed and unpack_fetch(packed) or nil
end

local function read_fetch(id)
  local fetch = peek_fetch(id)
  if not fetch and redis.call('HEXISTS', fetches, id or object_id) == 1 then drop(fetches, id or object_id) end
  if fetch and fetch.outdated then write_fetch(fetch, id) end
  return fetch
end

-- views (that began since the first request; 0: not told), when the last one began, 1 if all of the object was ordered,
-- when a process last told of its clients, and for each process with clients: its name, when it told of them, and for each
-- the first byte that it needs and the next one that it has not got
local function following_of(fetch) return fetch.following or {0, 0, 0, 0, {}} end

-- Writes what was read, whatever has expired since: a queue mark goes on counting from when it was written
local function rewrite_following(fetch, following, id)
  fetch.following, fetch.since = following, fetch.written
  write_fetch(fetch, id)
end

-- Bytes of the object that the fetch has reserved, without its record
local function held_size(fetch) return math.max(fetch.size, fetch.held or 0) end

local function reservation(fetch) return fetch and fetch.reserved and footprint(held_size(fetch)) or 0 end

-- An expired lease stays valid as long as no other worker has taken the object over
local function read_leased(token, worker)
  local fetch = read_fetch()
  if fetch and fetch.phase == 'fetching' and fetch.token == tonumber(token) and fetch.worker == worker then
    return fetch
  end
end

-- What a fetch has reserved of an object that needs more; 0 for any other
local function kept_by_shrunk(fetch) return fetch and fetch.whole and reservation(fetch) or 0 end

-- What Python reads as Fetch: phase, size, worker, source, milliseconds left, milliseconds in this phase, trace, bytes
-- reserved, views, last access and priority as text
local function shown(fetch)
  local left = fetch.standing == 'parked' and 0 or fetch.ends - now
  return {fetch.standing, fetch.whole or fetch.size, fetch.worker, fetch.source, left, math.max(0, now - fetch.since),
          fetch.trace, reservation(fetch), fetch.views, string.format('%.17g', fetch.last_access),
          string.format('%.17g', fetch.priority)}
end

-- What Python reads as ObjectStatus: the fetch or false, the reason of the failure or false, milliseconds until it
-- expires. During another attempt the failure is hidden
local function standing(fetch)
  local reason = not (fetch and fetch.standing == 'fetching') and redis.call('GET', failure)
  return {fetch and fetch.standing and shown(fetch) or false, reason, reason and redis.call('PTTL', failure) or 0}
end

-- A job that was published waits in a queue. Where that does not move, another job would only wait behind it
local function job_waits(fetch, milliseconds)
  return fetch.phase == 'queued' and now >= fetch.written and now - fetch.written < tonumber(milliseconds)
end

-- `held`: bytes that are kept of the reservation; nil: all. Returns whether bytes were released
local function park(fetch, held)
  local before = reservation(fetch)
  fetch.phase, fetch.ends, fetch.since, fetch.lasts = 'parked', now, now, 0
  if fetch.reserved and held and held < fetch.size then
    fetch.size, fetch.held, fetch.whole = held, nil, fetch.whole or fetch.size
  elseif fetch.reserved and held and held < held_size(fetch) then
    fetch.held = held
  end
  if reservation(fetch) < before then add('reserved', reservation(fetch) - before) end
  write_fetch(fetch)
  return reservation(fetch) < before
end

local function in_office(term) return redis.call('GET', leader) == term end

local function write_orders(text)
  local version = string.format('%.0f', next_serial())
  redis.call('HSET', orders, 'version', version, 'orders', text)
  announce('settings_changed')
  return tonumber(version)
end

-- Memory. A script that frees, holds or ends something is declared `allow-oom`: it must work when the server is full. One
-- that only reads is declared `no-writes`: it works on a replica, too

local NEARLY_FULL, OVERFULL = 0.9, 1.25  -- shares of maxmemory
local DROPPED_AT_ONCE, KEYS_AT_ONCE, BATCHES_KEPT = 1000, 2000, 1000

-- The share of maxmemory in use; 0 without a limit
local function memory_share()
  local info = redis.call('INFO', 'memory')
  local limit = tonumber(string.match(info, '\nmaxmemory:(%d+)'))
  return limit > 0 and tonumber(string.match(info, 'used_memory:(%d+)')) / limit or 0
end

-- Drops answers of the catalog, those that would expire first
local function drop_answers(count)
  if count <= 0 then return end
  local dropped = redis.call('ZPOPMIN', answers, string.format('%.0f', count))
  for index = 1, #dropped, 2 do redis.call('UNLINK', dropped[index]) end
end

-- Drops answers that are in no index, because an earlier version wrote them: those among the next keys of the server
local function drop_unindexed_answers()
  local prefix = string.sub(answers, 1, -#'answers' - 1)
  local page = redis.call('SCAN', redis.call('HGET', usage, 'cursor') or '0', 'COUNT', KEYS_AT_ONCE)
  redis.call('HSET', usage, 'cursor', page[1])
  for _, key in ipairs(page[2]) do
    if string.sub(key, 1, #prefix) == prefix and string.find(key, ':answer:', #prefix, true)
      and not redis.call('ZSCORE', answers, key) then
      redis.call('UNLINK', key)
    end
  end
end

-- Frees memory of a server that is nearly full: what only saves time goes, so that the index has room. Returns the share
-- of maxmemory that is in use then
local function relieve()
  local share = memory_share()
  if share < NEARLY_FULL then return share end
  drop_answers(DROPPED_AT_ONCE)
  drop_unindexed_answers()
  redis.call('XTRIM', accesses, 'MAXLEN', '~', BATCHES_KEPT)
  return memory_share()
end

-- New work is refused where even that does not help, because the index itself is too large
local OUT_OF_MEMORY = {err = 'OOM the index is larger than maxmemory'}
