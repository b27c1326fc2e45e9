#!lua flags=allow-oom
-- ARGV: term. Drops the entry of an object that is being evicted; its bytes go on counting as those of a file that is
-- still sent. Returns 1 if it was dropped.
local object = in_office(ARGV[4]) and read_object(object_id)
if not object or object.state ~= EVICTING then return 0 end
redis.call('HDEL', objects, object_id)
add('used', -footprint(object.size))
add('leaving', footprint(object.size))
return 1
