-- ARGV: term. Returns the bytes given back.
local object = read_object(object_id)
if not in_office(ARGV[4]) or not object or object.state ~= EVICTING then return 0 end
redis.call('HDEL', objects, object_id)
add('used', -footprint(object.size))
announce('space_freed')
return footprint(object.size)
