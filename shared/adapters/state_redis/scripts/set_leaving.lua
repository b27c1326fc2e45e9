#!lua flags=allow-oom
-- ARGV: term, bytes
if in_office(ARGV[4]) then redis.call('HSET', usage, 'leaving', ARGV[5]) end
