-- ARGV: batch, maximum of batches, maximum of bytes
redis.call('XADD', accesses, 'MAXLEN', '~', ARGV[5], '*', 'batch', ARGV[4])
if redis.call('MEMORY', 'USAGE', accesses) > tonumber(ARGV[6]) then
  redis.call('XTRIM', accesses, 'MAXLEN', math.floor(redis.call('XLEN', accesses) / 2))
end
