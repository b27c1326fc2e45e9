-- ARGV: orders to begin with if there are none, how many are to be pinned, these, and those to be unpinned
local changed, last = 0, 5 + tonumber(ARGV[5])
for index = 6, #ARGV do
  changed = changed + redis.call(index <= last and 'SADD' or 'SREM', pins, ARGV[index])
end
if changed > 0 then write_orders(redis.call('HGET', orders, 'orders') or ARGV[4]) end
return changed
