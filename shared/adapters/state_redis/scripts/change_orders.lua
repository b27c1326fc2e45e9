#!lua flags=allow-oom
-- ARGV: expected version (0: none), operator state. Returns the new version, or 0 if the version was another one.
if (redis.call('HGET', orders, 'version') or '0') ~= ARGV[4] then return 0 end
return write_orders(ARGV[5])
