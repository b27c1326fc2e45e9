-- ARGV: term. The server's run id changes with every restart and failover; an emptied store loses the field.
if in_office(ARGV[4]) then redis.call('HSET', usage, 'accounted', run_id()) end
