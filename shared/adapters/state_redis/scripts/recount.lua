#!lua flags=allow-oom
-- ARGV: term, 1 to recount entries too. Returns by how many bytes the sums were wrong. Nothing changes while a script
-- runs, so HSCAN returns each entry once.
if not in_office(ARGV[4]) then return 0 end
local wrong = 0

local function correct(field, bytes)
  local known = tonumber(redis.call('HGET', usage, field) or '0')
  if known == bytes then return end
  redis.call('HSET', usage, field, string.format('%.0f', bytes))
  wrong = wrong + math.abs(known - bytes)
end

if ARGV[5] == '1' then
  local used, cursor = 0, '0'
  repeat
    local page = redis.call('HSCAN', objects, cursor, 'COUNT', 1000)
    cursor = page[1]
    for index = 2, #page[2], 2 do
      local object = read_object(page[2][index - 1])
      if object then used = used + footprint(object.size) end
    end
  until cursor == '0'
  correct('used', used)
end

local reserved = 0
for _, packed in ipairs(redis.call('HVALS', fetches)) do
  reserved = reserved + reservation(unpack_fetch(packed))
end
correct('reserved', reserved)
return wrong
