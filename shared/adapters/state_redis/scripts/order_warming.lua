-- ARGV: warming. Returns its serial, or 0 while another one is not finished
local state = redis.call('HGET', warming, 'state')
if state and state ~= 'finished' then return 0 end
local serial = next_serial()
redis.call('DEL', warming)
redis.call('HSET', warming, 'serial', string.format('%.0f', serial), 'warming', ARGV[4], 'state', 'waiting')
return serial
