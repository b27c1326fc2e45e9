#!lua flags=allow-oom
-- ARGV: object ids
local serial = string.format('%.0f', next_serial())
for index = 4, #ARGV do redis.call('HSET', purges, ARGV[index], serial) end
announce('purge_wanted')
