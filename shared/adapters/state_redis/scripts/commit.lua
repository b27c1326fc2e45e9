#!lua flags=allow-oom
-- ARGV: token, worker, time of storing in POSIX seconds
local fetch = read_leased(ARGV[4], ARGV[5])
if not fetch then return 0 end
local generation, replaced = next_serial(), read_object(object_id)
write_object(object_id, {state = STORED, size = fetch.size, frequency = math.max(1, fetch.views),
                         last_access = math.min(tonumber(ARGV[6]), now / 1000), priority = 0, generation = generation})
add('used', footprint(fetch.size) - (replaced and footprint(replaced.size) or 0))
add('reserved', -reservation(fetch))
redis.call('HDEL', fetches, object_id)
redis.call('DEL', failure)
announce('fetch_changed')
return 1
