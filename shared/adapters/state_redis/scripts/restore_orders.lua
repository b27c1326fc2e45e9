#!lua flags=allow-oom
-- ARGV: operator state, pinned objects. Returns 1, or 0 if there is an operator state already.
if redis.call('EXISTS', orders) == 1 then return 0 end
for index = 5, #ARGV do redis.call('SADD', pins, ARGV[index]) end
write_orders(ARGV[4])
return 1
