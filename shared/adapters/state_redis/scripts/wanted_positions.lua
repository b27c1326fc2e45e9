#!lua flags=no-writes
-- KEYS: wanted of some objects. ARGV[4]: milliseconds that they are remembered. Returns the offsets of each.
local found = {}
for index = 1, #KEYS do
  found[index] = redis.call('ZRANGEBYSCORE', KEYS[index], string.format('(%.0f', now - tonumber(ARGV[4])), '+inf')
end
return found
