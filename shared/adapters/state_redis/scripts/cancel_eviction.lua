#!lua flags=allow-oom
-- ARGV: term
local object = read_object(object_id)
if in_office(ARGV[4]) and object and object.state == EVICTING then
  object.state = STORED
  write_object(object_id, object)
end
