#!lua flags=allow-oom
-- ARGV: term. The run id of the server changes with every restart and failover. An emptied store loses the field.
if in_office(ARGV[4]) then redis.call('HSET', usage, 'accounted', run_id()) end
