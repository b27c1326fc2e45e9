#!lua flags=allow-oom
-- ARGV: generation. Returns 1 if the entry was dropped.
local object = read_object(object_id)
if not object or object.generation ~= tonumber(ARGV[4]) then return 0 end
redis.call('HDEL', objects, object_id)
add('used', -footprint(object.size))
announce('space_freed')
return 1
