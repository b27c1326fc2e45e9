#!lua flags=allow-oom
-- ARGV: size, milliseconds
redis.call('HSET', wishes, object_id, struct.pack('<I8I8', footprint(tonumber(ARGV[4])), now + tonumber(ARGV[5])))
announce('space_wanted')
