#!lua flags=allow-oom
-- ARGV: the cause, as a failure ends. Returns 1 if a failure of this cause was dropped, else 0.
local failed = redis.call('GET', failure)
if not failed or string.sub(failed, -#ARGV[4]) ~= ARGV[4] then return 0 end
return redis.call('DEL', failure)
