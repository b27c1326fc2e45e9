#!lua flags=allow-oom
-- ARGV: term, minimum idle time in seconds, 1 to include pinned objects, object ids. Returns 1 or 0 for each. The
-- generation changes, so a process that saw the object before cannot forget it while its file may still be open.
local answers, count, leading = {}, #ARGV - 6, in_office(ARGV[4])
local generation = leading and count > 0 and next_serials(count)
for number = 1, count do
  local id = ARGV[6 + number]
  local object = leading and read_object(id)
  answers[number] = 0
  if object and object.state ~= EVICTING and (ARGV[6] == '1' or redis.call('SISMEMBER', pins, id) == 0)
    and now / 1000 - object.last_access >= tonumber(ARGV[5]) then
    object.state, object.generation = EVICTING, generation + number - 1
    write_object(id, object)
    answers[number] = 1
  end
end
return answers
