-- KEYS: sources, corrupted, rates.
-- ARGV: milliseconds that a source without reports is kept, maximum of sources, maximum of corrupted copies, responses
-- in a mean, milliseconds that a rate is kept, number of reports.
-- Per report: source, failures, milliseconds since the last failure, 1 to reset earlier failures, 1 if it was reached,
-- milliseconds since it was unreachable (or -1), times to the first byte (seconds, separated by commas), bytes a second
-- (or -1).
-- Then per corrupted copy: "object source", milliseconds.
-- Returns the sources, each as in a report without flags and rate, the corrupted copies, and the rates: source, bytes a
-- second, milliseconds until it is forgotten.
local keep, most_sources, most_corrupted, mean_of = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local keep_rate, reports, next_argument = tonumber(ARGV[8]), tonumber(ARGV[9]), 10

-- failures, failed at, unreachable at (0: it was reached), last report at, times to the first byte
local function read_source(packed)
  if not packed then return 0, 0, 0, 0, '' end
  local failures, failed_at, unreached_at, heard_at, first_bytes = string.match(packed, '^(%d+) (%d+) (%d+) (%d+) (.*)$')
  return tonumber(failures), tonumber(failed_at), tonumber(unreached_at), tonumber(heard_at), first_bytes
end

local function read_rate(packed)
  if not packed then return nil, 0 end
  local rate, ends = string.match(packed, '^(%d+) (%d+)$')
  return tonumber(rate), tonumber(ends)
end

local function last_ones(first_bytes)
  local all = {}
  for text in string.gmatch(first_bytes, '[^,]+') do all[#all + 1] = text end
  return table.concat(all, ',', math.max(1, #all - mean_of + 1))
end

for report = 1, reports do
  local source, new_failures, since_failure, forgiven, reached, since_unreached, new_first_bytes, new_rate =
    unpack(ARGV, next_argument, next_argument + 7)
  next_argument = next_argument + 8
  local packed = redis.call('HGET', KEYS[1], source)
  if packed or redis.call('HLEN', KEYS[1]) < most_sources then
    local failures, failed_at, unreached_at, _, first_bytes = read_source(packed)
    if forgiven == '1' then failures = 0 end
    if tonumber(new_failures) > 0 then
      failures, failed_at = math.min(failures + tonumber(new_failures), 1000000), now - tonumber(since_failure)
    end
    if tonumber(since_unreached) >= 0 then
      unreached_at = now - tonumber(since_unreached)
    elseif reached == '1' then
      unreached_at = 0
    end
    redis.call('HSET', KEYS[1], source, string.format('%.0f %.0f %.0f %.0f %s', failures, failed_at, unreached_at, now,
      last_ones(first_bytes .. ',' .. new_first_bytes)))
    if tonumber(new_rate) >= 0 then
      local earlier, ends = read_rate(redis.call('HGET', KEYS[3], source))
      local rate = ends > now and (earlier + tonumber(new_rate)) / 2 or tonumber(new_rate)
      redis.call('HSET', KEYS[3], source, string.format('%.0f %.0f', rate, now + keep_rate))
    end
  end
end

for index = next_argument, #ARGV, 2 do
  redis.call('ZADD', KEYS[2], now + tonumber(ARGV[index + 1]), ARGV[index])
end
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
redis.call('ZREMRANGEBYRANK', KEYS[2], 0, -1 - most_corrupted)

local known, all = {}, redis.call('HGETALL', KEYS[1])
for index = 1, #all, 2 do
  local failures, failed_at, unreached_at, heard_at, first_bytes = read_source(all[index + 1])
  if heard_at < now - keep then
    redis.call('HDEL', KEYS[1], all[index])
  else
    known[#known + 1] = {all[index], failures, now - failed_at, unreached_at == 0 and -1 or now - unreached_at, first_bytes}
  end
end
local copies, marked = {}, redis.call('ZRANGE', KEYS[2], 0, -1, 'WITHSCORES')
for index = 1, #marked, 2 do
  copies[#copies + 1] = {marked[index], tonumber(marked[index + 1]) - now}
end
local rates, measured = {}, redis.call('HGETALL', KEYS[3])
for index = 1, #measured, 2 do
  local rate, ends = read_rate(measured[index + 1])
  if ends > now then
    rates[#rates + 1] = {measured[index], rate, ends - now}
  else
    redis.call('HDEL', KEYS[3], measured[index])
  end
end
return {known, copies, rates}
