#!lua flags=no-writes
-- KEYS: viewed. ARGV[4]: milliseconds that they are remembered. Then: object ids. Returns milliseconds since each was
-- last viewed, -1 if that is not remembered.
local ages = {}
for index = 5, #ARGV do
  local at = redis.call('ZSCORE', KEYS[1], ARGV[index])
  local age = at and math.max(0, now - tonumber(at)) or -1
  ages[#ages + 1] = age < tonumber(ARGV[4]) and age or -1
end
return ages
