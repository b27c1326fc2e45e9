#!lua flags=allow-oom
-- ARGV: initial operator state if there is none, number of objects to pin, these objects, objects to unpin. Returns those
-- that changed.
local changed, last = {}, 5 + tonumber(ARGV[5])
for index = 6, #ARGV do
  if redis.call(index <= last and 'SADD' or 'SREM', pins, ARGV[index]) == 1 then changed[#changed + 1] = ARGV[index] end
end
if #changed > 0 then write_orders(redis.call('HGET', orders, 'orders') or ARGV[4]) end
return changed
