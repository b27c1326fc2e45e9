#!lua flags=allow-oom
-- ARGV: term, then per entry: object id, size, frequency, last access, priority. Returns 1 or 0 for each.
local answers, count = {}, (#ARGV - 4) / 5
if not in_office(ARGV[4]) then
  for number = 1, count do answers[number] = 0 end
  return answers
end
local used, reserved, generation = 0, 0, next_serials(count)
for number = 1, count do
  local first = 5 * number
  local id, size, fetch = ARGV[first], tonumber(ARGV[first + 1]), read_fetch(ARGV[first])
  answers[number] = 0
  if redis.call('HEXISTS', objects, id) == 0 and not (fetch and fetch.standing == 'fetching') then
    write_object(id, {state = STORED, size = size, frequency = tonumber(ARGV[first + 2]),
                      last_access = tonumber(ARGV[first + 3]), priority = tonumber(ARGV[first + 4]),
                      generation = generation + number - 1})
    used = used + footprint(size)
    if fetch then
      redis.call('HDEL', fetches, id)
      reserved = reserved + reservation(fetch)
      announce('fetch_changed', id)
    end
    answers[number] = 1
  end
end
add('used', used)
if reserved > 0 then add('reserved', -reserved) end
return answers
