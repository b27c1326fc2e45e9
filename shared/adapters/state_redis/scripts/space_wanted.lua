#!lua flags=allow-oom
-- Returns the bytes of each live request for space, less what is kept of the object. Removes expired ones.
local wanted, all = {}, redis.call('HGETALL', wishes)
for index = 1, #all, 2 do
  local bytes, ends = 0, 0
  if #all[index + 1] == 16 then bytes, ends = struct.unpack('<I8I8', all[index + 1]) end
  if ends > now then wanted[#wanted + 1] = math.max(0, bytes - kept_by_shrunk(peek_fetch(all[index]))) else redis.call('HDEL', wishes, all[index]) end
end
return wanted
