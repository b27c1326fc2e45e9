#!lua flags=allow-oom
-- ARGV: term, serial of the request
if in_office(ARGV[4]) and redis.call('HGET', purges, object_id) == ARGV[5] then redis.call('HDEL', purges, object_id) end
