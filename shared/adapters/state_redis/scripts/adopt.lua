-- ARGV: term, size, frequency, last access, priority
local fetch = read_fetch()
if not in_office(ARGV[4]) or redis.call('HEXISTS', objects, object_id) == 1 then return 0 end
if fetch and fetch.standing == 'fetching' then return 0 end
local size, generation = tonumber(ARGV[5]), next_serial()
write_object(object_id, {state = STORED, size = size, frequency = tonumber(ARGV[6]), last_access = tonumber(ARGV[7]),
                         priority = tonumber(ARGV[8]), generation = generation})
add('used', footprint(size))
if fetch then
  redis.call('HDEL', fetches, object_id)
  if fetch.reserved then add('reserved', -footprint(fetch.size)) end
end
announce('fetch_changed')
return 1
