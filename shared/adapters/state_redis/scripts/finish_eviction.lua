#!lua flags=allow-oom
-- ARGV: term, object ids. Returns the freed bytes for each.
local answers, freed, leading = {}, 0, in_office(ARGV[4])
for index = 5, #ARGV do
  local id = ARGV[index]
  local object = leading and read_object(id)
  local bytes = 0
  if object and object.state == EVICTING then
    redis.call('HDEL', objects, id)
    bytes = footprint(object.size)
    announce('space_freed', id)
  end
  freed = freed + bytes
  answers[#answers + 1] = bytes
end
if freed > 0 then add('used', -freed) end
return answers
