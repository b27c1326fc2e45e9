-- ARGV: term, least idle time in seconds, 1 for pinned ones too. The generation changes, so that nobody who saw the object before can forget
-- it while its file may still be open for readers.
local object = read_object(object_id)
if not in_office(ARGV[4]) or not object or object.state == EVICTING then return 0 end
if ARGV[6] ~= '1' and redis.call('SISMEMBER', pins, object_id) == 1 then return 0 end
if now / 1000 - object.last_access < tonumber(ARGV[5]) then return 0 end
object.state, object.generation = EVICTING, next_serial()
write_object(object_id, object)
return 1
